"""The training notebook through papermill, as a user calls it, on the embedded model."""

import json

import nbformat
import pandas as pd
import pytest
import torch
from processes import papermill
from published import BatchTopK

from saegrid.formats.run_folder import load_folder

SMALL = "train_tokens=1500 val_tokens=600 eval_prompts=2 epochs=2 expansion=1 threads=1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one run")  # a space in the path, as people have them
    places = [f"runs_dir={folder}/runs", f"store_dir={folder}/activations"]
    parameters = [*SMALL.split(), *places, "arch=BatchTopK", "k=16"]
    done, _ = papermill("train", folder / "mine.ipynb", *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    (run_dir,) = (folder / "runs").iterdir()
    return folder, run_dir, parameters


def test_one_papermill_line_leaves_everything(trained):
    _, run_dir, _ = trained
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.json", "cfg.json", "sae.safetensors", "BatchTopK_exp1x_k16.pt", "metrics.json", "metrics.jsonl"),
        *("timing.json", "prompts.csv", "latents.csv", "positions.csv", "SHA256SUMS"),
    }
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["arch"], metrics["k"], metrics["threshold"]) == ("BatchTopK", 16, None)
    assert (metrics["n_train_rows"], metrics["n_val_rows"], metrics["n_eval_prompts"]) == (1500, 600, 2)
    assert metrics["d_sae"] == 576 and metrics["run_id"] == run_dir.name
    missing = [name for name, value in metrics.items() if value is None]
    assert missing == ["threshold", "theta_over_rms"]


def test_the_metrics_follow_from_the_files(trained):
    _, run_dir, _ = trained
    metrics = json.loads((run_dir / "metrics.json").read_text())
    prompts = pd.read_csv(run_dir / "prompts.csv")
    tokens = prompts["n_tokens"].sum()
    clean, spliced = prompts["ce_clean_sum"].sum() / tokens, prompts["ce_spliced_sum"].sum() / tokens
    assert metrics["delta_loss"] == pytest.approx(spliced - clean)
    assert metrics["frac_rec_pct"] == pytest.approx(100 * clean / spliced)
    assert metrics["kl"] == pytest.approx(prompts["kl_sum"].sum() / tokens) and metrics["kl"] > 0
    assert metrics["ce_zero"] > clean and metrics["ce_mean"] > clean
    assert metrics["l0_eval"] == pytest.approx(prompts["active"].sum() / tokens)
    assert metrics["fvu_eval"] == pytest.approx(prompts["sq_error"].sum() / prompts["sq_norm_centred"].sum())
    latents = pd.read_csv(run_dir / "latents.csv")
    assert metrics["dead_pct"] == pytest.approx(100 * (latents["fired"] == 0).mean())
    assert metrics["l0"] == pytest.approx(latents["fired"].sum() / 600)
    assert metrics["l0"] == pytest.approx(16, rel=0.01)  # the threshold was calibrated on these rows
    positions = pd.read_csv(run_dir / "positions.csv")
    assert (positions["n_rows"] * positions["sq_error"]).sum() / (600 * 576) == pytest.approx(metrics["val_mse"])


def test_the_saved_files_are_one_sae(trained):
    _, run_dir, _ = trained
    ours = load_folder(run_dir)
    theirs = BatchTopK(576, 576, k=16)
    theirs.load_state_dict(torch.load(run_dir / "BatchTopK_exp1x_k16.pt", weights_only=True))
    ours.inference_threshold = None
    x = 10 * torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(x) - theirs(x)).norm(dim=1) / theirs(x).norm(dim=1)
    assert difference.max() < 1e-5


def test_the_executed_notebook_shows_curves_and_numbers(trained):
    folder, _, _ = trained
    outputs = [o for cell in nbformat.read(folder / "mine.ipynb", 4).cells for o in cell.get("outputs", [])]
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert shown.count("<svg") == 3  # learning curve, firing frequency, error by position
    assert "Delta loss" in shown and "BatchTopK_exp1x_k16.pt" in shown
    assert not [output for output in outputs if output.output_type == "error"]


def test_the_same_line_again_trains_nothing(trained):
    folder, run_dir, parameters = trained
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    done, _ = papermill("train", folder / "again.ipynb", *parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
