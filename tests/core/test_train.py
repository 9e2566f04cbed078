import json
from types import SimpleNamespace

import pytest
import torch
from tiny import publish, save_deep_model

from saegrid.config.run_config import make_config
from saegrid.core.row_statistics import estimate
from saegrid.core.sae import initial_sae
from saegrid.core.thresholds import calibrated_threshold
from saegrid.core.train import CHECKPOINT, learning_rate, load_checkpoint, train
from saegrid.data.collect import collect, open_store
from saegrid.data.store import Store
from saegrid.errors import DamagedError
from saegrid.kernels import reference


def rows(n, heavy=1.0):
    """Sparse sums of 20 directions in 8 dimensions, (n, 8); the first 64 rows `heavy` times as large."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(20, 8, generator=generator)
    sparse = torch.rand(n, 20, generator=generator)
    x = torch.where(sparse > 0.85, sparse, 0) @ basis
    x[:64] *= heavy
    return x


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a language model of width 8, and of a dataset."""
    return save_deep_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_store(tmp_path, model):
    """A real store, from published activation files that are made here."""

    def make(n_val=100, scale=1.0, heavy=1.0, sinks=0):
        train, val = scale * rows(300 + n_val)[:300], rows(n_val, heavy)
        train[:sinks, 3] += 100.0
        val[:sinks, 3] += 100.0
        files = {"instruct_base_layer12_train.pt": train, "instruct_base_layer12_val.pt": val}
        places = {"activations": publish(tmp_path / "files", files), "store_dir": str(tmp_path / "stores")}
        run = config(model=model, dataset=model, act_dtype="float32", **places)
        collect(run)
        return open_store(run)

    return make


class Interrupted(Store):
    """A store whose reader is stopped after some batches, as by Ctrl-C."""

    stop_after = 0

    def batches(self, split, *args, **kwargs):
        for batch in super().batches(split, *args, **kwargs):
            if split == "train":
                if not self.stop_after:
                    raise KeyboardInterrupt
                self.stop_after -= 1
            yield batch


def config(**changes):
    return make_config(**{"arch": "BatchTopK", "expansion": 3, "k": 3, "epochs": 4, "batch_size": 64} | changes)


def test_the_recipe_against_a_plain_torch_loop(make_store, tmp_path):
    """torch.optim.Adam, autograd, per-step cosine, unit-norm decoder: the same weights."""
    run = config(arch="TopK", epochs=2, lr=1e-2)
    store = make_store()
    ours, progress = train(run, store, reference, tmp_path)

    start = initial_sae(run, 8, store.mean)
    params = [torch.nn.Parameter(tensor.clone()) for tensor in start.params[:5]]
    W_enc, b_enc, W_dec, b_dec, b_pre = params
    optimiser = torch.optim.Adam(params, lr=run.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10)
    for epoch in range(2):
        for x in store.batches("train", 64, run.seed, epoch):
            pre = (x - b_pre) @ W_enc.T + b_enc
            top = pre.topk(3, dim=1)
            z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
            loss = (z @ W_dec + b_dec + b_pre - x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            W_dec.data.div_(W_dec.data.norm(dim=1, keepdim=True))
    assert progress.best_epoch == 1
    for mine, theirs in zip(ours.params[:5], params, strict=True):
        torch.testing.assert_close(mine, theirs.data, rtol=1e-3, atol=1e-5)


def test_training_lowers_the_loss_and_keeps_the_best_epoch(make_store, tmp_path):
    sae, progress = train(config(epochs=8, lr=1e-2), make_store(), reference, tmp_path)
    val = [point["val_mse"] for point in progress.curve]
    assert val[-1] < 0.5 * val[0]
    assert progress.best_epoch == val.index(min(val))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == progress.curve


def test_the_weights_kept_are_those_of_the_best_epoch(make_store, tmp_path):
    store = make_store()
    run = config(epochs=6, lr=1.0)  # so large that later epochs get worse again
    sae, progress = train(run, store, reference, tmp_path)
    sae.inference_threshold = None
    sq_error = sum((sae(x) - x).double().square().sum().item() for x in store.batches("val", 64))
    assert sq_error / store.rows("val").numel() == pytest.approx(progress.best_val_mse, rel=1e-6)


@pytest.mark.parametrize("stop_after", [0, 1, 7, 13])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"recipe": "improved", "dead_window": 0.1},
        {"recipe": "improved", "freeze": "soft"},
        {"freeze": "encoder"},
        *({"recipe": "improved", "arch": a} for a in ("Matryoshka", "JumpReLU", "ReLU", "Gated")),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(make_store, tmp_path, stop_after, changes):
    run = config(checkpoint_steps=3, **changes)
    store = make_store(sinks=5)
    whole, progress = train(run, store, reference, tmp_path / "whole")
    broken = Interrupted(store.folder)
    broken.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        train(run, broken, reference, tmp_path / "resumed")
    seen = []
    resumed, again = train(run, store, reference, tmp_path / "resumed", report=seen.append)
    assert all(torch.equal(a, b) for a, b in zip(whole.params, resumed.params, strict=True))
    assert whole.inference_threshold == resumed.inference_threshold
    assert again.curve == progress.curve
    assert sum(seen) == 4 * 300
    curves = [(tmp_path / folder / "metrics.jsonl").read_bytes() for folder in ("whole", "resumed")]
    assert curves[0] == curves[1]


def test_a_frozen_decoder_is_the_seeds(make_store, tmp_path):
    run, store = config(recipe="improved", freeze="decoder"), make_store(sinks=5)
    found = estimate(run, store)
    begin = initial_sae(run, 8, found.mean, found.sink)
    sae, progress = train(run, store, reference, tmp_path)
    assert torch.equal(sae.W_dec, begin.W_dec) and not torch.allclose(sae.W_enc, begin.W_enc, atol=1e-2)
    assert progress.curve[-1]["val_mse"] < progress.curve[0]["val_mse"]


def test_a_damaged_checkpoint_is_named(make_store, tmp_path):
    train(config(epochs=1), make_store(), reference, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedError, match=r"checkpoint\.safetensors: damaged checkpoint"):
        load_checkpoint(path, initial_sae(config(), 8, torch.zeros(8)), config().run_id, "")


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_annealing(final):
    run = config(lr=1e-3, lr_final=final)
    assert learning_rate(run, 0, 100) == pytest.approx(1e-3)
    assert learning_rate(run, 50, 100) == pytest.approx((1e-3 + final * 1e-3) / 2)
    assert learning_rate(run, 100, 100) == pytest.approx(final * 1e-3)


def test_linear_decay_and_warm_up():
    run = config(lr=1e-3, lr_schedule="linear", warmup=0.1, lr_final=0.1)
    rates = [learning_rate(run, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert rates[10:81] == pytest.approx([1e-3] * 71)
    assert rates[90] == pytest.approx(0.55e-3) and rates[100] == pytest.approx(1e-4)


def test_estimates_leave_the_sinks_out(make_store):
    store = make_store(sinks=5)
    x = store.rows("train")
    plain = estimate(config(b_pre_init="mean"), store)
    assert torch.equal(plain.mean, store.mean) and plain.scale == 1.0 and plain.sink is None
    found = estimate(config(recipe="improved"), store)
    ordinary_rows = x[:, 3] < 50
    ordinary = x[ordinary_rows].double()
    assert len(ordinary) == 295
    assert found.scale == pytest.approx(ordinary.square().mean().sqrt().item())
    torch.testing.assert_close(found.mean, (ordinary.mean(0) / found.scale).float())
    assert found.sink.norm().item() == pytest.approx(1.0) and found.sink[3] > 0.999
    assert x[ordinary_rows].norm(dim=1).max() <= found.limit < x[~ordinary_rows].norm(dim=1).min()
    assert estimate(config(recipe="improved"), store).sink.equal(found.sink)


def test_improved_reconstructs_better_and_keeps_the_sinks_apart(make_store, tmp_path):
    """What training leaves in the weights, in the units of the rows as they are."""
    store = make_store(sinks=5)
    x = store.rows("val")
    error = {}
    for recipe in ("published", "improved"):
        sae, _ = train(config(recipe=recipe, epochs=30), store, reference, tmp_path / recipe)
        error[recipe] = (sae(x) - x)[5:].square().mean().item()
    assert error["improved"] < 0.5 * error["published"]
    sink = estimate(config(recipe="improved"), store).sink
    assert (sae.W_enc[2:] @ sink).abs().max() < 1e-5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert ((sae(x) - x)[:5].norm(dim=1) < 0.1 * x[:5].norm(dim=1)).all()


@pytest.mark.parametrize("batch_size", [64, 1])
def test_no_step_sees_a_sink_that_is_apart(make_store, tmp_path, batch_size):
    """With batches of one row, those of a sink are no step; rows are reported all the same."""
    store, largest, rows = make_store(sinks=5), [], []

    def step(state, x, rule, settings):
        largest.append(x.norm(dim=1).max().item())
        assert settings.tie == 3.0
        return reference.train_step(state, x, rule, settings)

    kernel = SimpleNamespace(train_step=step, encode=reference.encode, decode=reference.decode)
    for sinks, most in (("keep", 1000), ("apart", 20)):
        run = config(recipe="improved", sinks=sinks, epochs=1, batch_size=batch_size)
        _, progress = train(run, store, kernel, tmp_path / sinks, report=rows.append)
        assert most / 20 < max(largest) < most
        assert sum(rows) == 300 and progress.state.step == -(-(300 - 5 * (sinks == "apart")) // batch_size)
        assert progress.curve[0]["rows"] == 300
        largest.clear(), rows.clear()


def test_sinks_of_another_direction_are_trained_on(make_store):
    """What one direction does not hold is no ordinary row's remainder."""
    store = make_store(sinks=5)
    x = store.rows("train")
    found = estimate(config(recipe="improved"), store)
    assert found.to_train_on(x).sum() == 295
    x[0] = torch.tensor([0, 0, 100.0, 0, 0, 0, 0, 0])
    assert found.to_train_on(x).sum() == 296


def test_matryoshka_has_its_best_latents_first(make_store, tmp_path):
    """What the first half of the latents reconstructs alone, against BatchTopK's first half."""
    store = make_store()
    x, error = store.rows("val"), {}
    for arch in ("BatchTopK", "Matryoshka"):
        sae, _ = train(config(arch=arch, recipe="improved", lr=1e-2, epochs=30), store, reference, tmp_path / arch)
        z = sae.encode(x)
        assert (z > 0).sum(1).double().mean().item() == pytest.approx(3)
        z[:, 12:] = 0
        error[arch] = (sae.decode(z) - x).square().mean().item()
    assert error["Matryoshka"] < 0.7 * error["BatchTopK"]


def test_jumprelu_lands_on_its_target(make_store, tmp_path):
    """Exactly on the rows that it is calibrated on, in each latent with a threshold of its own."""
    store = make_store(sinks=5)
    run = config(arch="JumpReLU", recipe="improved", lr=1e-2, epochs=20)
    sae, progress = train(run, store, reference, tmp_path)
    active = (sae.encode(store.rows("val")) > 0).sum().item()
    assert active == 3 * store.n_val
    assert {point["val_l0"] for point in progress.curve} == {3.0}
    assert sae.theta.unique().numel() > 12 and sae.theta.min() >= 0 and sae.threshold == 0


def test_gated_lands_on_its_target_and_relu_near_it(make_store, tmp_path):
    """On held-out rows: Gated has a threshold to calibrate, ReLU aims lower on its training rows."""
    store = make_store(sinks=5)
    for arch in ("Gated", "ReLU"):
        run = config(arch=arch, recipe="improved", lr=1e-2, epochs=60)
        sae, progress = train(run, store, reference, tmp_path / arch)
        l0 = (sae.encode(store.rows("val")) > 0).sum().item() / store.n_val
        assert l0 == pytest.approx(3, rel=1e-9 if arch == "Gated" else 0.1), arch
        assert progress.state.l1 != 1.0 and len(sae.gain) == 0
    assert sae.threshold == 0 and not len(sae.theta)


def test_auxk_leaves_fewer_latents_dead(make_store, tmp_path):
    store = make_store()
    for aux_coef in (0.0, 1 / 32):
        run = config(expansion=8, k=1, lr=3e-3, epochs=40, aux_coef=aux_coef)
        _, progress = train(run, store, reference, tmp_path / str(aux_coef))
        if not aux_coef:
            without = progress.curve[-1]["val_dead_pct"]
    assert progress.curve[-1]["val_dead_pct"] < without - 5


@pytest.mark.parametrize("heavy", [1.0, 100.0])
def test_the_calibrated_threshold_keeps_k_a_row(make_store, heavy):
    """Also where one batch's rows outweigh all others."""
    store = make_store(n_val=256, heavy=heavy)
    sae = initial_sae(config(), 8, store.mean)
    sae.inference_threshold = calibrated_threshold(sae, store, 64, reference)
    codes = sae.encode(store.rows("val"))
    assert (codes > 0).sum() == 3 * 256


def test_the_threshold_is_zero_where_too_few_are_positive(make_store):
    sae = initial_sae(config(k=24), 8, torch.zeros(8))
    assert calibrated_threshold(sae, make_store(), 64, reference) == 0.0


def test_theta_in_units_of_the_pre_activations(make_store, tmp_path):
    store = make_store()
    run = config(arch="JumpReLU", k=0, threshold=0.5, threshold_unit="rms", epochs=1)
    sae, _ = train(run, store, reference, tmp_path)
    start = initial_sae(run, 8, store.mean)
    x = store.rows("train")[:64]
    pre = (x - start.b_pre) @ start.W_enc.T + start.b_enc
    norms = x.norm(dim=1)
    assert sae.threshold == pytest.approx(
        0.5 * pre[norms <= 10 * norms.median()].square().mean().sqrt().item(), rel=1e-5
    )
