"""Kills, twins, disks, damage: a short form of `make chaos`, and what a workflow leaves when it is killed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
import chaos_workflow
import pytest
import torch
from processes import checkout

from saegrid.core import checkpoint
from saegrid.errors import DamagedError, DiskError
from saegrid.storage import atomic
from saegrid.storage.checksums import check_sum, check_sums, read_sealed, write_sealed, write_sum, write_sums


def test_a_short_chaos(tmp_path):
    """One fault of each kind and some more, in a process of its own, as it forks."""
    command = [sys.executable, "tests/chaos.py", "--faults", "14", "--workflow", "0", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = next(line for line in done.stdout.splitlines() if line.startswith("| all"))
    injected, survived, lost, wrong = map(int, last.split("|")[3:7])
    assert injected == survived >= 14 and lost == wrong == 0


def test_chaos_finds_what_it_looks_for(tmp_path):
    """Files that are written in place, and tables that believe what they read, do not pass."""
    broken = (
        "import chaos, saegrid.storage.atomic as atomic, saegrid.experiment.finished_run as records, sys\n"
        "from pathlib import Path\n"
        "records.check_sums = lambda *a: None\n"
        "records.checked_bytes = lambda path: path.read_bytes()\n"
        "names = {'a finished run\\'s file damaged': chaos.FAULTS['a finished run\\'s file damaged']}\n"
        "chaos.FAULTS = names\n"
        "counts = chaos.chaos(6, 0, Path(sys.argv[1]))\n"
        "sys.exit(int(all(verdict == 'survived' for _, _, verdict in counts)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"tests{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", broken, str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_killed_workflow_leaves_no_lock_and_no_orphan(tmp_path):
    """Snakemake is killed while it collects; the same command then just works."""
    grid = chaos_workflow.two_runs(chaos.Sources(tmp_path).parameters)
    folder = checkout(tmp_path / "checkout", chaos=grid)
    (run, *_) = chaos_workflow.load_grid(folder / "params" / "chaos.yaml").runs()
    target = f"activations/{run.store_id}/baseline.json"
    first = chaos_workflow.snakemake(folder, target)
    while not any("collect" in command for command in chaos_workflow.processes(folder).values()):
        assert first.poll() is None, (folder / "log.txt").read_text()[-2000:]
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert chaos_workflow.orphans(folder) == []
    assert list((folder / ".snakemake" / "locks").iterdir())  # what it would take a human to clear
    assert chaos_workflow.snakemake(folder, target).wait() == 0, (folder / "log.txt").read_text()[-2000:]
    assert json.loads((folder / target).read_text())["prompts"]


def test_a_command_ends_with_its_parent():
    sleeper = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-m', 'saegrid.storage.processes', 'sleep', '60']).pid)"  # noqa: E501
    code = f"{sleeper}; sys.stdout.flush(); import time; time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 20
    proc = Path(f"/proc/{child}")
    while (proc / "comm").read_text().strip() != "sleep":  # it has tied itself
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while proc.exists() and "Z" not in (proc / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- disks ---


def _limited(limit, task):
    """Run a task in a fork whose files may not grow beyond `limit`."""

    def within():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        task()

    return chaos.run(within)


def test_a_full_file_is_told_with_path_and_bytes_and_the_old_one_stays(tmp_path):
    path = tmp_path / "metrics.json"
    atomic.write_text(path, "old")
    outcome = _limited(1000, lambda: atomic.write_bytes(path, b"x" * 5000))
    assert outcome.code == 2
    assert f"{path}: can't be written: File too large (needs 5,000 bytes" in outcome.line
    assert "the file-size limit is 1,000" in outcome.line
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.write(path, {"a": torch.ones(10)}, {"step": 1})
    outcome = _limited(1000, lambda: checkpoint.write(path, {"a": torch.ones(10_000)}, {"step": 2}))
    assert outcome.code == 2 and "needs 40,000 bytes" in outcome.line
    assert checkpoint.read(path)[1] == {"step": 1}


@pytest.mark.skipif(not chaos.can_mount(), reason="this process may not mount a file system")
@pytest.mark.parametrize("full", [True, False])
def test_a_full_and_a_read_only_disk(tmp_path, full):
    with chaos.mounted(tmp_path / "disk", 4):
        if not full:
            subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(DiskError, match="No space left on device" if full else "Read-only file system") as error:
            atomic.write_bytes(tmp_path / "disk" / "a", b"x" * 100_000)
        assert "needs 100,000 bytes" in str(error.value) and "bytes are free" in str(error.value)
        assert list((tmp_path / "disk").iterdir()) == []


# --- recorded hashes ---


def with_each_bit_flipped(path):
    """One after the other, the file with a single bit of it flipped."""
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield


def test_a_sealed_file_is_as_it_was_written_or_refused(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, {"b": [1, 2.5, None], "a": "ü"})
    assert read_sealed(path) == {"b": [1, 2.5, None], "a": "ü"}
    for _ in with_each_bit_flipped(path):
        try:
            assert read_sealed(path) == {"b": [1, 2.5, None], "a": "ü"}  # white space alone
        except DamagedError as error:
            assert str(path) in str(error)


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    tensors, facts = {"weights.a": torch.arange(6.0).reshape(2, 3)}, {"run_id": "r", "plain": {"epoch": 1}}
    checkpoint.write(path, tensors, facts)
    for _ in with_each_bit_flipped(path):
        try:
            again, stated = checkpoint.read(path)
        except DamagedError as error:
            assert str(path) in str(error)
        else:
            assert stated == facts and torch.equal(again["weights.a"], tensors["weights.a"])


def test_a_file_with_a_sum_beside_it(tmp_path):
    path = tmp_path / "a.ipynb"
    path.write_text("{}")
    check_sum(path)  # nothing is recorded
    write_sum(path)
    check_sum(path)
    assert subprocess.run(["sha256sum", "-c", "a.ipynb.sha256"], cwd=tmp_path, check=False).returncode == 0
    for _ in with_each_bit_flipped(path):
        with pytest.raises(DamagedError, match=r"a.ipynb: damaged \(not the SHA-256 in a.ipynb.sha256\)"):
            check_sum(path)


def test_sums_have_the_form_of_sha256sum(tmp_path):
    (tmp_path / "a").write_text("1")
    write_sums(tmp_path, ["a"], {"b": b"2"})
    (tmp_path / "b").write_text("2")
    check_sums(tmp_path, ["a", "b"])
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, check=False).returncode == 0
    (tmp_path / "b").write_text("3")
    with pytest.raises(DamagedError, match=r"b: damaged"):
        check_sums(tmp_path)
