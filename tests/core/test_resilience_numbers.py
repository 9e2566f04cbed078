"""Numbers that can't be used, and runs of the same bytes: by real runs on a tiny model."""

import json
import re
import shutil

import pytest
import tiny
import torch
from tiny import D_IN, finished, publish, save_dataset, save_model, tiny_model

from saegrid.config.run_config import make_config
from saegrid.data.language_model import load_lm
from saegrid.errors import ConfigError, SaegridError, StoreError
from saegrid.experiment import finished_run, preflight, results
from saegrid.experiment.preflight import available, check_chat, check_fits, model_bytes, needed
from saegrid.experiment.run import Run, prepare_store
from saegrid.report.figures import captions, plots
from saegrid.storage.checksums import read_sealed, write_sealed

SMALL = {"arch": "TopK", "k": 3, "expansion": 4, "epochs": 2, **tiny.SMALL}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {"model": save_model(folder / "model"), "dataset": save_dataset(folder / "data", train=60, test=20)}


@pytest.fixture
def config(sources, tmp_path):
    places = {"runs_dir": str(tmp_path / "runs"), "store_dir": str(tmp_path / "activations")}

    def make(**changes):
        return make_config(**{**SMALL, **sources, **places, **changes})

    return make


def acts(folder, train, val):
    return publish(folder, {"instruct_base_layer1_train.pt": train, "instruct_base_layer1_val.pt": val})


GOOD = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(0))
BAD = {
    "a NaN": (GOOD.clone().index_fill_(0, torch.tensor([7]), float("nan")), GOOD, "train activations hold NaN"),
    "an infinity": (GOOD, GOOD.clone().fill_(float("inf")), "val activations hold NaN or infinity"),
    "constant rows": (torch.ones(300, D_IN), GOOD, "the 300 train rows are all the same"),
    "constant validation": (GOOD, torch.ones(300, D_IN), "the 300 val rows are all the same"),
    "zero vectors": (torch.zeros(300, D_IN), GOOD, "the 300 train rows are all the same"),
    "one row": (GOOD[:1], GOOD, r"shape \[1, 16\]"),
    "no rows": (GOOD[:0], GOOD, r"shape \[0, 16\]"),
    "too few for a batch": (GOOD[:50], GOOD, "batch_size = 64: at most the 50 training rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_that_can_not_be_used_stop_the_run_in_one_line(config, tmp_path, case):
    train, val, words = BAD[case]
    bad = config(activations=acts(tmp_path / "files", train, val))
    with pytest.raises(SaegridError, match=words) as error:
        finished(bad)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / bad.run_id / "metrics.json").exists()


def test_a_run_on_published_files_ends_and_is_found_finished_without_them(config, sources, tmp_path):
    own = config(activations=acts(tmp_path / "files", GOOD.half(), GOOD[:200].half()))
    run = finished(own)
    row = finished_run.load_run(run.folder, run.run_id)
    assert row["model_sha256"] == load_lm(own).identity["sha256"]
    assert captions.position_alt(run.positions) == "The rows come from published files, whose positions are not known."
    plots.error_by_position(run.positions).figure.savefig(tmp_path / "positions.svg")
    shutil.rmtree(tmp_path / "files")
    assert Run(own).finished


def test_a_baseline_of_an_older_form_is_made_again(config, tmp_path, capsys):
    own = config(activations=acts(tmp_path / "files", GOOD.half(), GOOD[:200].half()))
    path = prepare_store(own).folder / "baseline.json"
    made = read_sealed(path)
    for older in ({"prompts": made["prompts"]}, made | {"sums": {"n_tokens": made["sums"]["n_tokens"]}}):
        write_sealed(path, older)
        prepare_store(own)
        assert "baseline.json: damaged" in capsys.readouterr().out and read_sealed(path) == made


def test_one_validation_row_is_refused(config):
    with pytest.raises(StoreError, match="val_tokens = 1: the 1 val rows are all the same"):
        finished(config(val_tokens=1))


def test_a_loss_that_diverges_stops_the_run(config, tmp_path):
    with pytest.raises(SaegridError, match=r"lr = 1e\+20: the (validation )?loss is (nan|inf) at step \d+"):
        finished(config(lr=1e20, arch="JumpReLU", k=0, threshold=1e-6))
    assert not list((tmp_path / "runs").glob("*/metrics.json"))


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_an_sae_of_dead_latents_has_finite_metrics(config, kernel):
    run = finished(config(arch="JumpReLU", k=0, threshold=1e9, kernel=kernel))
    row = finished_run.load_run(run.folder, run.run_id)
    assert row["l0"] == row["l0_eval"] == 0.0 and row["dead_pct"] == 100.0
    assert row["nmse"] > 0 and row["delta_loss"] == row["delta_loss"]
    assert (
        finished_run.load_latents(results.tidy([run.run_id], run.folder.parent), run.folder.parent)["fired"] == 0
    ).all()


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize(
    "arch", [{"arch": "BatchTopK"}, {"arch": "TopK"}, {"arch": "JumpReLU", "k": 0, "threshold": 0.5}]
)
def test_the_same_run_twice_has_the_same_bytes(config, tmp_path, kernel, arch):
    made = []
    for name in ("first", "second"):
        run = finished(config(**arch, kernel=kernel, runs_dir=str(tmp_path / name)))
        made.append({p.name: p.read_bytes() for p in run.folder.iterdir() if p.name not in ("timing.json", ".lock")})
    assert made[0] == made[1] and len(made[0]) == 10


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_thread_counts_agree(config, kernel):
    """To 1e-4 of each metric after 20 steps: sums in another order; the cpu kernel's own loops have none."""
    rows = [finished_run.load_run(finished(config(kernel=kernel, threads=threads)).folder) for threads in (1, 2)]
    for name in finished_run.METRICS:
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4, abs=1e-6), name


def test_a_run_that_does_not_fit_says_so_with_the_numbers():
    config = make_config(k=4, expansion=1024, batch_size=100_000)
    with pytest.raises(
        ConfigError, match=r"expansion = 1024.* about \d+\.\d GB of memory .* and \d+\.\d GB are free"
    ) as error:
        check_fits(config, 896)
    stated = float(re.search(r"about ([\d.]+) GB", str(error.value))[1])
    assert stated == pytest.approx(needed(config, 896) / 1e9, abs=0.06)
    assert needed(make_config(k=4, train_tokens=10**7), 896) == needed(make_config(k=4, train_tokens=10**9), 896)
    assert 0 < available() < 2**50


def test_a_language_model_that_does_not_fit_says_so_before_it_is_loaded(config, tmp_path, monkeypatch):
    """Its weights are counted once, in one file or in shards, also beside a second copy of them."""
    run, model = config(lm_dtype="bfloat16"), tiny_model("llama")
    weights = 2 * sum(weight.numel() for weight in model.parameters())
    assert model_bytes(run) == weights
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    shutil.copy(shards[0], tmp_path / "shards" / "consolidated.safetensors")
    assert len(shards) > 1 and model_bytes(config(model=str(tmp_path / "shards"))) == 2 * weights
    monkeypatch.setattr(preflight, "available", lambda: int(preflight.BASE) + weights - 1)
    with pytest.raises(ConfigError, match=r"model = .*: its weights take 0.0 GB of memory as bfloat16 .* 0.7 GB are"):
        check_fits(run, D_IN)
    monkeypatch.setattr(preflight, "available", lambda: 2 * int(preflight.BASE))
    check_fits(run, D_IN)


def test_a_finished_run_with_a_number_changed_by_hand_is_made_again(config):
    run = finished(config())
    path = run.folder / "metrics.json"
    before = path.read_bytes()
    path.write_text(json.dumps(json.loads(before) | {"delta_loss": -1.0}))
    with pytest.raises(results.ResultsError, match=r"metrics\.json: damaged .*mend GRID"):
        results.tidy([run.run_id], run.folder.parent)
    assert not Run(config()).finished
    assert finished(config()).finished and path.read_bytes() == before


def test_a_missing_chat_template_is_told_before_the_model_is_loaded(tmp_path):
    config = make_config(k=4, text="chat", model=save_model(tmp_path / "plain"), layer=1)
    with pytest.raises(ConfigError, match=r"text = 'chat': the tokenizer of .*plain has no chat template"):
        check_chat(config)
    check_chat(make_config(k=4, text="chat", model=save_model(tmp_path / "chat", chat=True), layer=1))
    check_chat(make_config(k=4, text="chat"))
