"""What a store and a run were made from: each thing that decides a row is noticed when it changes, and only that."""

import contextlib
import datetime
import json
import os
import re
import shutil
from pathlib import Path

import chaos_workflow
import pytest
import tiny
import transformers.utils.chat_template_utils as chat_templates
from processes import checkout
from safetensors.torch import load_file, save_file
from tiny import finished, save_dataset, save_model

from saegrid.config.grid import Grid
from saegrid.config.run_config import make_config
from saegrid.core.splice import load_references
from saegrid.core.train import CHECKPOINT
from saegrid.data.collect import collect, open_store, store_folder
from saegrid.data.sources import pinned
from saegrid.errors import StoreError
from saegrid.experiment import finished_run, pca, results
from saegrid.experiment.mend import mend
from saegrid.experiment.run import Run, prepare_store
from saegrid.storage import hub_access
from saegrid.storage.checksums import read_sealed, write_sealed

SMALL = {"text": "chat", "arch": "TopK", "k": 4, "expansion": 2, "epochs": 1, **tiny.SMALL}


@pytest.fixture
def config(tmp_path):
    sources = {"model": save_model(tmp_path / "model", chat=True), "dataset": save_dataset(tmp_path / "data", 60, 20)}
    return make_config(**SMALL, **sources, runs_dir=str(tmp_path / "runs"), store_dir=str(tmp_path / "stores"))


@contextlib.contextmanager
def unnoticed(path):
    """Change a file inside this block; then reset its time of change. Its size must stay the same."""
    before = path.stat()
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def move_a_row(data):
    """From the end of the test split to the start of the training split: together, the files have the same bytes."""
    rows = (data / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(rows[:-1]))
    (data / "train.jsonl").write_text(rows[-1] + (data / "train.jsonl").read_text())


def other_weights(model):
    tensors = load_file(model / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})


CHANGES = {
    "dataset/train.jsonl": lambda root: replaced(root / "data" / "train.jsonl", "train ", "other "),
    "dataset/test.jsonl": lambda root: replaced(root / "data" / "test.jsonl", "test ", "tset "),
    "model/tokenizer.json": lambda root: replaced(root / "model" / "tokenizer.json", '"Ł": 254', '"Ɓ": 254'),
    "model/chat_template.jinja": lambda root: replaced(root / "model" / "chat_template.jinja", "brief", "kind!"),
    "model/config.json": lambda root: replaced(root / "model" / "config.json", "1e-06", "1e-03"),
    "model": lambda root: other_weights(root / "model"),
}  # fmt: skip


def test_every_source_is_noticed_though_size_and_time_are_the_same(config, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_access, "SMALL", 10_000)  # so that the weights' hash is a remembered one
    monkeypatch.setenv("SAEGRID_CACHE", str(tmp_path / "cache"))
    folder = collect(config)
    made = open_store(config).manifest["sources"]
    assert made.keys() > CHANGES.keys() | {"dataset", "code/collect.py", "code/prompts.py"}
    for name, change in CHANGES.items():
        kept = shutil.copytree(tmp_path, tmp_path.with_name("kept"), symlinks=True)
        path = tmp_path / name.replace("dataset/", "data/") if "/" in name else tmp_path / "model" / "model.safetensors"
        with unnoticed(path):
            change(tmp_path)
        with pytest.raises(StoreError, match=f"{folder}: {name} changed since it was made; delete the folder") as error:
            open_store(config)
        assert "\n" not in str(error.value)
        for part in ("data", "model"):
            shutil.rmtree(tmp_path / part)
            shutil.copytree(kept / part, tmp_path / part)
        shutil.rmtree(kept)
        assert open_store(config).manifest["sources"] == made  # another inode and time, the same content


def test_a_row_that_moves_from_split_to_split_and_a_file_that_comes_are_noticed(config, tmp_path):
    collect(config)
    move_a_row(tmp_path / "data")
    with pytest.raises(StoreError, match=r": dataset/test\.jsonl, dataset/train\.jsonl changed"):
        open_store(config)
    save_dataset(tmp_path / "data", 60, 20)
    open_store(config)
    (tmp_path / "model" / "added_tokens.json").write_text("{}")
    with pytest.raises(StoreError, match=r": model/added_tokens\.json changed"):
        open_store(config)


def test_a_folder_that_is_gone_is_no_change(config, tmp_path):
    collect(config)
    shutil.rmtree(tmp_path / "data")
    assert open_store(config).n_train == 600


def test_other_code_and_an_older_form_are_named(config, tmp_path):
    path = collect(config) / "manifest.json"
    manifest = read_sealed(path)
    write_sealed(path, manifest | {"sources": manifest["sources"] | {"code/lm.py": "0" * 64}})
    with pytest.raises(StoreError, match=r": code/lm\.py changed since it was made; delete the folder"):
        open_store(config)
    write_sealed(path, manifest | {"format": 2})
    with pytest.raises(StoreError, match="a store of format 2, where this version reads 3; delete the folder"):
        open_store(config)


def test_commits_of_the_hub_are_kept_to():
    config = make_config(k=4, model="some/model", dataset="some/data", dataset_revision="main")
    same = pinned(config, {"sources": {"model": "c0ffee" + "0" * 34, "dataset": "main"}})
    assert (same.model_revision, same.dataset_revision) == ("c0ffee" + "0" * 34, "main")
    assert pinned(config, {"sources": {"model": "a" * 64}}) == config


# --- a template that prints the date ---


@pytest.mark.parametrize("call", ["strftime_now('%d %b %Y')", "strftime_now(format='%d %b %Y')"])
def test_a_template_that_prints_the_date_gives_the_same_prompts_tomorrow(tmp_path, monkeypatch, call):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(today)

    monkeypatch.setattr(chat_templates, "datetime", Clock)
    model = Path(save_model(tmp_path / "model", chat=True))
    replaced(model / "chat_template.jinja", "{{ '<end>system", f"{{{{ {call} + '<end>system")
    config = make_config(
        **SMALL, model=str(model), dataset=save_dataset(tmp_path / "data", 60, 20), store_dir=str(tmp_path)
    )
    today = "2026-07-01"
    folder = collect(config)
    today = "2031-01-31"
    prepare_store(config)  # its baseline is of the same prompts, or refused
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(load_references(folder).prompts[0].tokens).startswith("25 Nov 2026<end>system")


def test_prompts_that_come_out_otherwise_are_refused(config, tmp_path):
    path = tmp_path / "model" / "chat_template.jinja"
    path.write_text("{{ range(100000) | random }}" + path.read_text())
    collect(config)
    with pytest.raises(StoreError, match="dataset and tokenizer now give other prompts than those of its rows"):
        prepare_store(config)


# --- a finished run ---


def grid_of(config, tmp_path):
    constants = {name: value for name, value in config.model_dump(exclude_defaults=True).items() if name != "k"}
    return Grid(name="g", title="G", results_dir=str(tmp_path / "tables"), constants=constants, axes=[{"k": [4]}])


def contents(*folders):
    return {path: path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_finished_grid_is_made_again_where_its_data_changed_and_taken_back_where_they_return(config, tmp_path):
    grid = grid_of(config, tmp_path)
    first = finished(config).metrics
    results.make(grid)
    folder, run_dir = store_folder(config), tmp_path / "runs" / config.run_id
    before = {path: content for path, content in contents(folder, run_dir).items() if path.name != "timing.json"}
    (run_dir / "train.ipynb").write_text("{}")
    assert mend(grid) == []
    replaced(tmp_path / "data" / "train.jsonl", "train ", "other ")
    with pytest.raises(StoreError, match=r"dataset/train\.jsonl changed since it was made"):
        Run(config)  # a run by itself refuses, and changes nothing
    assert (run_dir / "metrics.json").exists()
    lines = mend(grid)
    assert lines[0] == f"{folder}: dataset/train.jsonl changed since it was made; it is made again"
    assert len(lines) == 2 and "SHA256SUMS: the tables of runs that are made again" in lines[1]
    gone = [folder / "manifest.json", folder / "baseline.json", run_dir / "metrics.json"]
    assert not any(path.exists() for path in [*gone, tmp_path / "tables" / "results_tidy.csv"])
    second = finished(config).metrics
    assert second["data_sha256"] != first["data_sha256"]
    assert second["data_sha256"] == read_sealed(folder / "manifest.json")["data_sha256"]
    replaced(tmp_path / "data" / "train.jsonl", "other ", "train ")
    mend(grid)
    assert finished(config).metrics["data_sha256"] == first["data_sha256"]
    after = {path: content for path, content in contents(folder, run_dir).items() if path in before}
    assert after == before
    (run_dir / "metrics.json").touch()
    replaced(tmp_path / "data" / "train.jsonl", "train ", "other ")
    mend(grid)
    replaced(tmp_path / "data" / "train.jsonl", "other ", "train ")
    prepare_store(config)
    with contextlib.closing(Run(config)) as run:
        assert run.finished  # what was set aside is of the store that came out the same
    assert finished_run.load_run(run_dir)["data_sha256"] == first["data_sha256"]


def test_a_run_is_made_again_where_only_its_evaluation_prompts_changed(config, tmp_path, capsys):
    first = finished(config).metrics
    (tmp_path / "runs" / config.run_id / "train.ipynb").write_text("{}")
    replaced(tmp_path / "data" / "test.jsonl", "test ", "tset ")
    shutil.rmtree(store_folder(config))  # by hand, as the error says
    prepare_store(config)
    grid = grid_of(config, tmp_path)
    assert "measured on other prompts than those now in its store" in "".join(mend(grid))
    second = finished(config).metrics
    assert "measured on other prompts" in capsys.readouterr().out
    assert (second["data_sha256"], second["weights_sha256"]) == (first["data_sha256"], first["weights_sha256"])
    assert second["ce_clean"] != first["ce_clean"]


def test_a_checkpoint_on_other_rows_is_not_gone_on_from(config, tmp_path, capsys):
    with contextlib.closing(Run(config)) as run:
        run.train()
        kept = (run.folder / CHECKPOINT).read_bytes()
    replaced(tmp_path / "data" / "train.jsonl", "train ", "other ")
    mend(grid_of(config, tmp_path))
    (run.folder / CHECKPOINT).write_bytes(kept)
    row = finished(config).metrics
    assert "a checkpoint on other rows than the store has now; the run starts again" in capsys.readouterr().out
    shutil.rmtree(run.folder)
    assert finished(config).metrics["weights_sha256"] == row["weights_sha256"]


def test_the_workflow_plans_what_depends_on_changed_data(config, tmp_path):
    folder = checkout(tmp_path / "checkout")
    places = {"runs_dir": str(folder / "runs"), "store_dir": str(folder / "activations")}
    config = make_config(**config.model_dump() | places)
    grid = grid_of(config, folder)
    (folder / "params" / "chaos.yaml").write_text(json.dumps(grid.model_dump()))
    target = f"{grid.results_dir}/results_tidy.csv"

    def planned():
        done = chaos_workflow.snakemake(folder, target, "--dry-run").wait()
        log = (folder / "log.txt").read_text()
        (folder / "log.txt").write_text("")
        assert done == 0, log
        return {line.split()[0] for line in log.splitlines() if re.fullmatch(r"\w+ +1", line)} or log

    finished(config)
    pca.make(config, open_store(config))
    results.make(grid)
    assert "Nothing to be done" in planned()
    replaced(tmp_path / "data" / "train.jsonl", "train ", "other ")
    assert "Nothing to be done" in planned()  # a dry run changes nothing
    assert mend(grid)
    assert planned() == {"activations", "pca", "train", "tables"}
