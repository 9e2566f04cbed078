"""The smoke grid through Snakemake, papermill and the site, end to end, in a folder of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import nbformat
import pandas as pd
import pytest
import torch
from hub_server import ORGANISATION, client_environment, python_blocks, serve
from huggingface_hub import ModelCard
from processes import ROOT, checkout, papermill
from published import BatchTopK

from saegrid.config.grid import load_grid
from saegrid.formats.run_folder import load_folder

GRID = load_grid("params/smoke.yaml")
RUN = GRID.runs()[0]
LINE = "arch=BatchTopK k=32 expansion=1 train_tokens=3000 val_tokens=1000 eval_prompts=4 epochs=2 threads=1"
"""The first run of the grid: as parameters of its notebook."""
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def snakemake(folder, *options, grid="params/smoke.yaml"):
    command = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", *options, "--config", f"grid={grid}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A checkout in which the smoke grid has run."""
    folder = checkout(tmp_path_factory.mktemp("smoke grid"))  # a space in the path, as people have them
    done = snakemake(folder, "--cores", "2", "--quiet", "rules")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def test_every_run_leaves_its_files_and_no_checkpoint(smoke):
    for run in GRID.runs():
        found = {path.name for path in (smoke / "runs" / run.run_id).iterdir() if path.stat().st_size}
        assert {name for name in found if not name.startswith((".", "train.ipynb"))} == {
            *("config.json", "cfg.json", "sae.safetensors", f"{run.name}.pt", "metrics.json", "metrics.jsonl"),
            *("timing.json", "prompts.csv", "latents.csv", "positions.csv", "SHA256SUMS"),
        }
        assert "train.ipynb" in found


def test_the_metrics_have_the_parameters_and_no_hole(smoke):
    run_dir = smoke / "runs" / RUN.run_id
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert (metrics["arch"], metrics["k"], metrics["threshold"]) == ("BatchTopK", 32, None)
    assert (metrics["n_train_rows"], metrics["n_val_rows"], metrics["n_eval_prompts"]) == (3000, 1000, 4)
    assert metrics["d_sae"] == 576 and metrics["run_id"] == run_dir.name
    missing = [name for name, value in metrics.items() if value is None]
    assert missing == ["threshold", "theta_over_rms"]


def test_the_metrics_follow_from_the_files(smoke):
    run_dir = smoke / "runs" / RUN.run_id
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
    assert metrics["l0"] == pytest.approx(latents["fired"].sum() / 1000)
    assert metrics["l0"] == pytest.approx(32, rel=0.01)  # the threshold was calibrated on these rows
    positions = pd.read_csv(run_dir / "positions.csv")
    assert (positions["n_rows"] * positions["sq_error"]).sum() / (1000 * 576) == pytest.approx(metrics["val_mse"])


def test_the_saved_files_are_one_sae(smoke):
    run_dir = smoke / "runs" / RUN.run_id
    ours = load_folder(run_dir)
    theirs = BatchTopK(576, 576, k=32)
    theirs.load_state_dict(torch.load(run_dir / "BatchTopK_exp1x_k32.pt", weights_only=True))
    ours.inference_threshold = None
    x = 10 * torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(x) - theirs(x)).norm(dim=1) / theirs(x).norm(dim=1)
    assert difference.max() < 1e-5


def test_the_executed_notebook_shows_curves_and_numbers(smoke):
    notebook = smoke / "runs" / RUN.run_id / "train.ipynb"
    outputs = [o for cell in nbformat.read(notebook, 4).cells for o in cell.get("outputs", [])]
    shown = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert shown.count("<svg") == 3  # learning curve, firing frequency, error by position
    assert "Delta loss" in shown and "BatchTopK_exp1x_k32.pt" in shown
    assert not [output for output in outputs if output.output_type == "error"]


def test_the_same_run_by_papermill_trains_nothing(smoke, tmp_path):
    run_dir = smoke / "runs" / RUN.run_id
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    done, _ = papermill("train", tmp_path / "again.ipynb", *LINE.split(), cwd=smoke)
    assert done.returncode == 0, done.stderr[-3000:]
    assert RUN.run_id in (tmp_path / "again.ipynb").read_text()
    before.pop("train.ipynb.sha256")  # a run drops it: usually, its notebook is being written anew
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_the_tables_have_every_run_and_no_hole(smoke):
    full = pd.read_csv(smoke / "results_full.csv")
    assert sorted(full["run_id"]) == sorted(run.run_id for run in GRID.runs())
    assert full.drop(columns=["k", "threshold"]).notna().all(axis=None)
    assert full["threshold"].notna().eq((full["arch"] == "JumpReLU") & full["k"].isna()).all()
    small = pd.read_csv(smoke / "results.csv")
    assert set(small["arch"]) == {"BatchTopK", "TopK"}
    for run_id, delta in zip(full["run_id"], full["delta_loss"], strict=True):
        assert json.loads((smoke / "runs" / run_id / "metrics.json").read_text())["delta_loss"] == delta


def test_the_site_is_there(smoke):
    home = (smoke / "_site" / "index.html").read_text()
    assert "SmolLM2" in home or "smollm2" in home
    for run in GRID.runs():
        assert run.name in (smoke / "_site" / "report" / "runs" / f"{run.run_id}.html").read_text()
    described = json.loads((smoke / "report" / "latents" / "latents.json").read_text())
    assert len(described["latents"]) >= 200 and described["tokens_known"]
    pieces = "".join(path.read_text() for path in (smoke / "_site" / "report" / "latents").glob("chunk-*.js"))
    assert all(f"Latent {entry['latent']}<" in pieces for entry in described["latents"])


def test_a_second_call_does_nothing(smoke):
    done = snakemake(smoke, "--cores", "2", "--dry-run")
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_a_lost_result_is_made_again_and_no_other(smoke):
    metrics = smoke / "runs" / RUN.run_id / "metrics.json"
    before = metrics.read_bytes()
    metrics.unlink()
    try:
        done = snakemake(smoke, "--cores", "2", "--dry-run")
        lines = [line.split() for line in (done.stdout + done.stderr).splitlines()]
        counts = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}
        assert counts["train"] == 1 and counts["tables"] == 1 and "activations" not in counts
    finally:
        metrics.write_bytes(before)


@pytest.mark.parametrize(
    ("preset", "options"),
    [("quick", ["--cores", "2"]), ("full", ["--workflow-profile", "workflow/profiles/slurm"])],
)
def test_a_preset_plans_one_job_per_run_and_needs_no_slurm_for_that(tmp_path, preset, options):
    done = snakemake(checkout(tmp_path), *options, "--dry-run", grid=f"params/{preset}.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    plan = done.stdout + done.stderr
    assert f"train {len(load_grid(f'params/{preset}.yaml').runs())} " in " ".join(plan.split()) + " "
    if preset == "full":
        train = plan[plan.index("rule train:") :].split("\n[")[0]
        assert "mem_mb=8000" in train and "runtime=240" in train and "gpu=0" in train


def test_list_says_what_is_to_do(smoke):
    done = subprocess.run(
        [sys.executable, "-m", "saegrid", "list", "params/smoke.yaml"],
        cwd=smoke, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == [run.run_id for run in GRID.runs()]
    assert all(line.endswith("finished") for line in done.stdout.splitlines())


def test_one_gpu_each(tmp_path):
    """Two commands at once on a machine with two devices get one device each."""
    command = [sys.executable, str(ROOT / "workflow" / "with_gpu.py"), sys.executable, "-c"]
    code = "import os, time; time.sleep(1.5); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)}
    both = [subprocess.Popen([*command, code], stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in both} == {"3", "5"}


def test_one_gpu_is_used_by_one_run_at_a_time(tmp_path):
    """Two commands on a machine whose driver lists a single device; the listing is a stand-in for the driver's."""
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA (UUID: GPU-0)'\n")
    listing.chmod(0o755)
    code = "import os, time; a = time.time(); time.sleep(.5); print(os.environ['CUDA_VISIBLE_DEVICES'], a, time.time())"
    command = [sys.executable, str(ROOT / "workflow" / "with_gpu.py"), sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    (_, _, end), (gpu, start, _) = sorted((p.communicate()[0].split() for p in both), key=lambda words: words[1])
    assert gpu == "0" and float(end) <= float(start)


MEASURE = """
import torch
from saegrid.data.collect import open_store
from saegrid.config.run_config import make_config
from saegrid.data.language_model import load_lm
from saegrid.core.splice import evaluate, load_references, mean_losses
config = make_config(**CONFIG)
store = open_store(config)
with torch.no_grad():
    errors = [((x - sae(x)).double() ** 2).sum(dtype=torch.float64).item() for x in store.batches("val", 512)]
    losses = mean_losses(evaluate(load_lm(config), load_references(store.folder), config.layer, sae))
print(sum(errors) / store.n_val / sae.b_pre.numel(), losses["spliced"] - losses["clean"])
"""


def test_the_published_grid_gives_what_its_card_states(smoke, tmp_path):
    """By the real client; then each of the card's snippets, in a fresh process, fetches what is measured here."""
    server = serve()
    environment = client_environment(server, tmp_path / "home")
    publish = ["-m", "saegrid", "publish", "params/smoke.yaml", "--folder", str(tmp_path / "folder")]
    where = ["--repo", f"{ORGANISATION}/smoke", "--space", f"{ORGANISATION}/report"]
    done = forked.python([*publish, *where], smoke, environment)
    assert done.returncode == 0, done.stderr
    (tmp_path / "README.md").write_bytes(server.files(where[1])["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert {r.metric_args["run_id"] for r in card.data.eval_results} == {run.run_id for run in GRID.runs()}
    own, published_class, _ = python_blocks(card.text)
    file = re.search(r'load_sae\("[^/]+/[^/]+/(.+)"\)', own)[1]
    stated = {r.metric_type: r for r in card.data.eval_results if r.metric_args["file"] == file}
    run_id = stated["val_mse"].metric_args["run_id"]
    config = next(run for run in GRID.runs() if run.run_id == run_id).model_dump()
    for code in (own, published_class):
        done = forked.python(["-c", f"{code}\n{MEASURE.replace('CONFIG', repr(config))}"], smoke, environment)
        assert done.returncode == 0, done.stderr[-3000:]
        val_mse, delta_loss = map(float, done.stdout.split()[-2:])
        assert val_mse == pytest.approx(stated["val_mse"].metric_value, rel=1e-4)
        assert delta_loss == pytest.approx(stated["delta_loss"].metric_value, abs=1e-3)
    server.shutdown()
