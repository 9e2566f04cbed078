"""Contents of results.json besides the times: units, the machine, what was not measured, exponents."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import numpy as np
import torch
from peers import ARCHITECTURES
from prepare import Shape

from saegrid.experiment.run import code_version, processor

SHAPES = "896x8x220,896x16x64,576x8x128,2048x16x64"
BATCHES = (512, 4096)
ARCHS = ("TopK", "BatchTopK", "JumpReLU")
UNITS = {
    "*_ms": "milliseconds of wall clock, one training step; median, and the quartiles as _low and _high",
    "*_rss_mib": "MiB of resident memory of the contender's process: behind its imports, and at the steps' peak",
    "mse": "mean squared error of the first batch, act²; l0: active latents a row",
    "ratio*": "the peer's median over this project's, of one race; above 1: this project is faster",
    "bandwidth_gb_s": "10⁹ bytes a second, read and written",
    "exponents": "slope of log(step) over log(size), least squares",
}
NO_BF16 = (
    "The peers' bf16 settings on a processor without bf16 instructions ({}): a step of theirs takes seconds there."
)


def machine(threads: int) -> dict[str, Any]:
    """Facts that times depend on. Races of machines with different `name` are kept separately."""
    probes = {"avx512_bf16": "bf16", "amx_tile": "AMX"}
    bf16 = [name for name in probes if getattr(torch.cpu, f"_is_{name}_supported")()]
    instructions = " ".join([torch.backends.cpu.get_cpu_capability(), *(probes[name] for name in bf16)])
    return {
        "name": f"{processor()}, {instructions}, {threads} threads",
        "bf16_instructions": bf16,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "saegrid": code_version()},
    }


def not_measured(machines: list[dict], races: list[dict]) -> list[str]:
    """What was not measured, one line each."""
    without = [found["name"] for found in machines if not found["bf16_instructions"]]
    settings = [NO_BF16.format("; ".join(without))] if without else []
    raced = {"torch", *(race["peer"] for race in races)}
    peers = [f"{peer}: no race yet; `make peers` makes its environment" for peer in ARCHITECTURES if peer not in raced]
    return [*settings, *peers, *unraced(races)]


def unraced(races: list[dict]) -> list[str]:
    """The default shapes not raced yet on any machine, in one line; empty if there are no races at all."""
    known = {tuple(race[name] for name in ("d_in", "expansion", "k", "batch", "arch")) for race in races}
    shapes = [tuple(map(int, shape.split("x"))) for shape in SHAPES.split(",")]
    wanted = [(*shape, batch, arch) for shape in shapes for batch in BATCHES for arch in ARCHS]
    left = [f"{Shape(*key[:4])}, {key[4]}" for key in wanted if key not in known]
    return [f"No race yet at: {'; '.join(left)}."] if races and left else []


def exponent(points: list[dict], name: str) -> float | None:
    """Slope of log(time) over log(size), least squares; None for fewer than two points."""
    known = [(point["size"], point[name]) for point in points if point.get(name)]
    if len(known) < 2:
        return None
    size, time_ms = np.log(np.array(known)).T
    return float(np.polyfit(size, time_ms, 1)[0])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
