"""The fast kernels against the definition, and the definition against autograd."""

import copy
import logging
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import D_IN, D_SAE, apart, assert_same_codes, assert_well_formed, dense, make_params, make_rows, start

from saegrid import kernels
from saegrid.core.thresholds import start_of_theta
from saegrid.errors import ConfigError
from saegrid.kernels import cpu, reference
from saegrid.kernels.cpu import codes as cpu_codes
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


def slope(parameter: torch.Tensor) -> torch.Tensor:
    """Its gradient; 0 where the loss does not depend on it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


RULES = [
    Rule("topk", 9),
    Rule("topk", D_SAE),
    Rule("batchtopk", 9),
    Rule("batchtopk", D_SAE),
    Rule("threshold", 0, 30.0),
    Rule("threshold", 0, 0.1),
    Rule("threshold", 0, 0.0),
]
rules = st.one_of(
    st.builds(Rule, st.sampled_from(["topk", "batchtopk"]), st.integers(1, D_SAE)),
    st.builds(Rule, st.just("threshold"), st.just(0), st.floats(0.0, 60.0, width=32)),
)


# --- the definition ---


@pytest.mark.parametrize("rule", RULES)
def test_reference_gradients_are_autograd(rule):
    """Dense, in float64, straight from the formulas: topk and relu as masks, mean squared error, autograd."""
    params = Params(*(p.double().requires_grad_() for p in make_params()))
    x = make_rows(40).double()
    pre = (x - params.b_pre) @ params.W_enc.T + params.b_enc
    if rule.kind == "topk":
        cut = pre.sort(dim=1, descending=True).values[:, rule.k - 1 : rule.k]
        z = torch.where(pre >= cut, pre, 0).relu()
    elif rule.kind == "batchtopk":
        cut = pre.flatten().sort(descending=True).values[len(x) * rule.k - 1]
        z = torch.where(pre >= cut, pre, 0).relu()
    else:
        z = torch.where(pre > rule.threshold, pre, 0).relu()
    loss = torch.nn.functional.mse_loss(z @ params.W_dec + params.b_dec + params.b_pre, x)
    loss.backward()

    single = Params(*(p.detach().float() for p in params))
    codes = reference.encode(single, x.float(), rule)
    assert apart(dense(codes), z.detach()) < 1e-5
    actual_loss, grads = reference.gradients(single, x.float(), codes)
    assert actual_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, grad in grads._asdict().items():
        assert apart(grad, slope(getattr(params, name))) < 1e-5, name


def test_reference_by_hand():
    """One row, two latents, d_in 2: every number by hand."""
    params = Params(
        torch.tensor([[1.0, 0.0], [0.0, 2.0]]),
        torch.tensor([0.5, 0.0]),
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([1.0, 0.0]),
    )
    x = torch.tensor([[2.0, 3.0]])  # centred (1, 3), pre (1.5, 6)
    codes = reference.encode(params, x, Rule("topk", 1))
    assert codes.latents.tolist() == [1] and codes.values.tolist() == [6.0]
    # x_hat = 6 * (0.6, 0.8) + (0, 1) + (1, 0) = (4.6, 5.8); error (2.6, 2.8); d_hat = 2 / 2 * error
    loss, grads = reference.gradients(params, x, codes)
    assert loss == pytest.approx((2.6**2 + 2.8**2) / 2, rel=1e-6)
    d_z = 0.6 * 2.6 + 0.8 * 2.8  # 3.8
    expected = Params(
        torch.tensor([[0.0, 0.0], [d_z, 3 * d_z]]),
        torch.tensor([0.0, d_z]),
        torch.tensor([[0.0, 0.0], [6 * 2.6, 6 * 2.8]]),
        torch.tensor([2.6, 2.8]),
        torch.tensor([2.6, 2.8 - 2 * d_z]),
    )
    for grad, by_hand in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, by_hand)


@pytest.mark.parametrize(("grad_clip", "project_grad"), [(0.0, False), (1.0, False), (0.0, True), (1.0, True)])
@pytest.mark.parametrize("tie", [0.0, 3.0])
@pytest.mark.parametrize("freeze", ["none", "decoder", "encoder"])
def test_reference_step_is_torch_adam(grad_clip, project_grad, tie, freeze):
    """Against torch's own Adam and clipping, with unit norm decoder rows after each step, without frozen weights."""
    state, rule = start(make_params()), Rule("batchtopk", 9)
    weights = [torch.nn.Parameter(p.clone()) for p in state.params]
    frozen = {"none": None, "encoder": 0, "decoder": 2}[freeze]
    trained = [weight for n, weight in enumerate(weights) if n != frozen]
    adam = torch.optim.Adam(trained, lr=1e-2)
    told = StepSettings(1e-2, grad_clip, project_grad, tie=tie, freeze=freeze)
    told = told._replace(start=state.params[frozen].clone() if frozen is not None else None)
    for step in range(4):
        x = make_rows(64, seed=step)
        codes = reference.encode(Params(*weights), x, rule)
        _, grads = reference.gradients(Params(*(w.detach() for w in weights)), x, codes)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        w_dec = weights[2]
        if project_grad:
            unit = w_dec.detach() / w_dec.detach().norm(dim=1, keepdim=True)
            w_dec.grad -= (w_dec.grad * unit).sum(1, keepdim=True) * unit
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(trained, grad_clip)
        adam.step()
        with torch.no_grad():
            if freeze != "decoder":
                w_dec /= w_dec.norm(dim=1, keepdim=True)
            if freeze != "encoder":
                weights[0] += 1e-2 * tie * (w_dec - weights[0])
        reference.train_step(state, x, rule, told)
    for mine, theirs in zip(state.params, weights, strict=True):
        assert apart(mine, theirs.detach()) < 1e-5


def test_softly_frozen_rows_turn_back_to_a_cosine_of_0_8():
    """By hand, in the plane: (0.6, 0.8) becomes (0.8, 0.6), and the opposite of the start becomes the start."""
    begin = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    w_dec = torch.tensor([[0.6, 0.8], [0.96, -0.28], [-0.6, -0.8], [-1.0, 0.0]])
    params = make_params()._replace(W_dec=w_dec, W_enc=torch.zeros(4, 2))
    reference.hold_and_tie(params, StepSettings(0.1, freeze="soft", start=begin, tie=5.0), 0.5)
    by_hand = torch.tensor([[0.8, 0.6], [0.96, -0.28], [0.8, -0.6], [1.0, 0.0]])
    torch.testing.assert_close(params.W_dec, by_hand)
    torch.testing.assert_close(params.W_enc, by_hand / 2)  # the tie follows the rows as they are held


@pytest.mark.parametrize("kernel", [reference, cpu])
@pytest.mark.parametrize("rule", [Rule("topk", 9), Rule("relu", 20), Rule("gated", 20), Rule("jumprelu", 20)], ids=str)
@pytest.mark.parametrize("freeze", ["decoder", "encoder", "soft"])
def test_what_is_frozen_stays(kernel, rule, freeze):
    sink = torch.nn.functional.normalize(torch.ones(D_IN), dim=0)
    params = {"gated": gated_params, "jumprelu": jump_params}.get(rule.kind, make_params)()
    reference.keep_apart(params, sink)
    state, held = start(params), "W_enc" if freeze == "encoder" else "W_dec"
    told = StepSettings(0.1, tie=3.0, sink=sink, l1_coef=1.0, bandwidth=3.0, l0_coef=500.0, freeze=freeze)
    begin = getattr(params, held)
    for step in range(5):
        kernel.train_step(state, make_rows(100, step), rule, told._replace(start=begin))
    cosine = torch.nn.functional.cosine_similarity(getattr(state.params, held), begin)
    if freeze == "soft":
        assert cosine.min() > 0.8 - 1e-5 and (cosine < 0.8 + 1e-5).any()
        torch.testing.assert_close(state.params.W_dec.norm(dim=1), torch.ones(D_SAE))
    else:
        torch.testing.assert_close(getattr(state.params, held), begin, rtol=0, atol=1e-5)
    other = "W_dec" if held == "W_enc" else "W_enc"
    assert not torch.allclose(getattr(state.params, other), getattr(params, other), atol=1e-2)


def test_reference_matryoshka_is_autograd():
    """The mean over prefixes of the loss of a code that is cut once, by autograd in float64."""
    params = Params(*(p.double().requires_grad_() for p in make_params()))
    x, prefixes = make_rows(40).double(), (D_SAE // 8, D_SAE // 3, D_SAE)
    pre = (x - params.b_pre) @ params.W_enc.T + params.b_enc
    cut = pre.flatten().sort(descending=True).values[len(x) * 9 - 1]
    z = torch.where(pre >= cut, pre, 0).relu()
    losses = []
    for end in prefixes:
        x_hat = z[:, :end] @ params.W_dec[:end] + params.b_dec + params.b_pre
        losses.append((x_hat - x).square().mean())
    (sum(losses) / 3).backward()

    single = Params(*(p.detach().float() for p in params))
    codes = reference.encode(single, x.float(), Rule("batchtopk", 9))
    loss, grads = reference.matryoshka_gradients(single, x.float(), codes, prefixes)
    assert loss == pytest.approx(losses[-1].item(), rel=1e-5)
    for name, grad in grads._asdict().items():
        assert apart(grad, slope(getattr(params, name))) < 1e-5, name


def test_reference_auxk_is_autograd():
    """The dead latents' reconstruction of the detached residual, by autograd in float64."""
    params = Params(*(p.double().requires_grad_() for p in make_params()))
    x, k = make_rows(40).double(), 7
    dead = torch.arange(D_SAE) % 5 == 0
    single = Params(*(p.detach().float() for p in params))
    codes = reference.encode(single, x.float(), Rule("topk", 9))
    residual = (x.float() - reference.decode(single, codes)).double()
    pre = ((x - params.b_pre) @ params.W_enc.T + params.b_enc)[:, dead]
    top = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    loss = (z @ params.W_dec[dead] - residual).square().mean() / residual.var(0, correction=0).mean()
    loss.backward()

    actual_loss, grads = reference.auxk_gradients(single, x.float(), codes, dead, k)
    assert actual_loss == pytest.approx(loss.item(), rel=1e-5)
    assert params.b_dec.grad is None and not grads.b_dec.any()
    for name in ("W_enc", "b_enc", "W_dec", "b_pre"):
        assert apart(getattr(grads, name), getattr(params, name).grad) < 1e-5, name
    assert not grads.W_enc[~dead].any() and grads.W_enc[dead].any()


class Jump(torch.autograd.Function):
    """H(pre - theta), and pre H(pre - theta), with the paper's pseudo-derivatives (arXiv:2407.14435, eq. 11, 12)."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        active = (pre > theta).double()
        return active, pre * active

    @staticmethod
    def backward(ctx, g_active, g_z):
        pre, theta = ctx.saved_tensors
        window = ((pre - theta).abs() < ctx.bandwidth / 2).double() / ctx.bandwidth
        g_theta = -(window * (theta * g_z + g_active)).sum(0)
        return g_z * (pre > theta), g_theta, None


THETA = torch.linspace(5.0, 40.0, D_SAE)


def jump_params(seed: int = 0) -> Params:
    return make_params(seed)._replace(theta=THETA)


def test_reference_jumprelu_is_autograd():
    """Squared error and (L0 / k - 1)² through the pseudo-derivatives, by autograd in float64."""
    params = Params(*(p.double().requires_grad_() for p in jump_params()))
    x, k, told = make_rows(40).double(), 20, StepSettings(0.0, bandwidth=3.0, l0_coef=500.0)
    pre = (x - params.b_pre) @ params.W_enc.T + params.b_enc
    active, z = Jump.apply(pre, params.theta, told.bandwidth)
    error = torch.nn.functional.mse_loss(z @ params.W_dec + params.b_dec + params.b_pre, x)
    (error + told.l0_coef * (active.sum(1).mean() / k - 1) ** 2).backward()

    single = Params(*(p.detach().float() for p in params))
    codes = reference.encode(single, x.float(), Rule("jumprelu", k))
    assert apart(dense(codes), z.detach()) < 1e-5
    wide = reference.above_theta(reference.encode, single, x.float(), "fp32", told.bandwidth / 2)
    assert len(wide.values) > len(codes.values) == (wide.values > 0).sum()
    loss, grads = reference.jumprelu_gradients(single, x.float(), wide, k, told)
    assert loss == pytest.approx(error.item(), rel=1e-5)
    for name, grad in grads._asdict().items():
        if name == "gain":
            continue
        assert grad.any() and apart(grad, getattr(params, name).grad) < 1e-5, name


def test_reference_l1_is_autograd():
    """Squared error and the weighted sum of ReLU's latents, by autograd in float64."""
    params = Params(*(p.double().requires_grad_() for p in make_params()))
    x, told = make_rows(40).double(), StepSettings(0.0, l1_coef=700.0)
    z = ((x - params.b_pre) @ params.W_enc.T + params.b_enc).relu()
    error = torch.nn.functional.mse_loss(z @ params.W_dec + params.b_dec + params.b_pre, x)
    (error + told.l1_coef / D_IN * z.sum(1).mean()).backward()

    single = Params(*(p.detach().float() for p in params))
    codes = reference.encode(single, x.float(), Rule("relu", 9))
    assert apart(dense(codes), z.detach()) < 1e-5
    push = start(single).l1_push(x, Rule("relu", 9), told)
    loss, grads = reference.gradients(single, x.float(), codes, push)
    assert loss == pytest.approx(error.item(), rel=1e-5)
    for name, grad in grads._asdict().items():
        assert apart(grad, slope(getattr(params, name))) < 1e-5, name
    kernel_loss, kernel_grads = cpu.gradients(single, x.float(), codes, push)
    assert kernel_loss == pytest.approx(loss, rel=1e-5)
    assert all(apart(mine, theirs) < 1e-5 for mine, theirs in zip(kernel_grads, grads, strict=True))


def gated_params(seed: int = 0) -> Params:
    return make_params(seed)._replace(theta=torch.linspace(-10.0, 20.0, D_SAE), gain=torch.linspace(-0.5, 0.5, D_SAE))


def test_reference_gated_is_autograd():
    """The paper's three losses in its own parameters (W_gate, r_mag, b_gate, b_mag), by autograd in float64."""
    params = Params(*(p.double().requires_grad_() for p in gated_params()))
    x, push = make_rows(40).double(), 0.03
    product = (x - params.b_pre) @ params.W_enc.T
    gate = product + params.b_enc
    b_mag = params.gain.exp() * params.b_enc + params.theta
    z = (gate > 0) * (params.gain.exp() * product + b_mag).relu()
    bias = params.b_dec + params.b_pre
    error = torch.nn.functional.mse_loss(z @ params.W_dec + bias, x)
    frozen = torch.nn.functional.mse_loss(gate.relu() @ params.W_dec.detach() + bias.detach(), x)
    (error + frozen + push * gate.relu().sum()).backward()

    single = Params(*(p.detach().float() for p in params))
    opened = reference.encode(single, x.float(), Rule("relu"))
    codes = reference.magnitudes(single, opened)
    assert apart(dense(codes), z.detach()) < 1e-5 and (codes.values == 0).any()
    loss, grads = reference.gated_gradients(single, x.float(), opened, codes, push)
    assert loss == pytest.approx(error.item(), rel=1e-5)
    for name, grad in grads._asdict().items():
        assert grad.any() and apart(grad, getattr(params, name).grad) < 1e-5, name


@pytest.mark.parametrize("kernel", [reference, cpu])
def test_a_gated_sae_is_a_jumprelu(kernel):
    params, x = gated_params(), make_rows(60)
    trained = reference.magnitudes(params, kernel.encode(params, x, Rule("relu")))
    used = kernel.encode(reference.folded_gate(params), x, Rule("jumprelu"))
    assert_same_codes(used, reference._sparse(dense(trained), dense(trained) > 0), params, x)
    assert_same_codes(kernel.encode(params, x, Rule("gated")), used, params, x)


# --- the cpu kernel against the definition ---


def stepped(
    params: Params, rule: Rule, told: StepSettings, rows: int = 100, sinks: int = 0, dead: bool = True
) -> tuple[TrainState, TrainState]:
    """States of the reference and of the cpu kernel after three steps, each checked to agree; the last batch is small.

    `dead`: a third of the latents is dead at the start; more die on the way.
    """
    expected, actual = start(params), start(params)
    for state in (expected, actual) if dead else ():
        state.quiet[::3] = 150
        state.params.b_enc[::3] = -100.0  # they fire on no row, or hardly any
    for step, n in enumerate([rows, rows, 37]):
        x = make_rows(n, step, sinks=sinks)
        loss, active = reference.train_step(expected, x, rule, told)
        actual_loss, actual_active = cpu.train_step(actual, x, rule, told)
        assert actual_loss == pytest.approx(loss, rel=1e-4)
        assert abs(actual_active - active) <= 1 + 2e-3 * active
        assert (actual.quiet != expected.quiet).sum() <= 1
        actual.quiet.copy_(expected.quiet)
        actual.params = Params(*(p.clone() for p in expected.params))  # no near-tie that one step turns is passed on
        for moments in ("m", "v"):
            for name, mine, theirs in zip(
                Params._fields, getattr(actual, moments), getattr(expected, moments), strict=True
            ):
                assert apart(mine, theirs) < 1e-3, (moments, name)
    return expected, actual


@pytest.mark.parametrize(("grad_clip", "project_grad"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("aux_coef", [0.0, 1 / 32])
def test_cpu_train_step_with_trained_thresholds(grad_clip, project_grad, aux_coef):
    told = StepSettings(1e-2, grad_clip, project_grad, "fp32", aux_coef, 20, 150, bandwidth=3.0, l0_coef=500.0)
    expected, _ = stepped(jump_params(), Rule("jumprelu", 20), told)
    assert (expected.params.theta != THETA).any() and expected.params.theta.min() >= 0


@pytest.mark.parametrize(("grad_clip", "project_grad"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("freeze", ["decoder", "encoder", "soft"])
@pytest.mark.parametrize("prefixes", [(), (24, 48, D_SAE)])
def test_cpu_train_step_with_frozen_weights(grad_clip, project_grad, freeze, prefixes):
    params = make_params()
    begin = params.W_enc if freeze == "encoder" else params.W_dec
    told = StepSettings(1e-2, grad_clip, project_grad, "fp32", 1 / 32, 20, 150, tie=3.0, prefixes=prefixes)
    told = told._replace(freeze=freeze, start=begin.clone())
    expected, actual = stepped(params, Rule("batchtopk", 9), told)
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert torch.equal(mine, theirs)  # as `stepped` leaves them
    for kernel, state in ((cpu, actual), (reference, expected)):
        kernel.train_step(state, make_rows(100, 9), Rule("batchtopk", 9), told)
    for name, mine, theirs in zip(Params._fields, actual.params, expected.params, strict=True):
        assert apart(mine, theirs) < 1e-3, name


@pytest.mark.parametrize("kernel", [reference, cpu])
def test_the_encoder_goes_no_further_than_to_the_decoder(kernel):
    state = start(make_params())
    kernel.train_step(state, make_rows(100), Rule("topk", 9), StepSettings(1e-2, tie=1e3))
    torch.testing.assert_close(state.params.W_enc, state.params.W_dec)


@pytest.mark.parametrize("kernel", [reference, cpu])
def test_trained_thresholds_are_drawn_to_their_mean(kernel):
    """By the tie's share of the distance, after Adam's step, and never beyond the mean."""
    told = StepSettings(1e-2, bandwidth=3.0, l0_coef=500.0)
    x, thetas = make_rows(100), []
    for tie in (0.0, 2.0, 1e3):
        params = jump_params()
        state = start(params._replace(theta=THETA.clone()))
        kernel.train_step(state, x, Rule("jumprelu", 20), told._replace(theta_tie=tie))
        thetas.append(state.params.theta)
    free, drawn, one = thetas
    torch.testing.assert_close(drawn, free + 0.2 * (free.mean() - free))
    torch.testing.assert_close(one, free.mean().expand_as(one))
    assert free.std() > 5


@pytest.mark.parametrize(("grad_clip", "project_grad"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("aux_coef", [0.0, 1 / 32])
@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_cpu_train_step_under_l1(kind, grad_clip, project_grad, aux_coef):
    told = StepSettings(1e-2, grad_clip, project_grad, "fp32", aux_coef, 20, 150, l1_coef=500.0)
    expected, actual = stepped(gated_params() if kind == "gated" else make_params(), Rule(kind, 20), told)
    assert expected.l1 == pytest.approx(actual.l1) != 1.0
    if kind == "gated":
        assert (expected.params.gain != gated_params().gain).any() and (expected.params.theta < 0).any()


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
def test_cpu_train_step_under_l1_with_sinks_apart(kind, matmul):
    """Three steps with a blind direction; a dense start (half of the latents) takes plain products for relu."""
    sink = torch.nn.functional.normalize(torch.ones(D_IN), dim=0)
    told = StepSettings(1e-2, matmul=matmul, l1_coef=500.0, sink=sink, tie=3.0)
    params = gated_params() if kind == "gated" else make_params()
    params = params._replace(b_enc=params.b_enc + 100.0)  # nearly all of them
    expected, actual = start(params), start(params)
    for step in range(3):
        x = make_rows(100, step)
        loss, active = reference.train_step(expected, x, Rule(kind, 20), told._replace(matmul="fp32"))
        assert cpu.train_step(actual, x, Rule(kind, 20), told) == (
            pytest.approx(loss, rel=1e-3),
            pytest.approx(active, 0.01),
        )
        assert active > 0.5 * 100 * D_SAE
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert apart(mine, theirs) < 1e-2 if len(theirs) else not len(mine)
    assert (actual.params.W_enc[2:] @ sink).abs().max() < 1e-5
    for params in (actual.params, expected.params):
        for weights in (params.W_enc, params.W_dec):
            assert torch.equal(weights[:2], torch.stack([sink, -sink]))
        assert not params.gain[:2].any()


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_l1_finds_its_weight(kind):
    """L0 comes to k from a weight that is too small, and from one that is too large."""
    x = make_rows(512) / 145 * D_IN**0.5
    for coef in (0.05, 5.0):
        params, told = make_params(), StepSettings(3e-3, l1_coef=coef)
        cut = start_of_theta(params, x, 16)
        params = params._replace(b_enc=params.b_enc - cut)
        if kind == "gated":
            params = params._replace(theta=torch.full((D_SAE,), cut), gain=torch.zeros(D_SAE))
        state = start(params)
        counts = [cpu.train_step(state, x, Rule(kind, 16), told)[1] / len(x) for _ in range(1000)]
        assert sum(counts[-200:]) / 200 == pytest.approx(16, rel=0.05), (coef, state.l1)


def test_trained_thresholds_find_their_l0():
    """The penalty brings L0 to k, from a cut that keeps twice as many and from one that keeps half."""
    x = make_rows(512) / 145 * D_IN**0.5
    for start_at in (32, 8):
        theta, told = start_of_theta(make_params(), x, start_at), StepSettings(1e-2, bandwidth=0.3, l0_coef=10.0)
        state = start(make_params()._replace(theta=torch.full((D_SAE,), theta)))
        for _ in range(400):
            _, active = cpu.train_step(state, x, Rule("jumprelu", 16), told)
        assert active / len(x) == pytest.approx(16, rel=0.05), start_at


@settings(max_examples=60)
@given(n=st.integers(1, 512), rule=rules, seed=st.integers(0, 999), sinks=st.integers(0, 3))
def test_cpu_matches_reference(n, rule, seed, sinks):
    params, x = make_params(seed), make_rows(n, seed, sinks=min(sinks, n))
    codes = reference.encode(params, x, rule)
    assert_same_codes(cpu.encode(params, x, rule), codes, params, x)
    x_hat = reference.decode(params, codes)
    assert ((cpu.decode(params, codes) - x_hat).norm(dim=1) <= 1e-5 * (x.norm(dim=1) + x_hat.norm(dim=1))).all()
    loss, grads = reference.gradients(params, x, codes)
    actual_loss, actual = cpu.gradients(params, x, codes)
    assert actual_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads._asdict().items():
        assert apart(getattr(actual, name), grad) < 1e-5, name


@pytest.mark.parametrize("share", [0.02, 0.6])
def test_cpu_gradients_sparse_and_dense(share):
    """Both ways to the gradients, loops over pairs and plain products, at shapes that no vector width divides."""
    params, x = make_params(3, 77, 131), make_rows(45, 3, 77, sinks=1)
    codes = reference.encode(params, x, Rule("batchtopk", int(share * 131)))
    assert cpu._is_dense(codes, params) == (share > 0.5)
    loss, grads = reference.gradients(params, x, codes)
    actual_loss, actual = cpu.gradients(params, x, codes)
    assert actual_loss == pytest.approx(loss, rel=1e-5)
    for mine, expected in zip(actual, grads, strict=True):
        assert apart(mine, expected) < 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("grad_clip", "project_grad"), [(0.0, False), (1.0, False), (1e9, False), (0.0, True), (1.0, True)]
)
def test_cpu_train_step(rule, grad_clip, project_grad):
    """Several steps, the last batch a partial one, sinks included: weights and both moments."""
    told = StepSettings(1e-2, grad_clip, project_grad)
    expected, actual = stepped(make_params(), rule, told, rows=200, sinks=1, dead=False)
    assert actual.step == expected.step == 3


@pytest.mark.parametrize(
    "told", [StepSettings(1e-4), StepSettings(1e-4, tie=300.0), StepSettings(1e-4, 1.0, tie=300.0)]
)
def test_cpu_train_step_stays_close(told):
    """Ten steps with no near-ties: every tensor of the state to 1e-5."""
    expected, actual = start(make_params()), start(make_params())
    for step in range(10):
        x = make_rows(100, step)
        reference.train_step(expected, x, Rule("threshold", 0, 20.0), told)
        cpu.train_step(actual, x, Rule("threshold", 0, 20.0), told)
    for part in ("params", "m", "v"):
        for name, mine, theirs in zip(Params._fields, getattr(actual, part), getattr(expected, part), strict=True):
            assert apart(mine, theirs) < 1e-4, (part, name)
    torch.testing.assert_close(actual.params.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("rule", [Rule("topk", 9), Rule("batchtopk", 9), Rule("threshold", 0, 0.0)])
@pytest.mark.parametrize(("grad_clip", "project_grad"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize(("aux_coef", "prefixes"), [(1 / 32, ()), (0.0, (5, 40, D_SAE)), (1 / 32, (5, 40, D_SAE))])
def test_cpu_train_step_with_auxk_and_prefixes(rule, grad_clip, project_grad, aux_coef, prefixes):
    """A low threshold makes the code dense."""
    sink = torch.nn.functional.normalize(torch.randn(D_IN, generator=torch.Generator().manual_seed(0)), dim=0)
    sink = sink if aux_coef else None
    told = StepSettings(1e-2, grad_clip, project_grad, "fp32", aux_coef, 20, 150, sink, prefixes, tie=3.0)
    expected, actual = stepped(make_params(), rule, told)
    if sink is not None:
        for part in (expected.m.W_enc, expected.params.W_enc[2:], actual.m.W_enc):
            assert (part @ sink).abs().max() < 1e-4 * part.norm(dim=1).max()
    assert not aux_coef or ((expected.quiet >= 150).any() and (expected.quiet == 0).any())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_cpu_train_step_with_the_whole_dictionary_as_its_only_prefix(grad_clip):
    """With a code so dense that plain products are used: the step without prefixes."""
    settings = StepSettings(1e-2, grad_clip, prefixes=(D_SAE,))
    params = make_params()._replace(b_enc=torch.full((D_SAE,), 100.0))
    stepped(params, Rule("batchtopk", D_SAE), settings, dead=False)


def test_auxk_moves_the_dead_alone():
    """Against the step without it: other encoder rows get the same, dead ones, which fire on nothing, only AuxK's."""
    x, rule = make_rows(64), Rule("threshold", 0, 30.0)
    params = make_params()
    params.b_enc[::3] = -1e3
    params.W_enc[::3] *= 40.0  # so that some reach above 0 all the same
    plain, aux = start(params), start(params)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[::3] = True
    dead[reference.encode(params, x, rule).latents.long()] = False
    for state in (plain, aux):
        state.quiet[dead] = 10
    cpu.train_step(plain, x, rule, StepSettings(1e-3))
    cpu.train_step(aux, x, rule, StepSettings(1e-3, aux_coef=1.0, aux_k=5, dead_after=10))
    assert torch.equal(plain.m.W_enc[~dead], aux.m.W_enc[~dead])
    assert torch.equal(plain.m.b_dec, aux.m.b_dec)
    assert not plain.m.W_enc[dead].any() and not plain.quiet[~dead].any()
    assert (aux.quiet[dead] == 10 + 64).all()


def test_cpu_latents_that_do_not_fire_still_move():
    state = start(make_params())
    cpu.train_step(state, make_rows(64), Rule("topk", 9), StepSettings(1e-3))
    m, v, w = state.m.W_enc.clone(), state.v.W_enc.clone(), state.params.W_enc.clone()
    _, active = cpu.train_step(state, make_rows(64), Rule("threshold", 0, 1e9), StepSettings(1e-3))
    assert active == 0
    torch.testing.assert_close(state.m.W_enc, 0.9 * m)
    torch.testing.assert_close(state.v.W_enc, 0.999 * v)
    assert (state.params.W_enc != w)[m.abs() > 1e-6].any()


# --- odd inputs ---


@pytest.mark.parametrize("kernel", [reference, cpu])
def test_no_active_pair(kernel):
    params = make_params()._replace(b_enc=torch.full((D_SAE,), -1e6))
    x = make_rows(20)
    for rule in RULES:
        codes = kernel.encode(params, x, rule)
        assert codes.offsets.tolist() == [0] * 21 and len(codes.latents) == len(codes.values) == 0
    assert torch.equal(kernel.decode(params, codes), (params.b_dec + params.b_pre).expand(20, -1))
    loss, grads = kernel.gradients(params, x, codes)
    assert loss == pytest.approx((x - params.b_dec - params.b_pre).double().square().mean().item(), rel=1e-5)
    assert not grads.W_enc.any() and not grads.W_dec.any() and not grads.b_enc.any()
    assert torch.equal(grads.b_pre, grads.b_dec)


@pytest.mark.parametrize("kernel", [reference, cpu])
@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_ties(kernel, value, n):
    """Latents and rows that are all alike: the count is exact all the same."""
    params = make_params()
    w_enc = torch.full_like(params.W_enc, 0.5)
    params = params._replace(W_enc=w_enc, b_enc=torch.ones(D_SAE), b_pre=torch.zeros(D_IN))
    x = torch.full((n, D_IN), value)
    for k in (1, 9, D_SAE):
        for kind in ("topk", "batchtopk"):
            codes = kernel.encode(params, x, Rule(kind, k))
            assert_well_formed(codes)
            assert len(codes.values) == n * k
            assert codes.values.unique().tolist() == [value * 0.5 * D_IN + 1]
            if kind == "topk":
                assert (codes.offsets.diff() == k).all()


def test_batch_cut_falls_on_sinks():
    """BatchTopK gives a sink row many latents; TopK gives it k."""
    params, x = make_params(), make_rows(200, sinks=1)
    counts = cpu.encode(params, x, Rule("batchtopk", 9)).offsets.diff()
    assert counts.sum() == 200 * 9 and counts[0] > 5 * 9
    assert (cpu.encode(params, x, Rule("topk", 9)).offsets.diff() == 9).all()


def test_sample_that_misleads_is_repaired():
    """All positive pre-activations sit where the batch's sample looks: the bound from it is too high."""
    d_sae, n = 61, 500  # the stride equals d_sae: only latent 0 is seen
    params = make_params(0, D_IN, d_sae)
    params = params._replace(W_enc=params.W_enc * 1e-3, b_enc=torch.linspace(1, 2, d_sae).flip(0))
    x = make_rows(n)
    for k in (1, 30, 60):
        for kind in ("batchtopk", "topk"):
            expected = reference.encode(params, x, Rule(kind, k))
            assert_same_codes(cpu.encode(params, x, Rule(kind, k)), expected, params, x)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sinks_first", [True, False])
@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
def test_rows_in_blocks_give_the_codes_of_the_whole(monkeypatch, rule, sinks_first, matmul):
    """A large batch goes through in blocks; a first block unlike the others misleads the bound, not the codes."""
    params, x = make_params(), make_rows(300, sinks=8)
    x = x if sinks_first else x.flip(0)
    whole = cpu.encode(params, x, rule, matmul)
    monkeypatch.setattr(cpu_codes, "BLOCK_VALUES", 37 * D_SAE)
    assert_same_codes(cpu.encode(params, x, rule, matmul), whole, params, x)


@pytest.mark.parametrize("kernel", [reference, cpu])
@pytest.mark.parametrize("rule", RULES)
def test_divergence_shows_in_the_loss(kernel, rule):
    for bad in (math.nan, math.inf):
        state, x = start(make_params()), make_rows(16)
        x[3, 5] = bad
        loss, _ = kernel.train_step(state, x, rule, StepSettings(1e-3))
        assert not math.isfinite(loss)


# --- determinism, threads, bf16 ---


@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "rule", [Rule("topk", 5), Rule("batchtopk", 5), Rule("threshold", 0, 30.0), Rule("threshold", 0, 0.1)]
)
def test_same_bytes(rule, matmul):
    """Same input and thread count, same bytes, whatever the buffers held; 1 and 2 threads agree to rounding."""
    results = {}
    for threads in (1, 2):
        kernels.set_threads(threads)
        runs = []
        for attempt in range(2):
            state = start(make_params())
            if attempt:  # a workspace that another batch has filled
                other = copy.deepcopy(state)
                cpu.train_step(other, make_rows(333, 9), Rule("threshold", 0, 1.0), StepSettings(1e-3, 1.0))
                state.workspace = other.workspace
            losses = [
                cpu.train_step(state, make_rows(n, n, sinks=1), rule, StepSettings(1e-3, matmul=matmul))
                for n in (128, 50)
            ]
            runs.append((losses, [t.clone() for part in (state.params, state.m, state.v) for t in part]))
        assert runs[0][0] == runs[1][0]
        assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
        results[threads] = runs[0]
    assert results[1][0][0][0] == pytest.approx(results[2][0][0][0], rel=1e-5)
    for one, two in zip(results[1][1][:5], results[2][1][:5], strict=True):
        assert apart(one, two) < 1e-4


@pytest.mark.parametrize("rule", [Rule("topk", 8), Rule("batchtopk", 8), Rule("threshold", 0, 40.0)])
def test_bf16_selects_but_does_not_set_values(rule):
    """Nearly the same pairs are kept; the values of those that are kept are float32's."""
    params, x = make_params(5), make_rows(256, 5)
    assert cpu_codes._share_kept(params, x - params.b_pre, rule) <= cpu_codes.BF16_BELOW
    exact, actual = reference.encode(params, x, rule), cpu.encode(params, x, rule, "bf16")
    assert_well_formed(actual)
    z, z_exact = dense(actual), dense(exact)
    both = (z > 0) & (z_exact > 0)
    assert both.sum() >= 0.97 * (z_exact > 0).sum()
    assert ((z - z_exact).abs() <= 1e-5 * x.norm(dim=1, keepdim=True))[both].all()
    losses = [kernel.gradients(params, x, codes)[0] for kernel, codes in ((reference, exact), (cpu, actual))]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_bf16_codes_that_are_not_sparse_are_float32s():
    params, x = make_params(5), make_rows(64, 5)
    for rule in (Rule("batchtopk", D_SAE // 2), Rule("threshold", 0, 0.1)):
        for mine, theirs in zip(cpu.encode(params, x, rule, "bf16"), cpu.encode(params, x, rule), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("rule", [Rule("batchtopk", 40), Rule("threshold", 0, 20.0), Rule("jumprelu", 9)])
def test_float32_codes_by_way_of_a_bf16_product(monkeypatch, rule, sinks):
    """The same pairs as by a float32 product, and their float32 values."""
    params, x = make_params(5, 256, 4096), make_rows(300, 5, 256, sinks)
    params = params._replace(theta=torch.full((4096,), 20.0))
    found = []
    for known in (True, False):
        monkeypatch.setattr(cpu_codes, "has_bf16", lambda known=known: known)
        found.append(cpu.encode(params, x, rule))
    assert_well_formed(found[0])
    assert torch.equal(found[0].offsets, found[1].offsets) and torch.equal(found[0].latents, found[1].latents)
    apart_by = (dense(found[0], 4096) - dense(found[1], 4096)).abs()
    assert (apart_by <= 1e-5 * x.norm(dim=1, keepdim=True)).all() and apart_by.any()


@pytest.mark.parametrize("threshold", [12.53, 0.0])
def test_float32_codes_of_pairs_whose_bf16_product_is_below_the_cut(monkeypatch, threshold):
    """Rows of one direction: their products are far larger than their elements, and so are bfloat16's errors."""
    params = make_params(5, 256, 4096)
    x = params.W_dec[:300] * torch.linspace(12.2, 12.8, 300)[:, None]
    params = params._replace(W_enc=params.W_dec, b_enc=torch.full((4096,), threshold - 12.53), b_pre=torch.zeros(256))
    monkeypatch.setattr(cpu_codes, "has_bf16", lambda: True)
    rule = Rule("threshold", 0, threshold)
    found, exact = cpu.encode(params, x, rule), reference.encode(params, x, rule)
    assert torch.equal(found.offsets, exact.offsets) and torch.equal(found.latents, exact.latents)


# --- which kernel ---


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_dense.py")


@without_gpu
def test_choose_resolves_auto(caplog):
    with caplog.at_level(logging.INFO, "saegrid.kernels"):
        choice = kernels.choose("auto", "auto", 0)
    assert choice.kernel == "cpu" and choice.matmul in ("fp32", "bf16")
    assert choice.threads == len(os.sched_getaffinity(0))
    assert "kernel cpu" in caplog.text and "numba" in caplog.text
    assert kernels.choose("reference", "fp32", 3) == ("reference", "fp32", 3, "cpu")


@without_gpu
def test_load():
    assert kernels.load("reference") is reference and kernels.load("cpu") is cpu
    with pytest.raises(ConfigError, match="kernel = 'gpu'"):
        kernels.load("gpu")


def test_weights_of_a_module_and_strided_rows():
    """Weights that require gradients, and rows that are every other one of a larger batch."""
    params, x = make_params(), make_rows(40)
    module = Params(*(torch.nn.Parameter(p) for p in params))
    with torch.no_grad():
        codes = cpu.encode(module, x[::2], Rule("topk", 9))
        x_hat = cpu.decode(module, codes)
    assert torch.equal(x_hat, cpu.decode(params, cpu.encode(params, x[::2].clone(), Rule("topk", 9))))
