"""The `cuda` kernel against the definition, through Triton's interpreter on the CPU: run by test_cuda.py.

Not collected by itself: TRITON_INTERPRET=1 must be set before Triton is imported anywhere in the process.
"""

import math
import os

import pytest
import torch
from kernel_cases import apart, assert_same_codes, assert_well_formed, make_params, make_rows, start
from test_cuda import assert_same_metrics
from tiny import save_deep_model
from triton.runtime import interpreter

from saegrid.config.run_config import make_config
from saegrid.core.evaluation import evaluate_rows
from saegrid.core.train import CHECKPOINT, load_checkpoint, train
from saegrid.data.collect import collect, open_store
from saegrid.errors import ConfigError, SaegridError
from saegrid.kernels import cuda, reference
from saegrid.kernels.cuda import stages
from saegrid.kernels.state import Rule, StepSettings

assert os.environ["TRITON_INTERPRET"] == "1"
D_IN, D_SAE, N = 20, 40, 7
RULES = [
    *(Rule("topk", 2), Rule("topk", D_SAE), Rule("batchtopk", 2), Rule("batchtopk", D_SAE)),
    *(Rule("threshold", 0, 200.0), Rule("threshold", 0, 0.0)),
]


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles that these shapes cut and few programs, so that every loop goes round, within an interpreter's patience."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK": 32, "SEGMENT": 4, "TILE_ROWS": 2, "TILE_LATENTS": 32, "PAIRS": 8}.items():
            patch.setattr(stages, name, value)
        patch.setattr(stages, "WIDTH", 16)
        patch.setattr(stages, "PROGRAMS", 3)
        patch.setattr(stages, "PRODUCT_TILE", {"M": 16, "N": 16, "K": 16})
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_once_patched())
        yield


def call_once_patched():
    """A device function's call that does not patch the language anew: a launch has, and it takes most of the time."""
    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:  # Triton's own modules, which no launch patches
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    return call


def params_and_rows(n=N, seed=0, sinks=1):
    return make_params(seed, D_IN, D_SAE), make_rows(n, seed, D_IN, sinks)


def without_bias(params, value):
    return params._replace(b_enc=torch.full((D_SAE,), value))


@pytest.mark.parametrize("rule", RULES)
def test_codes_reconstruction_and_gradients(rule):
    params, x = params_and_rows()
    codes = reference.encode(params, x, rule)
    assert_same_codes(cuda.encode(params, x, rule), codes, params, x)
    assert apart(cuda.decode(params, codes), reference.decode(params, codes)) < 1e-6
    loss, grads = reference.gradients(params, x, codes)
    actual_loss, actual = cuda.gradients(params, x, codes)
    assert actual_loss.item() == pytest.approx(loss, rel=1e-6)
    for name, grad in grads._asdict().items():
        assert apart(getattr(actual, name), grad) < 1e-5, name


STEPS = [(rule, *(((0.0, False), (1.0, True))[place % 2])) for place, rule in enumerate(RULES)]
STEPS += [(RULES[4], 1.0, True), (RULES[5], 0.0, False), (RULES[0], 0.0, True)]


@pytest.mark.parametrize(("rule", "clip", "project"), STEPS)
def test_train_step(rule, clip, project):
    """Two steps, the second of a smaller batch, sinks included: weights and both moments, sparse and dense."""
    settings = StepSettings(1e-2, clip, project)
    params, _ = params_and_rows()
    expected, actual = start(params), start(params)
    for step, n in enumerate([N, N - 2]):
        x = make_rows(n, step, D_IN, 1)
        loss, active = reference.train_step(expected, x, rule, settings)
        actual_loss, actual_active = cuda.train_step(actual, x, rule, settings)
        assert actual_loss.item() == pytest.approx(loss, rel=1e-5) and actual_active.item() == active
        assert actual_loss.shape == actual_active.shape == ()
    for part in ("params", "m", "v"):
        for name, tensor in getattr(expected, part)._asdict().items():
            assert apart(getattr(getattr(actual, part), name), tensor) < 1e-5, (part, name)
    dense = actual.workspace["cuda"]["facts"][1].item()
    assert dense == (active > stages.DENSE_ABOVE * n * D_SAE)


def test_the_rules_above_are_sparse_and_dense():
    params, x = params_and_rows()
    shares = [len(reference.encode(params, x, rule).values) / (N * D_SAE) for rule in RULES]
    assert min(shares) < stages.DENSE_ABOVE < max(shares)
    thresholds = shares[-2:]
    assert 0 < thresholds[0] < stages.DENSE_ABOVE < thresholds[1]


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[4], RULES[5]])
def test_bf16_selects_but_does_not_set_values(rule):
    """The kept values are float32's; the step is the reference's on the same pairs, sparse and dense."""
    params, x = params_and_rows()
    codes, exact = cuda.encode(params, x, rule, "bf16"), reference.encode(params, x, rule)
    assert_well_formed(codes)
    z, z_exact = reference.dense(codes, D_SAE), reference.dense(exact, D_SAE)
    both = (z > 0) & (z_exact > 0)
    assert both.sum() >= 0.9 * (z_exact > 0).sum()
    assert ((z - z_exact).abs() <= 1e-5 * x.norm(dim=1, keepdim=True))[both].all()
    loss, _ = reference.gradients(params, x, codes)
    step_loss, active = cuda.train_step(start(params), x, rule, StepSettings(1e-2, matmul="bf16"))
    assert step_loss.item() == pytest.approx(loss, rel=1e-5) and active.item() == len(codes.values)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_ties(value):
    """Latents and rows that are all alike: the count is exact all the same."""
    params = make_params(0, D_IN, D_SAE)
    params = params._replace(W_enc=torch.full_like(params.W_enc, 0.5), b_pre=torch.zeros(D_IN))
    params, x = without_bias(params, 1.0), torch.full((5, D_IN), value)
    for k in (1, 9):
        for kind in ("topk", "batchtopk"):
            codes = cuda.encode(params, x, Rule(kind, k))
            assert_well_formed(codes)
            assert len(codes.values) == 5 * k
            assert codes.values.unique().tolist() == [value * 0.5 * D_IN + 1]
            if kind == "topk":
                assert (codes.offsets.diff() == k).all()


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[4]])
def test_no_active_pair(rule):
    """Every row empty, every latent dead: biases learn, and Adam still moves all weights by their moments."""
    params, x = params_and_rows()
    params = without_bias(params, -1e6)
    codes = cuda.encode(params, x, rule)
    assert codes.offsets.tolist() == [0] * (N + 1) and len(codes.latents) == len(codes.values) == 0
    assert torch.equal(cuda.decode(params, codes), (params.b_dec + params.b_pre).expand(N, -1))
    expected, actual = start(params), start(params)
    for state in (expected, actual):
        for tensor in state.m:
            tensor.fill_(0.5)
    for kernel, state in ((reference, expected), (cuda, actual)):
        loss, active = kernel.train_step(state, x, rule, StepSettings(1e-2))
        assert float(active) == 0 and math.isfinite(loss)
    for mine, theirs in zip((*actual.params, *actual.m), (*expected.params, *expected.m), strict=True):
        assert apart(mine, theirs) < 1e-6


def test_rows_that_are_empty_beside_full_ones():
    """BatchTopK spends its budget on the sink; other rows go empty."""
    params, x = params_and_rows(sinks=1)
    params = without_bias(params, -300.0)
    rule = Rule("batchtopk", 1)
    codes = cuda.encode(params, x, rule)
    assert_same_codes(codes, reference.encode(params, x, rule), params, x)
    assert codes.offsets[1] > 5 and (codes.offsets.diff() == 0).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_shows_in_the_loss(value):
    params, x = params_and_rows()
    x[3, 5] = value
    for rule in (RULES[0], RULES[2], RULES[5]):
        loss, _ = cuda.train_step(start(params), x, rule, StepSettings(1e-3))
        assert not math.isfinite(loss)


def test_same_bytes_whatever_the_buffers_held():
    params, x = params_and_rows()
    fresh, used, other = start(params), start(params), start(params)
    cuda.train_step(other, make_rows(17, 3, D_IN), RULES[5], StepSettings(1e-3, 1.0))
    used.workspace = other.workspace
    for state in (fresh, used):
        cuda.train_step(state, x, RULES[2], StepSettings(1e-3))
    for part in ("params", "m", "v"):
        assert all(map(torch.equal, getattr(fresh, part), getattr(used, part)))


def test_too_many_pre_activations_are_one_line():
    params, x = params_and_rows()
    params, x = params._replace(b_enc=torch.zeros(1).expand(2**20)), x[:1].expand(2048, -1)
    with pytest.raises(ConfigError, match=r"batch_size \* d_sae = 2048 \* 1048576"):
        cuda.encode(params, x, Rule("topk", 1))


# --- the loop ---


def run_config(folder, **changes):
    places = {
        "model": str(folder),
        "dataset": str(folder),
        "activations": str(folder),
        "store_dir": str(folder / "stores"),
    }
    recipe = {"arch": "BatchTopK", "expansion": 3, "k": 2, "epochs": 2, "batch_size": 16, "lr": 1e-2}
    return make_config(**places | recipe | changes)


@pytest.fixture
def store(tmp_path):
    """A real store of 24 + 16 rows of width 8, from published activation files that are made here."""
    save_deep_model(tmp_path)
    rows = torch.relu(torch.randn(40, 20, generator=torch.Generator().manual_seed(0)) - 0.5) @ make_rows(20, 1, 8)
    for split, part in (("train", rows[:24]), ("val", rows[24:])):
        torch.save(part / 100, tmp_path / f"instruct_base_layer12_{split}.pt")
    config = run_config(tmp_path)
    collect(config)
    return open_store(config)


@pytest.mark.parametrize("arch", ["BatchTopK", "JumpReLU"])
def test_training_ends_as_with_the_reference(store, tmp_path, arch):
    sparsity = {"k": 0, "threshold": 0.1} if arch == "JumpReLU" else {}
    config = run_config(tmp_path, arch=arch, **sparsity)
    expected, by_reference = train(config, store, reference, tmp_path / "reference")
    sae, progress = train(config, store, cuda, tmp_path / "cuda")
    for mine, theirs in zip(sae.params, expected.params, strict=True):
        assert apart(mine, theirs) < 1e-4
    for mine, theirs in zip(progress.curve, by_reference.curve, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    if arch == "BatchTopK":
        assert sae.inference_threshold == pytest.approx(expected.inference_threshold, rel=1e-4)
    metrics, _, _ = evaluate_rows(sae, store, 16, cuda)
    assert metrics == pytest.approx(evaluate_rows(expected, store, 16, reference)[0], rel=1e-3)
    path = tmp_path / "cuda" / CHECKPOINT
    loaded = load_checkpoint(path, expected, config.run_id, store.data_sha256)  # any kernel goes on from it
    assert loaded.curve == progress.curve and loaded.state.step == progress.state.step


def test_a_loss_that_is_read_late_names_its_steps(store, tmp_path, monkeypatch):
    """Tensors are looked at every so many steps, at checkpoints and behind each epoch; none of them with a bad loss."""
    monkeypatch.setattr("saegrid.core.train.CHECK_STEPS", 2)
    sent = store.batches
    monkeypatch.setattr(store, "batches", lambda *args, **named: (x * 1e30 for x in sent(*args, **named)))
    with pytest.raises(SaegridError, match=r"the loss is (inf|nan) at one of the steps 1 to 2; try a smaller"):
        train(run_config(tmp_path), store, cuda, tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_a_whole_run(tmp_path):
    assert_same_metrics(tmp_path)


def test_what_the_kernel_lacks_is_refused():
    """Silence would train another SAE than was asked for."""
    params, x = make_params(), make_rows(8)
    for lacking in ({"aux_coef": 0.03}, {"sink": torch.ones(D_IN)}, {"tie": 1.0}, {"prefixes": (D_SAE // 2, D_SAE)}):
        with pytest.raises(ConfigError, match="kernel = 'cuda': has no AuxK"):
            cuda.train_step(start(params), x, Rule("topk", 4), StepSettings(1e-3)._replace(**lacking))
    for kind in ("jumprelu", "relu", "gated"):
        with pytest.raises(ConfigError, match="no trained thresholds and no L1"):
            cuda.train_step(start(params), x, Rule(kind, 4), StepSettings(1e-3))
