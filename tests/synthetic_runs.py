"""Synthetic run folders of the documented form, with numbers from formulas, without training."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from saegrid.config.run_config import EMBEDDED_DATASET, RunConfig
from saegrid.experiment.finished_run import RUN_FILES, TIDY
from saegrid.storage.checksums import write_sealed, write_sums

D_IN = 256
N_TEMPLATES = 12
ONE_PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c4944415408d763f8ffff3f0005fe02fe"
        "dccc59e70000000049454e44ae426082"
    )
).decode()


def synthetic_row(run: RunConfig) -> dict:
    """Plausible metrics from formulas: loss falls with active latents, dead latents rise with dictionary size."""
    l0 = run.k or min(40.0 * run.expansion**0.3 / run.threshold**1.9, 0.45 * D_IN * run.expansion)
    delta = 1.9 * math.exp(-l0 / 90) + 0.02 * run.expansion**0.5 + (0.15 if run.arch == "TopK" else 0.0)
    nmse = 0.02 / l0 * (1.4 if run.arch == "TopK" else 1.0)
    clean, zero, mean = 2.32, 10.8, 7.66
    spliced = clean + delta
    numbers = {
        **{"d_in": D_IN, "d_sae": D_IN * run.expansion, "n_train_rows": 1000, "n_val_rows": 200, "n_eval_prompts": 24},
        **{"n_eval_tokens": 1200, "steps": 20, "best_epoch": 10},
        **{"inference_threshold": 0.7 if run.arch == "BatchTopK" else run.threshold or None},
        **{"theta_over_rms": run.threshold / 1.3 if run.threshold else None},
        **{"val_mse": nmse * 50, "val_mse_batch": nmse * 49, "nmse": nmse, "fvu": nmse * 1.01, "sink_pct": 0.5},
        **{"fvu_no_sink": min(0.9, nmse * 700), "fvu_eval": min(0.9, nmse * 690)},
        **{"l0": float(l0), "l0_eval": l0 * 1.02, "l0_no_sink": l0 * 0.97, "dead_pct_no_sink": 96.0, "kl": 0.8 * delta},
        **{"decoder_coherence": 0.05 + abs(l0 - 128) / 1e4},
        **{"dead_pct": min(95.0, 330 * run.expansion**0.5 / l0 + (3 if run.arch == "TopK" else 0))},
        **{"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_mean": mean, "delta_loss": delta},
        **{"frac_rec_pct": 100 * clean / spliced, "loss_recovered_zero": (zero - spliced) / (zero - clean)},
        **{"loss_recovered_mean": (mean - spliced) / (mean - clean)},
        **{"store_id": run.store_id, "data_sha256": "0a" * 32, "model_sha256": "1b" * 32},
        **{"weights_sha256": hashlib.sha256(run.run_id.encode()).hexdigest()},
        **{"code_version": "0.1.0+synthetic", "torch_version": "2.13.0"},
    }
    sparsity = {"k": run.k or None, "threshold": run.threshold or None}
    row = {"run_id": run.run_id, "name": run.name, **run.identity(), **sparsity, **numbers}
    return {name: row[name] for name in TIDY}


def write_synthetic_run(folder: Path, run: RunConfig) -> None:
    """Write all files of a run folder except the weights."""
    folder.mkdir(parents=True)
    row = synthetic_row(run)
    rng = np.random.default_rng(row["d_sae"] + int(row["l0"]))
    n = row["n_eval_prompts"]
    noise = 0.2 * rng.standard_normal(n)
    tokens = np.full(n, row["n_eval_tokens"] // n)
    first = 0 if row["dataset"] == EMBEDDED_DATASET else N_TEMPLATES  # texts share no template
    prompts = pd.DataFrame({"prompt": range(n), "template": first + np.arange(n) % N_TEMPLATES, "n_tokens": tokens})
    for name in ("clean", "spliced", "zero", "mean"):
        prompts[f"ce_{name}_sum"] = tokens * row[f"ce_{name}"]
    prompts["ce_spliced_sum"] += tokens * (noise - noise.mean())
    prompts["kl_sum"] = tokens * row["kl"] * (1 + noise - noise.mean())
    prompts.to_csv(folder / "prompts.csv", index=False)
    alive = rng.random(row["d_sae"]) >= row["dead_pct"] / 100
    fired = np.where(alive, 1 + rng.geometric(0.03, row["d_sae"]).clip(max=199), 0)
    latents = pd.DataFrame(
        {"latent": range(row["d_sae"]), "fired": fired, "mean_act": alive * 1.0, "max_act": alive * 3.0}
    )
    latents.to_csv(folder / "latents.csv", index=False)
    position = np.arange(60)
    norm = np.where(position == 0, 6e8, 2e4 + 50 * position)
    error = norm * row["nmse"] * 30
    frame = pd.DataFrame({"position": position, "n_rows": 20, "sq_error": error, "sq_norm_centred": norm})
    frame.to_csv(folder / "positions.csv", index=False)
    epochs = [
        {"epoch": e, "step": 2 * e, "rows": 1000 * e, "lr": 1e-4, "train_mse": row["val_mse"] * (1 + 8 / e)}
        | {"val_mse": row["val_mse"] * (1 + 9 / e), "val_l0": row["l0"], "val_dead_pct": row["dead_pct"]}
        for e in range(1, 11)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in epochs))
    timing = {"train_seconds": 12.0, "eval_seconds": 3.0, "collect_seconds": 1.0, "train_rows_per_second": 900.0}
    write_sealed(folder / "timing.json", {"run_id": run.run_id} | timing | {"cpu": "synthetic", "threads": 1})
    nbformat.write(synthetic_notebook(row), folder / "train.ipynb")
    (folder / "metrics.json").write_text(json.dumps(row))
    reseal(folder)


def reseal(folder: Path) -> None:
    """Record the current files of a run's folder, as a finishing run does."""
    write_sums(folder, ["metrics.json", *RUN_FILES])


def synthetic_notebook(row: dict) -> nbformat.NotebookNode:
    """An executed notebook with every kind of output: a progress bar, a picture, an HTML table, Markdown."""
    v4 = nbformat.v4
    bar = v4.new_output("stream", name="stderr", text="100%|####| 10/10\n")
    widget = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})
    picture = v4.new_output("display_data", {"image/png": ONE_PIXEL, "text/plain": "<Figure>"})
    table = v4.new_output("execute_result", {"text/html": "<table><tr><td>html</td></tr></table>"}, execution_count=1)
    text = v4.new_output("display_data", {"text/markdown": f"Delta loss **{row['delta_loss']:.3f}**"})
    cells = [
        v4.new_markdown_cell("# One run: train an SAE, splice it back\n\nParameters in."),
        v4.new_code_cell(f"arch = {row['arch']!r}", metadata={"tags": ["parameters"]}, execution_count=1),
        v4.new_markdown_cell("## Training"),
        v4.new_code_cell("run.train()", outputs=[bar, widget, picture], execution_count=2),
        v4.new_markdown_cell("## Metrics"),
        v4.new_code_cell("run.evaluate()", outputs=[table, text], execution_count=3),
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "widgets": {"application/x": {}}})
