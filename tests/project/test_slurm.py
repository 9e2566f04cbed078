"""A small grid through a real Slurm by the command in README.md, with one job cancelled and another killed."""

import contextlib
import functools
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
import slurm_cluster
from processes import checkout
from tiny import save_dataset, save_model

from saegrid.config.grid import load_grid

COMMAND = re.search(r"^snakemake .*profiles/slurm.*$", Path("README.md").read_text(), re.MULTILINE)[0]
GRID_FILE = re.search(r"grid=(\S+)", COMMAND)[1]
TARGET = ["--", "results_tidy.csv"]
CONSTANTS = {"layer": 1, "max_tokens": 64, "train_tokens": 1200, "val_tokens": 300, "eval_prompts": 6, "expansion": 4}
CONSTANTS |= {"batch_size": 8, "epochs": 30, "checkpoint_steps": 50, "threads": 1, "kernel": "reference"}
LACKING = slurm_cluster.missing()

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"no Slurm on this machine: {', '.join(LACKING)} missing")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()
    assert cluster.processes() == {}


def results(place):
    """All files of a place but times; a notebook's hash is one of them, as the notebook prints times."""
    return {name: content for name, content in chaos.contents(place).items() if not name.endswith("train.ipynb.sha256")}


@contextlib.contextmanager
def started(command, folder, environment):
    """A command in a folder; its output goes to log.txt there."""
    with open(folder / "log.txt", "ab") as log:
        facts = {"cwd": folder, "env": {**environment, "PYTHONPATH": str(folder / "lib")}}
        interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even if the tests are not
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=interruptible, **facts)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def test_the_documented_command_survives_scancel_kill_and_interrupt(cluster, tmp_path):
    """One run's job is cancelled and submitted again, another's process is killed, then the user stops it all."""
    places = {"model": save_model(tmp_path / "model"), "dataset": save_dataset(tmp_path / "data", train=60, test=20)}
    axes = [{"arch": ["BatchTopK", "TopK"], "k": [3]}]
    grid = {"name": "small", "title": "A small grid", "constants": CONSTANTS | places, "axes": axes}
    folder, alone = (checkout(tmp_path / name, **{Path(GRID_FILE).stem: grid}) for name in ("slurm", "local"))
    runs = [folder / "runs" / run.run_id for run in load_grid(folder / GRID_FILE).runs()]
    jobs = {}

    def log():
        parts = [folder / "log.txt", *(folder / ".snakemake" / "slurm_logs").rglob("*.log")]
        return "\n".join(f"{path}: {path.read_text()[-3000:]}" for path in parts) + cluster.logs()

    def until(condition, process):
        slurm_cluster.wait_for(lambda: condition() or process.poll() is not None, log, 300)
        assert process.poll() is None, log()

    def in_training():
        return [run for run in runs if run not in jobs and (run / "checkpoint.safetensors").exists()]

    options = ["-s", "workflow/Snakefile", "--cores", "2", "--config", f"grid={GRID_FILE}", *TARGET]
    local = started([sys.executable, "-m", "snakemake", *options], alone, cluster.environment)
    command = [*shlex.split(COMMAND), *TARGET]
    with local as by_itself, started(command, folder, cluster.environment) as first:
        for strike in (cluster.cancel, cluster.kill):
            until(in_training, first)
            (run,) = in_training()[:1]
            jobs[run] = cluster.jobs()[f"rule_train_wildcards_{run.name}"]
            strike(jobs[run])
        cancelled = next(iter(jobs))
        again = f"rule_train_wildcards_{cancelled.name}"
        until(lambda: cluster.jobs().get(again, jobs[cancelled]) != jobs[cancelled], first)
        first.send_signal(signal.SIGINT)
        assert first.wait(240) != 0
        slurm_cluster.wait_for(lambda: cluster.jobs() == {}, log)
        assert f"SLURM-job '{jobs[cancelled]}' failed, SLURM status is: 'CANCELLED'" in (folder / "log.txt").read_text()
        assert (cancelled / "checkpoint.safetensors").exists()
        with started(command, folder, cluster.environment) as second:
            assert second.wait(300) == 0, log()
        assert by_itself.wait(300) == 0, (alone / "log.txt").read_text()[-3000:]
    told = (folder / "log.txt").read_text()
    assert "localrule tables:" in told and "threads: 8" in told
    for place in ("activations", "runs"):
        assert results(folder / place) == results(alone / place)
    tables = sorted(path.name for path in alone.glob("*.csv"))
    assert len(tables) == 6
    for name in tables:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
