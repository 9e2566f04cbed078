"""Fault runs of the whole workflow: SIGKILL of Snakemake, of papermill, of a notebook's kernel or of a command.

The workflow of one checkout with a tiny grid is killed repeatedly. Then the same command must finish it with the bytes
of undisturbed runs and without clearing a lock by hand, and no process may outlive a dead workflow.
"""

from __future__ import annotations

import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chaos
from processes import checkout

from saegrid.config.grid import load_grid
from saegrid.config.run_config import make_config

VICTIMS = {"snakemake": "snakemake", "papermill": "papermill", "kernel": "ipykernel_launcher"}
ORPHAN_SECONDS = 30.0
"""A child of a killed workflow must have ended by then."""


def two_runs(parameters: dict) -> dict:
    """A grid of two tiny runs."""
    constants = {name: value for name, value in parameters.items() if name not in ("arch", "k")}
    axes = [{"arch": ["BatchTopK", "TopK"], "k": [3]}]
    return {"name": "chaos", "title": "Chaos", "constants": constants, "axes": axes}


def snakemake(folder: Path, *targets: str) -> subprocess.Popen:
    """What `make report` runs, in its own session."""
    command = [sys.executable, "-m", "snakemake", *targets, "-s", "workflow/Snakefile", "--cores", "2"]
    command += ["--rerun-incomplete", "--quiet", "rules", "--config", "grid=params/chaos.yaml"]
    bin_dir = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": bin_dir, "PYTHONPATH": str(folder / "lib"), "SAEGRID_CHAOS": str(folder)}
    out = open(folder / "log.txt", "ab")  # noqa: SIM115
    return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment, start_new_session=True)


def processes(folder: Path) -> dict[int, str]:
    """{pid: command line} of all processes of a checkout, found by its workflow's environment variable."""
    found, mark = {}, f"SAEGRID_CHAOS={folder}\0".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended or is another user's
            continue
    return {pid: command for pid, command in found.items() if command}


def _make_work(folder: Path, rendering: bool, dice: random.Random) -> None:
    """If an earlier call finished before it was killed, delete a part of its output."""
    if rendering:
        for name in ("report", "_site"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif (folder / "results_tidy.csv").exists():
        lost = [*(folder / "runs").iterdir(), folder / "activations"]
        shutil.rmtree(dice.choice(lost))
        (folder / "results_tidy.csv").unlink()


def strike(folder: Path, process: subprocess.Popen, victim: str, delay: float) -> str:
    """Kill a process of kind `victim`, `delay` seconds after the first one appears. Returns what it was, or ""."""
    seen = None
    while process.poll() is None:
        there = [pid for pid, command in processes(folder).items() if VICTIMS[victim] in command]
        if there and seen is None:
            seen = time.monotonic()
        if there and time.monotonic() - seen >= delay:
            os.kill(process.pid if victim == "snakemake" else max(there), signal.SIGKILL)
            return victim
        time.sleep(0.05)
    return ""


def orphans(folder: Path) -> list[str]:
    """Processes of a killed workflow's checkout that still run after `ORPHAN_SECONDS`."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return list(left.values())


def run(kills: int, seed: int, root: Path) -> collections.Counter:
    """Counts by (fault, phase, verdict), as in `chaos.chaos`."""
    dice = random.Random(seed)
    bench = chaos.Sources(root)
    folder = checkout(root / "checkout", chaos=two_runs(bench.parameters))
    struck: list[str] = []
    faults: list[str] = []
    for number in range(kills):
        rendering = number >= kills - max(1, kills // 4)
        _make_work(folder, rendering, dice)
        process = snakemake(folder, *([] if rendering else ["results_tidy.csv"]))
        victim = strike(folder, process, dice.choice(list(VICTIMS)), dice.uniform(0.5, 8))
        if victim == "snakemake" and (left := orphans(folder)):
            faults.append(f"lost: orphans {left}")
        process.wait()
        if victim:
            struck.append((victim, "rendering" if rendering else "runs"))
    code = snakemake(folder).wait()
    verdict = faults[0] if faults else "survived"
    if code:
        verdict = f"lost: exit code {code}: {(folder / 'log.txt').read_text()[-1500:]}"
    else:
        verdict = compare(bench, folder) or verdict
    if verdict != "survived":
        print(f"workflow: {verdict}", flush=True)
    counts: collections.Counter = collections.Counter()
    for victim, phase in struck:
        counts[f"workflow: kill of {victim}", phase, verdict.split(":")[0]] += 1
    return counts


def compare(bench: chaos.Sources, folder: Path) -> str:
    """ "" if every run has the bytes of an uninterrupted one, else what differs."""
    for config in load_grid(folder / "params" / "chaos.yaml").runs():
        place = bench.root / "single" / config.run_id
        places = {"runs_dir": f"{place}/runs", "store_dir": f"{place}/activations"}
        alone = make_config(**config.model_dump() | places)
        outcome = chaos.run(lambda alone=alone: chaos.finished(alone))
        if outcome.code:
            return f"lost: {outcome.line}"
        expected, found = chaos.contents(place / "runs"), chaos.contents(folder / "runs")
        for name, content in expected.items():
            if found.get(name) != content:
                return f"wrong: {name}"
    return ""
