"""Training time of a whole grid, with the reference kernel and this machine's fast one, from some steps per run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ours import RULES
from prepare import Shape, trained

from saegrid.config.grid import load_grid
from saegrid.core.sae import initial_sae
from saegrid.core.thresholds import rms_pre_acts

if TYPE_CHECKING:
    from bench import Bench

TRAIN_STEPS = 50
SETTINGS = ("reference", "auto")


def measure(bench: Bench, grid_file: Path, quick: bool = False) -> dict[str, Any]:
    """Step times (ms) of every run with a raced architecture on one thread, kernels in turn; hours of all steps.

    quick: one run per architecture.
    """
    runs, planned = [], [run for run in load_grid(grid_file).runs() if run.arch in RULES]
    for run in {run.arch: run for run in planned}.values() if quick else planned:
        shape = Shape(bench.rows.shape[1], run.expansion, run.k, run.batch_size)
        theta = run.threshold
        if run.threshold_unit == "rms":
            start = initial_sae(run, shape.d_in, bench.store.mean)
            theta *= rms_pre_acts(start.params, bench.rows[: run.batch_size])
        state = trained(bench.rows, shape, run.arch, TRAIN_STEPS, theta)
        with bench.inputs(state, bench.rows, shape, run.arch, theta) as common:
            specs = [common | {"contender": "saegrid", "setting": setting, "threads": 1} for setting in SETTINGS]
            records = bench.race(specs)
        steps = run.epochs * math.ceil(run.train_tokens / run.batch_size)
        times = {f"{record['setting']}_ms": record["step_ms"] for record in records}
        runs.append({"name": run.name, "steps": steps, **times})
        print(f"{run.name}: {times}", flush=True)
    hours = {f"{s}_hours": sum(run["steps"] * run[f"{s}_ms"] for run in runs) / 3.6e6 for s in SETTINGS}
    return {"grid": f"params/{grid_file.name}", **hours, "runs": runs}
