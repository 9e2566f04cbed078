"""The published setting at full size, without the Hub: `params/qwen05b.yaml` on stand-ins for what it would bring.

    python benchmarks/rehearse.py                    # `make rehearse`
    python benchmarks/rehearse.py --size small       # the same path in a minute or two, for the tests

Only places are changed: model, dataset and activation files are those of `standin.py`, and everything lies in a folder
of its own. Stopped, it goes on where it was, with the sources of the first call. The real workflow makes the runs of
`RUNS`, from activations to the website. Of every grid point some steps of the real training are timed. A run that is
not made is estimated: as the run of its architecture, whose time for training is multiplied by the ratio of the two
step times, in processor time, which depends less on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import standin
import yaml

from saegrid.config.grid import Grid, load_grid
from saegrid.config.run_config import RunConfig
from saegrid.storage.atomic import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["lib", "benchmarks", "notebooks", "params", "workflow", "_quarto.yml", "references.bib"]
PRESET = "params/qwen05b.yaml"
RUNS = ["TopK_exp4x_k64", "BatchTopK_exp4x_k64", "JumpReLU_exp4x_t0.5"]
"""The quickest run of each architecture."""
STEPS, WARM_UP = 40, 10
"""Training steps of each grid point, and how many of the first are not timed."""
LAPTOP_GB = 12.0
"""What a laptop with 16 GB of memory has free."""
LOG = "log.txt"
INTERVAL, REPORT = 0.25, 60
"""Seconds between two samples of the memory, and between two reports of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--rows", type=int, default=0, help="training rows; validation has a quarter of them")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "rehearsal", help="where all of it lies")
    parser.add_argument(
        "--output", type=Path, help="default: results/rehearsal.json, or in the folder if not at full size"
    )
    parser.add_argument("--time-steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = {"full": standin.FULL, "small": standin.SMALL}[options.size]
    if options.rows:
        size = size._replace(train_rows=options.rows, val_rows=options.rows // 4)
    folder = options.folder.resolve() / f"{size.d_in}x{size.train_rows}"
    whole = size == standin.FULL and not options.epochs
    rehearsal = Rehearsal(folder, size, options.epochs)
    if options.time_steps:
        rehearsal.time_steps()
        return
    found = rehearsal.result()
    write_json(options.output or (ROOT / "results/rehearsal.json" if whole else folder / "rehearsal.json"), found)
    print("\n".join([*told(found), preset_row(found)]), flush=True)


class Rehearsal:
    """A work folder, and what has been measured in it: `measured.json`, kept between calls."""

    def __init__(self, folder: Path, size: standin.Size, epochs: int):
        self.folder, self.size, self.epochs = folder, size, epochs
        self.measured, self.step_times = folder / "measured.json", folder / "steps.json"
        self.grid_file, self.part_file = folder / "qwen05b.yaml", folder / "part.yaml"

    def prepare(self) -> None:
        """Write the stand-in, the sources, and the preset with other places, in full and for the runs that are made."""
        self.folder.mkdir(parents=True, exist_ok=True)
        places = standin.make(self.folder, self.size)
        for name in [*SOURCES, *(path.name for path in ROOT.glob("*.qmd"))]:
            if (self.folder / name).exists():  # one version from the first call to the last
                continue
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.folder / name)
        preset = yaml.safe_load((ROOT / PRESET).read_text(encoding="utf-8"))
        preset["constants"] |= places | ({"epochs": self.epochs} if self.epochs else {})
        write_if_changed(self.grid_file, yaml.safe_dump(preset))
        axes = ("arch", "expansion", "k", "threshold")
        chosen = sorted((run for run in self.grid.runs() if run.name in RUNS), key=lambda run: RUNS.index(run.name))
        wanted = [run.model_dump(include=set(axes)) for run in chosen]
        preset["axes"] = [{name: [value] for name, value in run.items() if value} for run in wanted]
        write_if_changed(self.part_file, yaml.safe_dump(preset))

    @property
    def grid(self) -> Grid:
        return load_grid(self.grid_file)

    @property
    def records(self) -> dict[str, Any]:
        return read(self.measured)

    def result(self) -> dict[str, Any]:
        """Make and measure all that is missing."""
        self.prepare()
        store, place = self.grid.runs()[0].store_id, str(self.folder.parent)
        self.stage("activations", *self.snakemake(f"activations/{store}/baseline.json"))
        self.stage("step times", sys.executable, __file__, *sys.argv[1:], "--folder", place, "--time-steps")
        self.stage("pca", *self.snakemake(f"activations/{store}/pca.json"))
        for run in load_grid(self.part_file).runs():
            self.stage(run.name, *self.snakemake(f"runs/{run.run_id}/metrics.json"))
        self.stage("report", *self.snakemake("all"))
        self.stage("release", sys.executable, "-m", "saegrid", "publish", self.part_file.name, "--dry-run")
        return summary(self)

    def snakemake(self, target: str) -> list[str]:
        command = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", "all", "--quiet", "rules"]
        return [*command, "--config", f"grid={self.part_file.name}", "--", target]

    def stage(self, name: str, *command: str) -> None:
        """Run a command in the work folder, unless it succeeded before; adds up its time, keeps its peak memory."""
        before = self.records.get(name, {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0, "done": False})
        if before["done"]:
            return
        say(f"{name} begins")
        environment = os.environ | {"PYTHONPATH": str(self.folder / "lib"), "OMP_WAIT_POLICY": "PASSIVE"}
        environment |= {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

        def keep(seconds: float, cpu: float, peak: int, done: bool = False) -> None:
            found = {"seconds": before["seconds"] + seconds, "cpu_seconds": before["cpu_seconds"] + cpu}
            found |= {"peak_bytes": max(before["peak_bytes"], peak), "done": done}
            write_json(self.measured, self.records | {name: found})
            say(f"{name}: {found['seconds']:.0f} s, {peak / 1e9:.1f} GB{', done' if done else ''}")

        if code := watched(command, self.folder, environment, keep):
            sys.exit(f"{name}: ended with {code}, {self.folder / LOG} says why; the same command goes on from here")

    def time_steps(self) -> None:
        """Milliseconds per training step of every grid point, in the real loop on the real rows."""
        from saegrid import kernels
        from saegrid.config.run_config import make_config
        from saegrid.experiment.run import prepare_store

        for run in self.grid.runs():
            known = read(self.step_times)
            if run.run_id in known:
                continue
            run = make_config(**run.model_dump() | {"store_dir": str(self.folder / run.store_dir)})
            choice = kernels.choose(run.kernel, run.matmul, run.threads, "cpu")
            resolved = make_config(**run.model_dump() | choice._asdict())
            kernels.set_threads(resolved.threads)
            step = timed_steps(resolved, prepare_store(resolved))
            say(f"{run.name}: {step['ms']:.1f} ms a step, {step['cpu_ms']:.1f} of processors")
            write_json(self.step_times, known | {run.run_id: step})


class Enough(Exception):
    """Raised when all steps to be timed are done."""


def timed_steps(config: RunConfig, store: Any) -> dict[str, float]:
    """Median milliseconds between two steps of a run's own training, in wall-clock and in processor time."""
    from saegrid import kernels
    from saegrid.core.train import train

    times: list[tuple[float, float]] = []

    def report(rows: int) -> None:
        times.append((time.perf_counter(), time.process_time()))
        if len(times) > STEPS:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        train(config, store, kernels.load(config.kernel), Path(folder), config.matmul, report)
    late = times[min(WARM_UP, len(times) // 2) :]
    gaps = [[after - before for before, after in itertools.pairwise(clock)] for clock in zip(*late, strict=True)]
    return {name: 1e3 * median(own) for name, own in zip(("ms", "cpu_ms"), gaps, strict=True)}


def watched(command: list[str], folder: Path, environment: dict[str, str], keep: Callable[..., None]) -> int:
    """Run a command and append its output to a log. `keep` gets its seconds, processor seconds and the peak memory of
    its processes together: from time to time, so that little is lost, and at the end."""
    started, cpu, peak, looks = time.perf_counter(), _children_seconds(), 0, 0
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak, looks = max(peak, memory(tree)), looks + 1
            if looks % round(REPORT / INTERVAL) == 0:
                keep(time.perf_counter() - started, 0.0, peak)
            time.sleep(INTERVAL)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        keep(time.perf_counter() - started, _children_seconds() - cpu, peak, process.returncode == 0)
    return process.returncode


def memory(process: psutil.Process) -> int:
    """Resident bytes of a process and all its descendants."""
    total = 0
    try:
        tree = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for part in tree:
        try:
            total += part.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def summary(rehearsal: Rehearsal) -> dict[str, Any]:
    """What was measured, and what follows for the whole grid."""
    records, folder, runs = rehearsal.records, rehearsal.folder, rehearsal.grid.runs()
    times = read(rehearsal.step_times)
    steps = runs[0].epochs * math.ceil(rehearsal.size.train_rows / runs[0].batch_size)
    made = {run.arch: run for run in load_grid(rehearsal.part_file).runs()}
    rows = []
    for run in runs:
        like = made[run.arch]
        ratio = times[run.run_id]["cpu_ms"] / times[like.run_id]["cpu_ms"]
        row = run_row(run, like, records[like.name], folder / "runs" / like.run_id, ratio)
        rows.append(row | {"step_ms": times[run.run_id]["ms"], "step_processor_ms": times[run.run_id]["cpu_ms"]})
    shared = [stage_row(name, records[name]) for name in ("activations", "pca", "report", "release")]
    largest = records["step times"]["peak_bytes"] / 1e9  # the largest dictionary's training is among them
    disk = {name: bytes_of(folder / name) / 1e9 for name in ("model", "published", "activations")}
    everything = [*rows, *shared]
    totals = {
        **{f"{name}hours": sum(row[f"{name}minutes"] for row in everything) / 60 for name in ("", "processor_")},
        "peak_gb": max(largest, *(row["peak_gb"] for row in everything if row["peak_gb"])),
        "disk_gb": sum(row["disk_gb"] for row in rows) + sum(disk.values()),
    }
    version = read(folder / "runs" / next(iter(made.values())).run_id / "metrics.json")["code_version"]
    facts = {"machine": machine(), "code_version": version, "stand_in": str(rehearsal.size), "steps": steps}
    return {**facts, "shared": shared, "runs": rows, "disk_gb": disk, "grid": {"runs": len(rows), **totals}}


def stage_row(name: str, record: dict[str, Any]) -> dict[str, Any]:
    minutes = {"minutes": record["seconds"] / 60, "processor_minutes": record["cpu_seconds"] / 60}
    return {"name": name, **minutes, "peak_gb": record["peak_bytes"] / 1e9}


def run_row(run: RunConfig, like: RunConfig, record: dict[str, Any], folder: Path, ratio: float) -> dict[str, Any]:
    """A run's time, memory and disk: measured, or estimated from `like`, the run of its architecture that was made.

    Args:
        record: what making `like` took.
        folder: of `like`.
        ratio: of the run's step time to that of `like`.
    """
    row, measured = stage_row(run.name, record), run.run_id == like.run_id
    share = read(folder / "timing.json")["train_seconds"] / record["seconds"]
    for name in ("minutes", "processor_minutes"):
        row[name] *= 1 + share * (ratio - 1)
    row |= {"measured": measured, "peak_gb": row["peak_gb"] if measured else None}
    return row | {"disk_gb": bytes_of(folder) / 1e9 * run.expansion / like.expansion}


def machine() -> dict[str, Any]:
    from saegrid.experiment.run import processor

    memory_gb = round(psutil.virtual_memory().total / 1e9, 1)
    return {"processor": processor(), "cores": os.cpu_count(), "memory_gb": memory_gb}


def told(found: dict[str, Any]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"{found['machine']['processor']}, {found['machine']['cores']} cores; {found['stand_in']}"]
    for row in [*found["shared"], *found["runs"]]:
        parts = [f"{row['name']:24} {row['minutes']:7.1f} min, {row['processor_minutes']:7.1f} of processors"]
        parts += [f"{row['peak_gb']:.1f} GB of memory"] if row["peak_gb"] else ["estimated"]
        if "step_ms" in row:
            parts += [f"{row['step_ms']:.1f} ms a step", f"{row['disk_gb']:.2f} GB of disk"]
        lines.append(", ".join(parts))
    whole = found["grid"]
    lines.append(
        f"the grid, {whole['runs']} runs: {whole['hours']:.1f} hours, {whole['processor_hours']:.1f} of processors"
    )
    return [*lines, f"at most {whole['peak_gb']:.1f} GB of memory, {whole['disk_gb']:.1f} GB of disk"]


def preset_row(found: dict[str, Any]) -> str:
    """The preset's row in README; a test checks it against results/rehearsal.json."""
    grid, made = found["grid"], sum(row["measured"] for row in found["runs"])
    what = f"{grid['runs']} runs: the published setting on the published activation files (needs the Hub)"
    cores = found["machine"]["cores"]
    alone = f"at least {grid['processor_hours'] / cores:.1f} hours on {cores} cores"
    took = f"{grid['processor_hours']:.1f} processor hours, so {alone}"
    space = f"{grid['peak_gb']:.1f} GB of memory, {grid['disk_gb']:.1f} GB of disk"
    if grid["peak_gb"] < LAPTOP_GB:
        laptop = "a laptop with 16 GB needs no change"
    else:
        laptop = "a laptop with 16 GB needs `lm_dtype: bfloat16`"
    return (
        f"| `qwen05b` | {what} | {took}; {space}: {laptop} (`make rehearse`: {made} runs made, the others estimated) |"
    )


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def write_if_changed(path: Path, text: str) -> None:
    """Write a file only if its text changes, so that Snakemake sees an unchanged one as such."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


if __name__ == "__main__":
    main()
