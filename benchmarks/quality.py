"""Equal quality: each architecture trained with the reference kernel and with this machine's fast one, all else equal.

    python benchmarks/quality.py

Same seed, rows, order and number of steps, through `saegrid.experiment.run.Run`; `bench.py` puts the result into
results.json.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path
from typing import Any

from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.evaluation import evaluate_rows
from saegrid.experiment.run import Run

CASES = (
    {"arch": "TopK", "k": 64},
    {"arch": "BatchTopK", "k": 64},
    {"arch": "JumpReLU", "threshold": 1.5, "threshold_unit": "rms"},
)
REFERENCE = {"kernel": "reference", "matmul": "fp32"}
OWN = tuple({"kernel": "auto", "matmul": matmul} for matmul in ("fp32", "bf16"))


def compare(base: RunConfig, threads: int, epochs: int = 3, expansion: int = 4) -> list[dict[str, Any]]:
    """One record per architecture: metrics and curves of the reference and of the machine's kernel in both precisions.

    Args:
        base: defines the rows; its SAE and training parameters are replaced.
    """
    sparsity = {"k", "threshold", "threshold_unit", "arch"}
    shared = base.model_dump(exclude=sparsity) | {"epochs": epochs, "expansion": expansion, "threads": threads}
    records = []
    for case in CASES:
        reference, *own = (_trained(shared | case | kernel) for kernel in (REFERENCE, *OWN))
        for training in own:
            training["ratios"] = {
                name: training[name] / reference[name] if reference[name] else None
                for name in ("val_mse", "l0", "dead_pct")
            }
            print(f"{case['arch']:9}: {training['matmul']} / reference {training['ratios']}", flush=True)
        date = str(datetime.date.today())
        records.append(
            {**case, "expansion": expansion, "epochs": epochs, "date": date, "reference": reference, "own": own}
        )
    return records


def _trained(parameters: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return train_and_measure(make_config(**parameters | {"runs_dir": folder}))


def train_and_measure(config: RunConfig) -> dict[str, Any]:
    """Validation MSE (act²), L0 (latents per row) and dead share (%) of the run's best epoch; its learning curve."""
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
