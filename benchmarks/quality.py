"""Equal quality: each architecture trained by the reference kernel in fp32 and by the machine's own, all else the same.

    python benchmarks/quality.py

Same seed, rows, order and number of steps, through `saegrid.run.Run`; `bench.py` puts the result into results.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from saegrid.config import RunConfig, make_config
from saegrid.run import Run, evaluate_rows

CASES = (
    {"arch": "TopK", "k": 64},
    {"arch": "BatchTopK", "k": 64},
    {"arch": "JumpReLU", "threshold": 1.5, "threshold_unit": "rms"},
)
KERNELS = {"reference": {"kernel": "reference", "matmul": "fp32"}, "own": {"kernel": "auto", "matmul": "auto"}}


def compare(base: RunConfig, threads: int, epochs: int = 3, expansion: int = 4) -> list[dict[str, Any]]:
    """One record an architecture: both trainings' metrics and curves, and the ratios own / reference.

    Args:
        base: where the rows come from; its SAE and training parameters are replaced.
    """
    sparsity = {"k", "threshold", "threshold_unit", "arch"}
    shared = base.model_dump(exclude=sparsity) | {"epochs": epochs, "expansion": expansion, "threads": threads}
    records = []
    for case in CASES:
        record: dict[str, Any] = {**case, "expansion": expansion, "epochs": epochs}
        for name, kernel in KERNELS.items():
            with tempfile.TemporaryDirectory() as folder:
                record[name] = train_and_measure(make_config(**shared | case | kernel | {"runs_dir": folder}))
        own, reference = record["own"], record["reference"]
        record["ratios"] = {
            name: own[name] / reference[name] if reference[name] else None for name in ("val_mse", "l0", "dead_pct")
        }
        records.append(record)
        print(f"{case['arch']:9}: own / reference {record['ratios']}", flush=True)
    return records


def train_and_measure(config: RunConfig) -> dict[str, Any]:
    """Validation MSE (act²), L0 (latents a row) and dead share (%) of the run's best epoch, and its learning curve."""
    run = Run(config)
    sae = run.train()
    metrics, _, _ = evaluate_rows(sae, run.store, config.batch_size, run.kernel)
    facts = {"kernel": run.config.kernel, "matmul": run.config.matmul, "train_seconds": run.times["train_seconds"]}
    facts |= {name: metrics[name] for name in ("val_mse", "nmse", "fvu_no_sink", "l0", "dead_pct")}
    facts["curve"] = run.curve[["epoch", "step", "train_mse", "val_mse", "val_l0", "val_dead_pct"]].to_dict("records")
    run.close()
    return facts


if __name__ == "__main__":
    base = make_config(k=64, train_tokens=40_000, val_tokens=10_000, store_dir=str(Path("activations")))
    print(json.dumps(compare(base, threads=0), indent=1))
