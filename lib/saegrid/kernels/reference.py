"""The definition of every kernel, in plain torch. The fast ones have the same signatures and are tested against it.

One weight layout: a latent is a row, in the encoder and in the decoder. For rows x (N, d_in):

    pre   = (x - b_pre) W_encᵀ + b_enc                      (N, d_sae)
    z     = pre where the rule keeps it and pre > 0, else 0  (N, d_sae)
    x_hat = z W_dec + b_dec + b_pre                          (N, d_in)
    loss  = mean over all elements of (x - x_hat)²

Codes are sparse: only kept latents above zero are listed, and only they carry a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saegrid.kernels.state import NONE, THETA_RATE, Codes, Params, Rule, StepSettings, TrainState

BETAS = (0.9, 0.999)
EPS = 1e-8
SOFT_COSINE = 0.8
"""Minimum cosine of a decoder row with its start under `freeze = "soft"` (arXiv:2602.14111)."""


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in)."""
    if rule.kind == "gated":
        params, rule = folded_gate(params), Rule("jumprelu")
    if rule.kind == "jumprelu":
        return above_theta(encode, params, x, matmul)
    pre = _pre_acts(params, x, matmul)  # (N, d_sae)
    return _sparse(pre, _kept(pre, rule))


def above_theta(encode: Callable[..., Codes], params: Params, x: Tensor, matmul: str, below: float = 0.0) -> Codes:
    """Codes, by any kernel's `encode`, of pairs above their latent's theta, and of those less than `below` under it.

    The latter are listed with the value 0, so that they affect only theta's gradient.
    """
    shift = params.theta - below
    codes = encode(params._replace(b_enc=params.b_enc - shift), x, Rule("threshold"), matmul)
    values = codes.values + shift[codes.latents.long()]
    return codes._replace(values=values if not below else values.masked_fill_(codes.values <= below, 0.0))


def magnitudes(params: Params, gate: Codes) -> Codes:
    """Codes of a Gated SAE in training, from the pairs whose gate pi = (x - b_pre) W_encᵀ + b_enc is above 0.

    z = exp(gain) pi + theta (arXiv:2404.16014, §3, with b_mag = exp(gain) b_enc + theta, W_mag = exp(gain) W_enc).
    A pair with z below 0 is listed with the value 0.
    """
    latents = gate.latents.long()
    return gate._replace(values=(params.gain.exp()[latents] * gate.values + params.theta[latents]).clamp_min_(0.0))


def folded_gate(params: Params) -> Params:
    """The JumpReLU equivalent of a Gated SAE (arXiv:2404.16014, appendix H): its gate opens where z is above theta."""
    scale = params.gain.exp()
    return params._replace(
        W_enc=params.W_enc * scale[:, None],
        b_enc=params.b_enc * scale + params.theta,
        theta=params.theta.clamp_min(0.0),
        gain=NONE,
    )


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes."""
    return dense(codes, len(params.b_enc)) @ params.W_dec + params.b_dec + params.b_pre


def dense(codes: Codes, d_sae: int) -> Tensor:
    """latent_acts (N, d_sae) of sparse codes."""
    z = torch.zeros(len(codes.offsets) - 1, d_sae, device=codes.values.device)
    z[_rows(codes), codes.latents.long()] = codes.values
    return z


def gradients(params: Params, x: Tensor, codes: Codes, push: float = 0.0) -> tuple[float, Params]:
    """Loss (mean squared error) and its dense gradient through active pairs; `push` is added to each one's slope."""
    error = decode(params, codes) - x  # (N, d_in)
    loss = error.double().square().mean().item()
    d_hat = error * (2.0 / error.numel())  # (N, d_in)
    grads = _through_pairs(params, x, codes, d_hat, push)
    bias = d_hat.sum(0)  # (d_in,)
    return loss, grads._replace(b_dec=bias, b_pre=grads.b_pre + bias)


def matryoshka_gradients(params: Params, x: Tensor, codes: Codes, prefixes: tuple[int, ...]) -> tuple[float, Params]:
    """Loss of the whole dictionary, and the gradient of the mean loss of all prefixes (arXiv:2503.17547, §3).

    A prefix m reconstructs with the first m latents alone; all prefixes share one code.
    """
    parts = [gradients(params, x, _below(codes, end)) for end in prefixes]
    return parts[-1][0], Params(*(sum(grads) / len(parts) for grads in zip(*(part[1] for part in parts), strict=True)))


def jumprelu_gradients(params: Params, x: Tensor, codes: Codes, k: int, settings: StepSettings) -> tuple[float, Params]:
    """Loss (mean squared error), and the gradients of loss + l0_coef (L0 / k - 1)² (arXiv:2407.14435, §3 and §D).

    Both depend on theta through jumps alone; the pairs within half a bandwidth of theta estimate their slope:
    dz / dtheta = -theta / bandwidth, dL0 / dtheta = -1 / (N bandwidth), 0 for all other pairs.

    Args:
        codes: including the inactive pairs of the band, as `above_theta` lists them.
    """
    loss, grads = gradients(params, x, codes)
    d_hat = (decode(params, codes) - x) * (2.0 / x.numel())
    latents = codes.latents.long()
    d_z = (d_hat @ params.W_dec.T)[_rows(codes), latents]
    theta = params.theta[latents]
    near = codes.values < theta + settings.bandwidth / 2
    pull = l0_pull(int((codes.values > 0).sum()), len(x), k, settings.l0_coef)
    slope = -(theta * d_z + pull) / settings.bandwidth
    return loss, grads._replace(theta=torch.zeros_like(params.theta).index_add_(0, latents[near], slope[near]))


def l0_pull(active: int, n_rows: int, k: int, l0_coef: float) -> float:
    """Derivative of l0_coef (L0 / k - 1)² with respect to one more of the `active` pairs of `n_rows` rows."""
    return 2 * l0_coef * (active / n_rows / k - 1) / (k * n_rows)


def gated_gradients(params: Params, x: Tensor, gate: Codes, codes: Codes, push: float = 0.0) -> tuple[float, Params]:
    """Loss (mean squared error), and the gradients of loss + L1 on the gates + the gates' own reconstruction loss.

    The gate's step function has zero slope. It is trained by x_gate = ReLU(pi) W_dec + b_dec + b_pre, whose mean
    squared error is added, with decoder and biases held constant (arXiv:2404.16014, §3.2).

    Args:
        codes: the `magnitudes` of `gate`.
    """
    error = decode(params, codes) - x
    loss, d_hat = error.double().square().mean().item(), error * (2.0 / x.numel())
    louder = params._replace(W_dec=params.gain.exp()[:, None] * params.W_dec)  # dz / dpi = exp(gain)
    grads = _through_pairs(louder, x, codes, d_hat)
    latents, bias = codes.latents.long(), d_hat.sum(0)
    d_z = (d_hat @ params.W_dec.T)[_rows(codes), latents] * (codes.values > 0)
    of_theta = torch.zeros_like(params.theta).index_add_(0, latents, d_z)
    of_gain = torch.zeros_like(params.gain).index_add_(0, latents, d_z * (codes.values - params.theta[latents]))
    d_gate = (decode(params, gate) - x) * (2.0 / x.numel())
    own = _through_pairs(params, x, gate, d_gate, push)
    return loss, Params(
        grads.W_enc + own.W_enc, grads.b_enc + own.b_enc, grads.W_dec, bias, grads.b_pre + own.b_pre + bias,
        of_theta, of_gain,
    )  # fmt: skip


def auxk_gradients(params: Params, x: Tensor, codes: Codes, dead: Tensor, k: int) -> tuple[float, Params]:
    """AuxK loss and its dense gradient (arXiv:2406.04093, A.2): dead latents reconstruct the residual.

    loss = mean (e_hat - e)² / variance of e, with e = x - x_hat held constant, and e_hat = z W_dec without biases,
    z = ReLU of the k largest pre-activations of the dead latents in each row.

    Args:
        dead: which latents are dead, (d_sae,) bool.
    """
    residual = x - decode(params, codes)  # (N, d_in)
    variance = (residual - residual.mean(0)).double().square().mean().item()
    pre = _pre_acts(params, x, "fp32").masked_fill(~dead, -torch.inf)
    aux = _sparse(pre, _kept(pre, Rule("topk", k=min(k, int(dead.sum())))))
    error = dense(aux, len(dead)) @ params.W_dec - residual
    scale = 1 / variance if variance else 0.0
    d_hat = error * (2 * scale / error.numel())
    return error.double().square().mean().item() * scale, _through_pairs(params, x, aux, d_hat)


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[float, int]:
    """One step: encode, decode, backward, clip, Adam, unit-norm decoder rows, freeze, tie. Changes `state` in place.

    Adam is dense (arXiv:1412.6980): a latent that did not fire still decays its moments and moves. The tie is decoupled
    weight decay as in AdamW (arXiv:1711.05101), of the encoder towards the decoder instead of 0.

    Returns:
        The batch's mean squared error before the step, and the number of active (row, latent) pairs.
    """
    params = state.params
    codes, loss, grads = _codes_and_gradients(params, x, rule, settings, state.l1_push(x, rule, settings))
    active = codes.values > 0
    state.move_l1(int(active.sum()), len(x), rule)
    if settings.aux_coef:
        dead = state.quiet >= settings.dead_after
        if dead.any():
            _, extra = auxk_gradients(params, x, codes, dead, settings.aux_k)
            grads = Params(*(g + settings.aux_coef * more for g, more in zip(grads, extra, strict=True)))
        state.quiet += len(x)
        state.quiet[codes.latents[active].long()] = 0
    grads = allowed(grads, params, settings)
    if settings.grad_clip:
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().item()
        scale = min(1.0, settings.grad_clip / (norm + 1e-6))
        grads = Params(*(g * scale for g in grads))
    state.step += 1
    beta1, beta2 = BETAS
    correction1, correction2 = 1 - beta1**state.step, 1 - beta2**state.step
    for name, p, g, m, v in zip(Params._fields, params, grads, state.m, state.v, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        rate = settings.lr / correction1 * (THETA_RATE if name == "theta" else 1.0)
        p.addcdiv_(m, (v / correction2).sqrt_().add_(EPS), value=-rate)
    params.W_dec.div_(params.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
    settle(params, rule.kind, settings, settings.tie_share, settings.theta_share)
    return loss, int(active.sum())


def _codes_and_gradients(
    params: Params, x: Tensor, rule: Rule, settings: StepSettings, push: float
) -> tuple[Codes, float, Params]:
    """A step's codes, loss and gradients, without AuxK's."""
    if rule.kind == "jumprelu":
        codes = above_theta(encode, params, x, settings.matmul, settings.bandwidth / 2)
        return codes, *jumprelu_gradients(params, x, codes, rule.k, settings)
    if rule.kind == "gated":
        gate = encode(params, x, Rule("relu"), settings.matmul)
        codes = magnitudes(params, gate)
        return codes, *gated_gradients(params, x, gate, codes, push)
    codes = encode(params, x, rule, settings.matmul)
    if settings.prefixes:
        return codes, *matryoshka_gradients(params, x, codes, settings.prefixes)
    return codes, *gradients(params, x, codes, push)


def allowed(grads: Params, params: Params, settings: StepSettings) -> Params:
    """Gradients without those of frozen weights, the encoder's part along the sinks' direction and, with
    `project_grad`, the part of each decoder row's along the row."""
    if settings.frozen:
        grads = grads._replace(**{settings.frozen: torch.zeros_like(params.W_dec)})
    if settings.sink is not None:
        grads = grads._replace(W_enc=grads.W_enc - torch.outer(grads.W_enc @ settings.sink, settings.sink))
    if settings.project_grad:
        along = (grads.W_dec * params.W_dec).sum(1, keepdim=True)  # (d_sae, 1), rows have unit norm
        grads = grads._replace(W_dec=grads.W_dec - along * params.W_dec)
    return grads


def settle(
    params: Params, kind: str, settings: StepSettings, tie_share: float | Tensor, theta_share: float | Tensor
) -> None:
    """The end of every kernel's step, in place: freeze, tie, thetas and the sinks' latents.

    Trained thetas decay towards their mean, as weight decay does towards 0, and stay at 0 or above. Without this, a
    latent's theta can let it fire on a few training rows and on no other.
    """
    hold_and_tie(params, settings, tie_share)
    if kind == "jumprelu":
        if settings.theta_tie:
            params.theta.lerp_(params.theta.mean().expand_as(params.theta), theta_share)
        params.theta.clamp_min_(0.0)
    if settings.sink is not None:
        keep_apart(params, settings.sink)


def hold_and_tie(params: Params, settings: StepSettings, tie_share: float | Tensor) -> None:
    """Reset frozen weights to their initial values, then move the encoder towards the decoder, in place.

    So a tied encoder follows a frozen decoder, and a frozen encoder follows nothing. In the soft freeze, a decoder row
    w whose cosine with its initial value s is below c becomes c s + sqrt(1 - c²) u, where u is the direction of w's
    part orthogonal to s.
    """
    start = settings.start
    if start is not None and settings.freeze == "decoder":
        params.W_dec.copy_(start)
    elif start is not None and settings.freeze == "soft":
        cosine = (params.W_dec * start).sum(1, keepdim=True)
        apart = torch.nn.functional.normalize(params.W_dec - cosine * start)
        held = SOFT_COSINE * start + (1 - SOFT_COSINE**2) ** 0.5 * apart
        params.W_dec.copy_(torch.where(cosine < SOFT_COSINE, torch.nn.functional.normalize(held), params.W_dec))
    if start is not None and settings.freeze == "encoder":
        params.W_enc.copy_(start)
    elif settings.tie:
        params.W_enc.lerp_(params.W_dec, tie_share)


def keep_apart(params: Params, sink: Tensor) -> None:
    """Set latents 0 and 1 to `sink` and -`sink`, and remove that direction from all other encoder rows, in place.

    A gain learnt from ordinary rows would be far off at a sink's size, so that of the two latents is 0. Adam scales
    each element separately, so its update can have a part along `sink` even if the gradient has none.
    """
    params.W_enc.addr_(params.W_enc @ sink, sink, alpha=-1)
    for weights in (params.W_enc, params.W_dec):
        weights[0], weights[1] = sink, -sink
    params.gain[:2] = 0.0


def _through_pairs(params: Params, x: Tensor, codes: Codes, d_hat: Tensor, push: float = 0.0) -> Params:
    """Gradients through the active pairs, given d_hat (N, d_in), the gradient of z W_dec; b_dec's is 0.

    `push` is added to the slope of each active pair's value.
    """
    rows, latents = _rows(codes), codes.latents.long()
    z = dense(codes, len(params.b_enc))
    d_z = torch.zeros_like(z)
    d_z[rows, latents] = ((d_hat @ params.W_dec.T)[rows, latents] + push) * (codes.values > 0)
    d_pre_sum = d_z.sum(0)  # (d_sae,)
    return Params(
        W_enc=d_z.T @ (x - params.b_pre),
        b_enc=d_pre_sum,
        W_dec=z.T @ d_hat,
        b_dec=torch.zeros_like(params.b_dec),
        b_pre=-(d_pre_sum @ params.W_enc),
        theta=torch.zeros_like(params.theta),
        gain=torch.zeros_like(params.gain),
    )


def _pre_acts(params: Params, x: Tensor, matmul: str) -> Tensor:
    centred = x - params.b_pre
    if matmul == "bf16":
        return (centred.bfloat16() @ params.W_enc.bfloat16().T).float() + params.b_enc
    return torch.addmm(params.b_enc, centred, params.W_enc.T)


def _kept(pre: Tensor, rule: Rule) -> Tensor:
    """Mask (N, d_sae) of the pre-activations that the rule keeps and that are above 0."""
    if rule.kind in ("threshold", "relu"):
        return pre > max(rule.threshold, 0.0)
    kept = torch.zeros_like(pre, dtype=torch.bool)
    if rule.kind == "topk":
        kept.scatter_(1, pre.topk(min(rule.k, pre.shape[1]), dim=1, sorted=False).indices, True)
    else:
        count = min(len(pre) * rule.k, pre.numel())
        kept.view(-1)[pre.flatten().topk(count, sorted=False).indices] = True
    return kept & (pre > 0)


def _sparse(pre: Tensor, kept: Tensor) -> Codes:
    offsets = torch.zeros(len(pre) + 1, dtype=torch.int64, device=pre.device)
    offsets[1:] = kept.sum(1).cumsum(0)
    return Codes(offsets, kept.nonzero()[:, 1].int(), pre[kept])


def _below(codes: Codes, end: int) -> Codes:
    """The entries of latents below `end`."""
    kept = codes.latents < end
    before = torch.cat([codes.offsets[:1], kept.cumsum(0)])  # kept entries before each entry
    return Codes(before[codes.offsets], codes.latents[kept], codes.values[kept])


def _rows(codes: Codes) -> Tensor:
    """Row of each entry, (nnz,) int64."""
    counts = codes.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
