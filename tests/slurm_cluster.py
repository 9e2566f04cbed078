"""A real one-node Slurm, on loopback and in its own folder, with this machine's munged, slurmctld and slurmd."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

USER = pwd.getpwuid(os.getuid()).pw_name
PROGRAMS = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol"]
CPUS = 8
"""Cores of the node, whatever the machine has: the most that the profile requests."""
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmdParameters=config_overrides
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES State=UP
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A cluster that starts when constructed; `stop` ends all its processes. /etc is not touched."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("munge", "state", "spool", "bin"):
            (root / name).mkdir(mode=0o700)
        self.config = root / "slurm.conf"
        with socket.socket() as one, socket.socket() as other:
            for free in (one, other):
                free.bind(("127.0.0.1", 0))
            ports = {"controller": one.getsockname()[1], "node": other.getsockname()[1]}
        host = socket.gethostname().split(".")[0]
        self.config.write_text(CONFIG.format(root=root, host=host, user=USER, cpus=CPUS, **ports))
        # the plugin unsets SLURM_CONF for a job's srun, because clusters have their configuration in /etc
        wrapper = root / "bin" / "srun"
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={self.config} exec {shutil.which("srun")} "$@"\n')
        wrapper.chmod(0o755)
        path = os.pathsep.join([str(wrapper.parent), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.config)}
        self.daemons: list[subprocess.Popen] = []
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        munge = self.root / "munge"
        self.call("mungekey", "--create", f"--keyfile={munge}/key")
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        wait_for(lambda: (munge / "socket").exists(), self.logs)
        self._daemon("slurmctld", "-D", "-f", str(self.config))
        self._daemon("slurmd", "-D", "-f", str(self.config))
        wait_for(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T", check=False), self.logs)

    def _daemon(self, *command: str) -> None:
        """Start a daemon that ends with the test's process, even on kill -9."""
        with open(self.root / f"{command[0]}.log", "ab") as log:
            tied = [sys.executable, "-m", "saegrid.storage.processes", *command]
            self.daemons.append(subprocess.Popen(tied, stdout=log, stderr=log, env=self.environment))

    def call(self, *command: str, check: bool = True) -> str:
        """What a command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def jobs(self) -> dict[str, str]:
        """{comment: id} of the waiting and running jobs; the comment holds the rule and its wildcards."""
        lines = self.call("squeue", "--noheader", "--format=%i %k").splitlines()
        return {comment: job for job, comment in (line.split(maxsplit=1) for line in lines)}

    def cancel(self, job: str) -> None:
        self.call("scancel", job)

    def kill(self, job: str) -> None:
        """SIGKILL a job's papermill."""
        os.kill(next(pid for pid, command in self.processes(job).items() if "papermill" in command), signal.SIGKILL)

    def processes(self, job: str = "") -> dict[int, str]:
        """{pid: command line} of all processes of this cluster, or of one of its jobs."""
        marks = [f"SLURM_CONF={self.config}"] if not job else [f"SLURM_JOB_ID={job}", str(self.root)]
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and all(mark.encode() in (entry / "environ").read_bytes() for mark in marks):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended or is another user's
                continue
        return {pid: command for pid, command in found.items() if command}

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in self.root.glob("*.log"))

    def stop(self) -> None:
        """End the jobs, the daemons and their remaining processes."""
        if len(self.daemons) == 3:
            self.call("scancel", f"--user={USER}", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)


def wait_for(there: Callable[[], bool], why_not: Callable[[], str], seconds: float = 60.0) -> None:
    """Wait until `there()` is true; after `seconds`, fail with the text of `why_not()`."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, why_not()
        time.sleep(0.1)
