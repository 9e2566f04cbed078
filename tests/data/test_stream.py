"""Streamed rows: the rows of a store in another order, made while they are trained on; bounded and resumable."""

import threading
from pathlib import Path

import pytest
import torch
from tiny import D_IN, finished, save_dataset, save_model

from saegrid.config import run_config
from saegrid.config.run_config import make_config
from saegrid.data import stream as stream_module
from saegrid.data.collect import collect, open_store, store_folder
from saegrid.errors import ConfigError

ROWS, GROUP, BATCH = 1500, 256, 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {"model": save_model(root / "model"), "dataset": save_dataset(root / "data", train=80, test=20)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A sample and parts that are much smaller than the text."""
    monkeypatch.setattr(run_config, "SAMPLE_ROWS", 300)
    monkeypatch.setattr(stream_module, "PART_ROWS", 100)


def config_for(sources, folder, **parameters):
    size = {"train_tokens": ROWS, "val_tokens": 300, "eval_prompts": 4, "batch_size": BATCH, "epochs": 1}
    streamed = {"rows": "streamed", "shuffle_rows": GROUP} if parameters.get("rows") != "stored" else {}
    machine = {"kernel": "reference", "threads": 1, "expansion": 4, "act_dtype": "float32", "checkpoint_steps": 5}
    places = {"runs_dir": f"{folder}/runs", "store_dir": f"{folder}/stores"}
    return make_config(k=3, layer=1, **sources, **{**size, **streamed, **machine, **places, **parameters})


def opened(config):
    collect(config, device="cpu")
    return open_store(config)


def epoch(store, start=0, seed=0):
    return list(store.epoch(BATCH, seed, 0, start, "cpu", None))


def in_order(rows):
    """Rows in the order of their first value."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_an_epoch_has_the_rows_of_a_store_and_shuffles_those_of_a_buffer(sources, tmp_path, site):
    stored = opened(config_for(sources, tmp_path, site=site, rows="stored"))
    streamed = opened(config_for(sources, tmp_path, site=site))
    batches = epoch(streamed)
    assert [len(batch) for batch in batches] == [BATCH] * (ROWS // BATCH) + [ROWS % BATCH]
    rows, wanted = torch.cat(batches), stored.rows("train")
    for first in range(0, ROWS, GROUP):
        group = slice(first, first + GROUP)
        torch.testing.assert_close(in_order(rows[group]), in_order(wanted[group]), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(rows[group], wanted[group], atol=0.1)
    assert (streamed.epoch_rows, streamed.n_train, stored.epoch_rows) == (ROWS, 300, ROWS)
    assert torch.equal(streamed.rows("train"), wanted[:300]) and torch.equal(streamed.rows("val"), stored.rows("val"))
    size = sum(path.stat().st_size for path in streamed.folder.glob("train-*"))
    assert size < 1.1 * 300 * (4 * D_IN + 12) + 1000


def test_the_same_seed_gives_the_same_bytes_from_any_batch_on(sources, tmp_path):
    store = opened(config_for(sources, tmp_path))
    whole = epoch(store)
    for start in (0, 1, GROUP // BATCH, GROUP // BATCH + 3, len(whole) - 1):
        rest = epoch(store, start)
        assert len(rest) == len(whole) - start
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    assert not torch.equal(epoch(store, seed=1)[0], whole[0])


def test_a_stream_that_is_dropped_ends_its_threads(sources, tmp_path):
    store, before = opened(config_for(sources, tmp_path)), threading.active_count()
    batches = store.epoch(BATCH, 0, 0, 0, "cpu", None)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


def test_a_streamed_run_learns_what_a_stored_one_does_and_resumes_to_the_same_bytes(sources, tmp_path, monkeypatch):
    stored = finished(config_for(sources, tmp_path, rows="stored", recipe="improved")).metrics
    config = config_for(sources, tmp_path, recipe="improved")
    run = finished(config)
    weights, streamed = (run.folder / "sae.safetensors").read_bytes(), run.metrics
    assert (streamed["n_train_rows"], streamed["steps"]) == (ROWS, stored["steps"])
    assert streamed["val_mse"] == pytest.approx(stored["val_mse"], rel=0.05)
    again = config.model_copy(update={"runs_dir": f"{tmp_path}/again"})
    calls = []

    def stop(self, rows=1):
        calls.append(rows)
        if len(calls) == 14:  # after the checkpoint of step 10
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tqdm.std.tqdm.update", stop)
        with pytest.raises(KeyboardInterrupt):
            finished(again)
    assert (Path(again.runs_dir) / again.run_id / "checkpoint.safetensors").exists()
    assert (finished(again).folder / "sae.safetensors").read_bytes() == weights


def test_a_text_that_is_too_small_is_told_before_training(sources, tmp_path):
    config = config_for(sources, tmp_path, train_tokens=100_000)
    with pytest.raises(ConfigError, match=r"train_tokens = 100000: .* has only \d+ left for it") as error:
        collect(config, device="cpu")
    assert "\n" not in str(error.value) and not store_folder(config).exists()
    run_config.SAMPLE_ROWS = 50_000  # a text smaller than the sample, too; `small` resets it
    with pytest.raises(ConfigError, match=r"train_tokens = 100000: .* has only \d+ left for it"):
        collect(config, device="cpu")


def test_parameters_of_streamed_rows():
    assert make_config(k=3).run_id == make_config(k=3, rows="stored", shuffle_rows=131_072).run_id
    streamed = make_config(k=3, rows="streamed", epochs=1)
    assert streamed.store_id == make_config(k=3, rows="streamed", epochs=1, shuffle_rows=5).store_id
    assert streamed.store_id != make_config(k=3).store_id
    for wrong, message in (
        ({"rows": "streamed"}, "epochs = 10: streamed rows are made once; set epochs = 1"),
        ({"shuffle_rows": 5}, "shuffle_rows = 5: only rows = 'streamed' takes it"),
        ({"rows": "streamed", "epochs": 1, "activations": "a"}, "rows = 'streamed': `activations` holds stored rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(k=3, **wrong)
