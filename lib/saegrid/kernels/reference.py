"""The definition of every kernel, in plain torch. The fast ones have these signatures and are tested against these.

One weight layout: a latent is a row, in the encoder and in the decoder. For rows x (N, d_in):

    pre   = (x - b_pre) W_encᵀ + b_enc                      (N, d_sae)
    z     = pre where the rule keeps it and pre > 0, else 0  (N, d_sae)
    x_hat = z W_dec + b_dec + b_pre                          (N, d_in)
    loss  = mean over all elements of (x - x_hat)²

Codes are sparse: only kept latents above zero are listed, and only they carry a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8
THETA_RATE = 10.0
"""Theta's learning rate by the others': at theirs it does not follow the pre-activations (measured: LOG.md)."""


NONE = torch.empty(0)


class Params(NamedTuple):
    """Weights (or their gradients, or Adam's moments), float32, contiguous."""

    W_enc: Tensor  # (d_sae, d_in)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in), rows of unit norm
    b_dec: Tensor  # (d_in,)
    b_pre: Tensor  # (d_in,)
    theta: Tensor = NONE  # (d_sae,), at least 0: JumpReLU's thresholds where there is one a latent; (0,) elsewhere


class Rule(NamedTuple):
    """Which pre-activations a code keeps.

    topk: the k largest of each row. batchtopk: the int(N * k) largest of the whole batch (arXiv:2412.06410, and
    the published class). threshold: all above `threshold` (JumpReLU; BatchTopK once calibrated). jumprelu: all above
    their latent's theta, which training moves so that k a row are (arXiv:2407.14435).
    """

    kind: Literal["topk", "batchtopk", "threshold", "jumprelu"]
    k: int = 0
    threshold: float = 0.0


class Codes(NamedTuple):
    """Sparse latent activations, row by row (CSR): row n holds entries offsets[n] to offsets[n + 1]."""

    offsets: Tensor  # (N + 1,) int64
    latents: Tensor  # (nnz,) int32, ascending within a row
    values: Tensor  # (nnz,) float32, above 0


class StepSettings(NamedTuple):
    """What a training step needs besides weights and rows."""

    lr: float
    grad_clip: float = 0.0  # largest global gradient norm; 0: none
    project_grad: bool = False  # drop the part of W_dec's gradient along each decoder row
    matmul: Literal["fp32", "bf16"] = "fp32"  # precision of the encoder's product
    aux_coef: float = 0.0  # weight of AuxK's loss; 0: none
    aux_k: int = 0  # dead latents a row that AuxK uses, at most
    dead_after: int = 0  # a latent that has not fired for so many rows is dead
    sink: Tensor | None = None  # (d_in,) of norm 1: a direction that only the first latent's encoder row has
    prefixes: tuple[int, ...] = ()  # Matryoshka's dictionaries, each the first so many latents; the last is d_sae
    bandwidth: float = 0.0  # width of the band around theta whose pairs tell theta's gradient
    l0_coef: float = 0.0  # weight of (L0 / k - 1)², for the rule jumprelu


@dataclass
class TrainState:
    """Weights and Adam's moments, changed in place by `train_step`."""

    params: Params
    m: Params
    v: Params
    step: int = 0
    quiet: Tensor | None = None  # (d_sae,) int64: rows since a latent fired; counted only for AuxK
    workspace: dict = field(default_factory=dict, repr=False)  # a kernel's own buffers; never saved

    def __post_init__(self):
        if self.quiet is None:
            self.quiet = torch.zeros_like(self.params.b_enc, dtype=torch.int64)

    @classmethod
    def start(cls, params: Params) -> TrainState:
        return cls(params, Params(*map(torch.zeros_like, params)), Params(*map(torch.zeros_like, params)))


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in)."""
    if rule.kind == "jumprelu":
        return above_theta(encode, params, x, matmul)
    pre = _pre_acts(params, x, matmul)  # (N, d_sae)
    return _sparse(pre, _kept(pre, rule))


def above_theta(encode: Callable[..., Codes], params: Params, x: Tensor, matmul: str, below: float = 0.0) -> Codes:
    """Codes by any kernel's `encode` of what is above its latent's theta; `below`: of the pairs so far below it too.

    The latter are listed with the value 0, so that they take part in nothing but theta's gradient.
    """
    shift = params.theta - below
    codes = encode(params._replace(b_enc=params.b_enc - shift), x, Rule("threshold"), matmul)
    values = codes.values + shift[codes.latents.long()]
    return codes._replace(values=values if not below else values.masked_fill_(codes.values <= below, 0.0))


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes."""
    return dense(codes, len(params.b_enc)) @ params.W_dec + params.b_dec + params.b_pre


def dense(codes: Codes, d_sae: int) -> Tensor:
    """latent_acts (N, d_sae) of sparse codes."""
    z = torch.zeros(len(codes.offsets) - 1, d_sae, device=codes.values.device)
    z[_rows(codes), codes.latents.long()] = codes.values
    return z


def gradients(params: Params, x: Tensor, codes: Codes) -> tuple[float, Params]:
    """Loss (mean squared error) and its gradient through the active pairs, dense."""
    error = decode(params, codes) - x  # (N, d_in)
    loss = error.double().square().mean().item()
    d_hat = error * (2.0 / error.numel())  # (N, d_in)
    grads = _through_pairs(params, x, codes, d_hat)
    bias = d_hat.sum(0)  # (d_in,)
    return loss, grads._replace(b_dec=bias, b_pre=grads.b_pre + bias)


def matryoshka_gradients(params: Params, x: Tensor, codes: Codes, prefixes: tuple[int, ...]) -> tuple[float, Params]:
    """Loss of the whole dictionary, and the gradient of the mean loss of all prefixes (arXiv:2503.17547, §3).

    A prefix m reconstructs with the first m latents alone; a code is one for all of them.
    """
    parts = [gradients(params, x, _below(codes, end)) for end in prefixes]
    return parts[-1][0], Params(*(sum(grads) / len(parts) for grads in zip(*(part[1] for part in parts), strict=True)))


def jumprelu_gradients(params: Params, x: Tensor, codes: Codes, k: int, settings: StepSettings) -> tuple[float, Params]:
    """Loss (mean squared error), and the gradients of that plus l0_coef (L0 / k - 1)² (arXiv:2407.14435, §3 and §D).

    Neither has a slope in theta but at jumps; the pairs within half a bandwidth of theta stand for these:
    dz / dtheta = -theta / bandwidth, dL0 / dtheta = -1 / (N bandwidth), 0 for all other pairs.

    Args:
        codes: with the pairs of the band that are not active, as `above_theta` lists them.
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


def auxk_gradients(params: Params, x: Tensor, codes: Codes, dead: Tensor, k: int) -> tuple[float, Params]:
    """AuxK's loss and its gradient, dense (arXiv:2406.04093, A.2): dead latents reconstruct what the code leaves over.

    loss = mean (e_hat - e)² / variance of e, with e = x - x_hat taken as given, and e_hat = z W_dec without biases,
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
    """One step: encode, decode, backward, clip, Adam, unit-norm decoder rows. Changes `state` in place.

    Adam is dense (arXiv:1412.6980, no weight decay): a latent that did not fire still decays its moments and moves.

    Returns:
        The batch's mean squared error before the step, and the number of active (row, latent) pairs.
    """
    params = state.params
    if rule.kind == "jumprelu":
        codes = above_theta(encode, params, x, settings.matmul, settings.bandwidth / 2)
        loss, grads = jumprelu_gradients(params, x, codes, rule.k, settings)
    else:
        codes = encode(params, x, rule, settings.matmul)
        nested = settings.prefixes
        loss, grads = matryoshka_gradients(params, x, codes, nested) if nested else gradients(params, x, codes)
    active = codes.values > 0
    if settings.aux_coef:
        dead = state.quiet >= settings.dead_after
        if dead.any():
            _, extra = auxk_gradients(params, x, codes, dead, settings.aux_k)
            grads = Params(*(g + settings.aux_coef * more for g, more in zip(grads, extra, strict=True)))
        state.quiet += len(x)
        state.quiet[codes.latents[active].long()] = 0
    if settings.sink is not None:
        grads = grads._replace(W_enc=grads.W_enc - torch.outer(grads.W_enc @ settings.sink, settings.sink))
    if settings.project_grad:
        along = (grads.W_dec * params.W_dec).sum(1, keepdim=True)  # (d_sae, 1), rows have unit norm
        grads = grads._replace(W_dec=grads.W_dec - along * params.W_dec)
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
    params.theta.clamp_min_(0.0)
    if settings.sink is not None:
        keep_apart(params.W_enc, settings.sink)
    return loss, int(active.sum())


def keep_apart(W_enc: Tensor, sink: Tensor) -> None:
    """Make all latents but the first blind to a direction: drop their encoder rows' part along it, in place.

    Adam scales each element by itself, so what it makes of a gradient without that part has some again.
    """
    others = W_enc[1:]
    others.addr_(others @ sink, sink, alpha=-1)


def _through_pairs(params: Params, x: Tensor, codes: Codes, d_hat: Tensor) -> Params:
    """Gradients through the active pairs, from that of the sum of decoder rows, d_hat (N, d_in); b_dec has none."""
    rows, latents = _rows(codes), codes.latents.long()
    z = dense(codes, len(params.b_enc))
    d_z = torch.zeros_like(z)
    d_z[rows, latents] = (d_hat @ params.W_dec.T)[rows, latents] * (codes.values > 0)
    d_pre_sum = d_z.sum(0)  # (d_sae,)
    return Params(
        W_enc=d_z.T @ (x - params.b_pre),
        b_enc=d_pre_sum,
        W_dec=z.T @ d_hat,
        b_dec=torch.zeros_like(params.b_dec),
        b_pre=-(d_pre_sum @ params.W_enc),
        theta=torch.zeros_like(params.theta),
    )


def _pre_acts(params: Params, x: Tensor, matmul: str) -> Tensor:
    centred = x - params.b_pre
    if matmul == "bf16":
        return (centred.bfloat16() @ params.W_enc.bfloat16().T).float() + params.b_enc
    return torch.addmm(params.b_enc, centred, params.W_enc.T)


def _kept(pre: Tensor, rule: Rule) -> Tensor:
    """Mask (N, d_sae) of the pre-activations that the rule keeps and that are above 0."""
    if rule.kind == "threshold":
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
    before = torch.cat([codes.offsets[:1], kept.cumsum(0)])  # kept entries ahead of each entry
    return Codes(before[codes.offsets], codes.latents[kept], codes.values[kept])


def _rows(codes: Codes) -> Tensor:
    """Row of each entry, (nnz,) int64."""
    counts = codes.offsets.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
