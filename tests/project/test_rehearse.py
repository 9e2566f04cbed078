"""A grid on published activation files from end to end: the rehearsal of the published setting, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from saegrid.config.grid import load_grid
from saegrid.experiment.results import read_tidy
from saegrid.formats import load_sae
from saegrid.storage.hub_access import files_sha256

COMMAND = [sys.executable, "benchmarks/rehearse.py", "--size", "small", "--epochs", "1", "--folder"]


def rehearse(folder):
    return subprocess.run([*COMMAND, str(folder)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rehearsal")
    done = rehearse(folder)
    (work,) = folder.iterdir()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + (work / "log.txt").read_text()[-4000:]
    return work


def test_only_places_differ_from_the_preset(rehearsed):
    ours, preset = (yaml.safe_load(Path(p).read_text()) for p in (rehearsed / "qwen05b.yaml", "params/qwen05b.yaml"))
    changed = {name for name in ours["constants"] if ours["constants"][name] != preset["constants"].get(name)}
    assert changed == {"model", "dataset", "activations", "epochs"}  # epochs: this test's own
    assert ours["axes"] == preset["axes"]


def test_every_run_of_the_part_is_in_the_tables_with_the_models_hash(rehearsed):
    df = read_tidy(rehearsed / "results/qwen05b")
    assert sorted(df["arch"]) == ["BatchTopK", "JumpReLU", "TopK"]
    assert set(df["model_sha256"]) == {files_sha256(sorted((rehearsed / "model").glob("*.safetensors")))}
    assert set(df["n_train_rows"]) == {2000} and set(df["n_val_rows"]) == {600}
    assert df["delta_loss"].notna().all()


def test_pages_say_what_is_not_known_of_published_rows(rehearsed):
    df = read_tidy(rehearsed / "results/qwen05b")
    pages = rehearsed / "_site" / "report"
    for page in [pages / "frontier.html", *(pages / "runs" / f"{run_id}.html" for run_id in df["run_id"])]:
        assert "whose positions are not known" in page.read_text(), page
        assert "nan" not in page.read_text().replace("nanmean", "").split(), page
    assert "whose tokens are not known" in (pages / "latents.html").read_text()
    latents = json.loads((rehearsed / "report/latents/latents.json").read_text())
    assert not latents["tokens_known"] and latents["latents"]
    assert "published activations" in (rehearsed / "_site" / "index.html").read_text()


def test_the_release_names_where_rows_and_prompts_come_from(rehearsed):
    folder = rehearsed / "published" / "qwen05b"
    card = ModelCard.load(folder / "README.md")
    assert card.data.datasets == ["dataset", "published"]
    named = {r.metric_type: r.dataset_name for r in card.data.eval_results}
    assert (named["val_mse"], named["delta_loss"]) == ("published", "dataset")
    for name in ("TopK_exp4x_k64", "BatchTopK_exp4x_k64", "JumpReLU_exp4x_t0.5"):
        assert load_sae(folder / f"{name}.pt").d_in == 56
        assert load_sae(folder / "saelens" / name).d_sae == 224


def test_every_point_of_the_grid_has_a_time(rehearsed):
    found = json.loads((rehearsed / "rehearsal.json").read_text())
    assert [row["name"] for row in found["runs"]] == [run.name for run in load_grid("params/qwen05b.yaml").runs()]
    assert sum(row["measured"] for row in found["runs"]) == 3
    assert all(row["minutes"] > 0 and row["step_ms"] > 0 for row in found["runs"])
    assert found["grid"]["peak_gb"] > 0.3 and found["grid"]["disk_gb"] > 0.01


def test_a_second_call_makes_nothing_again(rehearsed):
    paths = [*rehearsed.glob("runs/*/metrics.json"), *rehearsed.glob("activations/*/*.json")]
    paths += [*rehearsed.glob("results/*/*"), rehearsed / "_site" / "index.html"]
    before = {path: path.stat().st_mtime_ns for path in paths}
    done = rehearse(rehearsed.parent)
    assert done.returncode == 0 and "begins" not in done.stdout
    plan = [sys.executable, "-m", "snakemake", "-s", "workflow/Snakefile", "--cores", "2", "--dry-run"]
    planned = subprocess.run(
        [*plan, "--config", "grid=part.yaml"], cwd=rehearsed, capture_output=True, text=True, check=False
    )
    assert planned.returncode == 0 and "Nothing to be done" in planned.stdout + planned.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
