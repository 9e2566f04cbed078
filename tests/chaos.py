"""Fault runs: `python tests/chaos.py [--faults 200] [--seed 0]`, or `make chaos`.

Small but complete runs on a tiny language model: collection, baseline, training, evaluation, saving. Each fault hits a
run (or its store) at a seeded point. The same run is then started again, as a user would, and must end with the bytes
of an undisturbed run. A fault is *survived* if it does; *lost* if the run can't be finished, or needs more than its
printed line said; *wrong* if it ends with other bytes, or if a table accepted damaged numbers.

Runs are forked from this process, which has imported everything; SIGKILL affects them like any other process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tiny import finished, save_dataset, save_model
from tqdm.auto import tqdm

from saegrid.config import run_config
from saegrid.config.grid import Grid
from saegrid.config.run_config import RunConfig, make_config
from saegrid.data import stream
from saegrid.errors import SaegridError
from saegrid.experiment import finished_run, results
from saegrid.experiment.mend import mend

DEADLINE = 120
"""Seconds after which a run counts as hanging."""
PHASES = ["collect", "baseline", "train", "evaluate", "save", "done", "runs", "rendering"]
NOT_COMPARED = {"timing.json", "train.ipynb", ".lock", ".baseline.lock"}
"""Timing and lock files."""
SMALL = {"layer": 1, "max_tokens": 64, "train_tokens": 1200, "val_tokens": 300, "eval_prompts": 6, "epochs": 3}
SMALL |= {"batch_size": 64, "checkpoint_steps": 7, "threads": 1, "kernel": "reference", "expansion": 4}


@dataclass
class Outcome:
    """How a process ended: its exit code (-9: killed), and what it printed last."""

    code: int
    line: str


class Sources:
    """A tiny model, a small dataset, and parameters of a run on them."""

    def __init__(self, root: Path):
        self.root = root
        sources = {"model": save_model(root / "model"), "dataset": save_dataset(root / "data", train=60, test=20)}
        self.parameters = {**SMALL, **sources, "arch": "BatchTopK", "k": 3}
        torch.set_num_threads(1)


class Bench(Sources):
    """The sources, the undisturbed result, and another run's files to swap in."""

    def __init__(self, root: Path, **changes: str | int):
        super().__init__(root)
        self.parameters |= changes
        self.other = {**self.parameters, "seed": 1, "data_seed": 1}
        finished(self.config(root / "warm"))  # imports and compiles everything before the first fork
        for name, parameters in (("whole", self.parameters), ("other", self.other)):
            outcome = run(lambda parameters=parameters, name=name: finished(self.config(root / name, parameters)))
            assert outcome.code == 0, outcome.line
        self.files = contents(root / "whole")
        started = time.perf_counter()
        self.operations = _count_operations(lambda: finished(self.config(root / "counted")), root / "counted")
        self.seconds = time.perf_counter() - started

    @functools.cached_property
    def streamed(self) -> Bench:
        """The same for a run whose training rows are streamed."""
        run_config.SAMPLE_ROWS, stream.PART_ROWS = 400, 150  # fewer than the run's rows
        (self.root / "streamed").mkdir()
        return Bench(self.root / "streamed", rows="streamed", shuffle_rows=256, epochs=1)

    def config(self, place: Path, parameters: dict | None = None) -> RunConfig:
        places = {"runs_dir": f"{place}/runs", "store_dir": f"{place}/activations"}
        return make_config(**(parameters or self.parameters) | places)

    def grid(self, place: Path) -> Grid:
        config = self.config(place)
        changed = {name: value for name, value in config.model_dump(exclude_defaults=True).items() if name != "k"}
        return Grid(
            name="chaos", title="Chaos", results_dir=str(place / "tables"), constants=changed, axes=[{"k": [3]}]
        )

    def finish(self, place: Path) -> str:
        """Start the run again, as a user would. Returns "survived", or what went wrong."""
        outcome = run(lambda: finished(self.config(place)))
        if outcome.code == 2:  # refused: do what the line says, then try again
            mend(self.grid(place))
            outcome = run(lambda: finished(self.config(place)))
        if outcome.code != 0:
            return f"lost: {outcome.code} {outcome.line}"
        return self.compare(place)

    def compare(self, place: Path) -> str:
        now = contents(place)
        differing = sorted(name for name in now.keys() | self.files.keys() if now.get(name) != self.files.get(name))
        return f"wrong: {', '.join(differing)}" if differing else "survived"

    def phase(self, place: Path) -> str:
        """How far a run has come, judged by its files."""
        config = self.config(place)
        store, folder = place / "activations" / config.store_id, place / "runs" / config.run_id
        if not (store / "manifest.json").exists():
            return "collect"
        if not (store / "baseline.json").exists():
            return "baseline"
        if (folder / "metrics.json").exists():
            return "done"
        if list(folder.glob("*.pt")):
            return "save"
        epochs = folder / "metrics.jsonl"
        finished = epochs.exists() and len(epochs.read_text().splitlines()) == config.epochs
        return "evaluate" if finished else "train"


# --- processes ---


def start(task: Callable[[], None]) -> tuple[int, int]:
    """Fork a process for a task. Returns (pid, file descriptor of what it prints)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    os.close(reading)
    os.dup2(writing, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    tqdm.set_lock(threading.RLock())  # its own semaphore is shared by all forks, and a killed one may hold it
    code = 3
    try:
        task()
        code = 0
    except SaegridError as error:
        code = 2
        os.write(1, f"{error}\n".encode())
    except BaseException:
        os.write(1, (" | ".join(traceback.format_exc().strip().splitlines()[-6:]) + "\n").encode())
    finally:
        os._exit(code)


def ended(process: tuple[int, int]) -> Outcome:
    pid, reading = process
    deadline = time.monotonic() + DEADLINE
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reading)
            return Outcome(-1, f"hung for {DEADLINE} s")
        time.sleep(0.005)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().decode(errors="replace").strip().splitlines()
    return Outcome(os.waitstatus_to_exitcode(status), lines[-1] if lines else "")


def run(task: Callable[[], None]) -> Outcome:
    return ended(start(task))


def _on_operation(place: Path, act: Callable[[int], None]) -> None:
    """Call `act` with 1, 2, 3, … before each file operation under `place`, in this process."""
    count, inside = 0, os.fspath(place)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod") and arguments:
            with contextlib.suppress(TypeError):
                if os.fsdecode(arguments[0]).startswith(inside):
                    count += 1
                    act(count)

    sys.addaudithook(hook)


def _count_operations(task: Callable[[], None], place: Path) -> int:
    last = [0]

    def counted() -> None:
        _on_operation(place, lambda count: last.__setitem__(0, count))
        task()
        print(last[0], flush=True)

    return int(run(counted).line)


def contents(place: Path) -> dict[str, bytes]:
    """All files of a place except times and locks; files that a killed writer left count, too."""
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED and not path.name.endswith(".lock")
    }


# --- faults: each acts in `place` and returns the phase that it hit and the result ---


def kill_at_operation(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """SIGKILL before a random file operation; sometimes the resumed run is killed, too."""
    phase = ""
    for _ in range(1 + (dice.random() < 0.25)):
        strike = dice.randint(1, bench.operations)

        def task(strike: int = strike) -> None:
            _on_operation(place, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == strike else None)
            finished(bench.config(place))

        run(task)
        phase = phase or bench.phase(place)
    return phase, bench.finish(place)


def kill_at_time(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    process = start(lambda: finished(bench.config(place)))
    time.sleep(dice.uniform(0, 0.7 * bench.seconds))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process[0], signal.SIGKILL)
    ended(process)
    return bench.phase(place), bench.finish(place)


def kill_streamed(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """SIGKILL of a run whose rows are streamed, after its first checkpoint; sometimes the resumed run, too."""
    bench = bench.streamed
    _given_store(bench, place, dice)
    for _ in range(1 + (dice.random() < 0.25)):
        _kill_in_training(bench.config(place), dice, within=15)
    return bench.phase(place), bench.finish(place)


def twins(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """The same run twice at once; sometimes one of them is killed."""
    first = start(lambda: finished(bench.config(place)))
    time.sleep(dice.uniform(0, bench.seconds / 2))
    second = start(lambda: finished(bench.config(place)))
    phase, killed = bench.phase(place), dice.random() < 0.4
    if killed:
        time.sleep(dice.uniform(0, bench.seconds / 2))
        with contextlib.suppress(ProcessLookupError):
            os.kill(first[0], signal.SIGKILL)
    outcomes = [ended(first), ended(second)]
    for outcome in outcomes[killed:]:
        if outcome.code != 0:
            return phase, f"lost: {outcome.code} {outcome.line}"
    return phase, bench.compare(place)


def file_size_limit(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """No file may grow beyond a random size."""
    given = _given_store(bench, place, dice)
    sizes = [len(content) for name, content in bench.files.items() if not given or name.startswith("runs/")]
    limit = int(max(sizes) * dice.uniform(0, 1))

    def task() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        finished(bench.config(place))

    outcome = run(task)
    return bench.phase(place), _told(outcome, place) or bench.finish(place)


def full_disk(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """A disk of random size, which is enlarged later."""
    stored = sum(len(content) for name, content in bench.files.items() if name.startswith("activations/"))
    with mounted(place, 4096):
        given = _given_store(bench, place, dice)
        used = shutil.disk_usage(place).used
        size = used + 150_000 * dice.random() if given else stored * dice.uniform(0.05, 1)
        subprocess.run(["mount", "-o", f"remount,size={int(size) // 4096 * 4096 + 4096}", place], check=True)
        outcome = run(lambda: finished(bench.config(place)))
        phase, told = bench.phase(place), _told(outcome, place)
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        return phase, told or bench.finish(place)


def read_only(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """The disk turns read-only after a random part of the run."""
    with mounted(place, 16384):
        process = start(lambda: finished(bench.config(place)))
        time.sleep(dice.uniform(0, 0.7 * bench.seconds))
        os.kill(process[0], signal.SIGKILL)
        ended(process)
        phase = bench.phase(place)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        outcome = run(lambda: finished(bench.config(place)))
        told = "" if phase == "done" and outcome.code == 0 else _told(outcome, place)
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
        return phase, told or bench.finish(place)


def _given_store(bench: Bench, place: Path, dice: random.Random) -> bool:
    """The store usually exists already, so that the fault hits a later phase."""
    if given := dice.random() < 0.7:
        shutil.copytree(bench.root / "whole" / "activations", place / "activations")
    return given


def _kill_in_training(config: RunConfig, dice: random.Random, within: int = 40) -> None:
    """SIGKILL a run before one of its folder's file operations that follow the first checkpoint."""
    folder, saves = Path(config.runs_dir) / config.run_id, [dice.randint(2, within)]

    def task() -> None:
        def act(count: int) -> None:
            saves[0] -= (folder / "checkpoint.safetensors").exists()
            if not saves[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        _on_operation(folder, act)
        finished(config)

    run(task)


def _told(outcome: Outcome, place: Path) -> str:
    """ "" if a disk fault was reported correctly, by exit code, path and bytes; else what was reported."""
    told = outcome.code == 2 and all(part in outcome.line for part in (f"{place}/", "can't be written", " bytes"))
    return "" if told or outcome.code == 0 else f"lost: {outcome.code} {outcome.line}"


@contextlib.contextmanager
def mounted(place: Path, pages: int) -> Iterator[None]:
    """A separate file system of `pages` pages of 4,096 bytes in a folder."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4096 * pages}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def spoil(path: Path, other: Path, dice: random.Random) -> str:
    """Truncate a file, flip one of its bits, or replace it with another run's."""
    content = path.read_bytes()
    how = dice.choice(["cut", "flip", "swap"] if other.exists() else ["cut", "flip"])
    if how == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif how == "flip":
        bit = dice.randrange(8 * len(content))
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
    else:
        shutil.copyfile(other, path)
    return how


def spoiled_run(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """One file of a finished run is damaged: no table may accept it, and the run must be made again."""
    shutil.copytree(bench.root / "whole", place)
    config = bench.config(place)
    folder, reference = place / "runs" / config.run_id, bench.root / "whole" / "runs" / config.run_id
    (elsewhere,) = (bench.root / "other" / "runs").iterdir()
    name = dice.choice(sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "train.ipynb")))
    twin = next(iter(elsewhere.glob("*.pt"))) if name.endswith(".pt") else elsewhere / name
    how = spoil(folder / name, twin, dice)
    with contextlib.suppress(SaegridError):
        if _tables(config.run_id, place / "runs") != _tables(config.run_id, reference.parent) and name != "timing.json":
            return "done", f"wrong: a table took {name} ({how})"
    return "done", bench.finish(place)


def _tables(run_id: str, runs_dir: Path) -> list[str]:
    df = results.tidy([run_id], runs_dir)
    loaders = (
        finished_run.load_prompts,
        finished_run.load_latents,
        finished_run.load_positions,
        finished_run.load_curves,
    )
    return [
        df.to_csv(),
        *(load(df, runs_dir).to_csv() for load in loaders),
        str(finished_run.load_timing(df, runs_dir)),
    ]


def spoiled_store(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """One file of the store or its `baseline.json` is damaged before a run begins."""
    shutil.copytree(bench.root / "whole" / "activations", place / "activations")
    store = place / "activations" / bench.config(place).store_id
    (elsewhere,) = (path for path in (bench.root / "other" / "activations").iterdir() if path.is_dir())
    name = dice.choice(sorted(p.name for p in store.iterdir() if p.suffix != ".lock" and p.name != "timing.json"))
    spoil(store / name, elsewhere / name, dice)
    return "train", bench.finish(place)


def spoiled_checkpoint(bench: Bench, place: Path, dice: random.Random) -> tuple[str, str]:
    """The run is killed during training, and its checkpoint (or what it computes with) is damaged."""
    config = bench.config(place)
    folder = place / "runs" / config.run_id
    shutil.copytree(bench.root / "whole" / "activations", place / "activations")
    _kill_in_training(config, dice)
    phase = bench.phase(place)
    there = [name for name in ("checkpoint.safetensors", "config.json", "metrics.jsonl") if (folder / name).exists()]
    if there:
        name = dice.choice(there)
        (elsewhere,) = (bench.root / "other" / "runs").iterdir()
        spoil(folder / name, elsewhere / name, dice)
    return phase, bench.finish(place)


FAULTS = {
    "kill ahead of a file operation": (kill_at_operation, 28),
    "a streamed run killed": (kill_streamed, 6),
    "kill at a random time": (kill_at_time, 20),
    "twins": (twins, 8),
    "file-size limit": (file_size_limit, 8),
    "full disk": (full_disk, 8),
    "disk turns read-only": (read_only, 5),
    "a finished run's file damaged": (spoiled_run, 9),
    "a store's file damaged": (spoiled_store, 5),
    "a checkpoint damaged": (spoiled_checkpoint, 3),
}
"""Fault: function and share in percent."""
MOUNTS = ("full disk", "disk turns read-only")


def plan(faults: int, dice: random.Random) -> list[str]:
    """That many faults in their shares, at least one of each, in random order."""
    names = [name for name in FAULTS if name not in MOUNTS or can_mount()]
    for name in FAULTS.keys() - set(names):
        print(f"skipped: {name}: this process may not mount a file system")
    shares = {name: FAULTS[name][1] for name in names}
    planned = [name for name in names for _ in range(max(1, faults * shares[name] // sum(shares.values())))]
    planned += dice.choices(names, list(shares.values()), k=max(0, faults - len(planned)))
    dice.shuffle(planned)
    return planned


def chaos(faults: int, seed: int, root: Path) -> collections.Counter:
    """Inject faults. Returns counts by (fault, phase, "survived" | "lost" | "wrong"); prints those not survived."""
    dice = random.Random(seed)
    root.mkdir(exist_ok=True)
    bench = Bench(root)
    counts: collections.Counter = collections.Counter()
    for number, name in enumerate(plan(faults, dice)):
        own = random.Random(f"{seed} {number}")
        place = root / f"{number:03d}"
        phase, verdict = FAULTS[name][0](bench, place, own)
        counts[name, phase, verdict.split(":")[0]] += 1
        if verdict != "survived":
            print(f"fault {number} ({name}, {phase}): {verdict}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return counts


def table(counts: collections.Counter) -> str:
    lines = ["| fault | phase | injected | survived | lost | wrong |", "|---|---|---|---|---|---|"]
    cells = sorted({(name, phase) for name, phase, _ in counts}, key=lambda c: (c[0], PHASES.index(c[1])))
    rows = [(*cell, [counts[(*cell, verdict)] for verdict in ("survived", "lost", "wrong")]) for cell in cells]
    rows.append(("all", "", [sum(row[2][i] for row in rows) for i in range(3)]))
    lines += [f"| {name} | {phase} | {sum(n)} | {n[0]} | {n[1]} | {n[2]} |" for name, phase, n in rows]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--workflow", type=int, default=8, help="how many of the faults strike the whole workflow")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder).resolve()
        counts = collections.Counter()
        if options.workflow:
            import chaos_workflow

            (root / "workflow").mkdir()
            counts += chaos_workflow.run(options.workflow, options.seed, root / "workflow")
        counts += chaos(max(0, options.faults - sum(counts.values())), options.seed, root / "runs")
    print(table(counts))
    print(f"seed {options.seed}, {sum(counts.values())} faults, {time.perf_counter() - started:.0f} s")
    return int(any(verdict != "survived" for _, _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
