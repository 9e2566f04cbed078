"""The kernel for processors: torch's matrix product for the encoder, compiled loops over the active pairs for the rest.

Same functions, arguments and results as `reference`, up to rounding. A step is

1. pre-activations by one product; exact cut by bisection on a short list of candidates (no sort);
2. reconstruction row by row, from the decoder rows of the active latents alone;
3. latent by latent: gradient from the active pairs, Adam, unit norm, while the latent's row is in cache.

Dense codes (JumpReLU with a low threshold) take plain products in 2 and 3 instead. With `matmul="bf16"` the product
only selects, and the kept values are computed again in float32; where so many are kept that this would not pay, the
product is a float32 one. The same input and thread count give the same bytes: loops are cut into chunks by the amount
of work, never by the number of threads, and sums that cross chunks are kept per chunk.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from saegrid.kernels import _cpu_pairs as pairs
from saegrid.kernels import _cpu_select as select
from saegrid.kernels._cpu_chunks import CHUNKS, arrays, buffer, by_weight, even, run
from saegrid.kernels.reference import (
    BETAS,
    EPS,
    THETA_RATE,
    Codes,
    Params,
    Rule,
    StepSettings,
    TrainState,
    above_theta,
    keep_apart,
    l0_pull,
)

DENSE_ABOVE = 0.5  # share of active pairs above which plain products beat loops over pairs (measured)
BF16_BELOW = 0.12  # share of active pairs up to which a bf16 product + float32 values beat one fp32 product (measured)
LATENT_COST = 8  # work per latent in the backward pass, in active pairs (Adam against a pair's gradient)
BLOCK_VALUES = 2**22  # pre-activations made at a time: 16 MB in float32, which the last cache about holds
SPARE = 1.5  # how many times the wanted pairs a bound from the first of several blocks aims at
PROBE = 64, 32  # rows, and one latent in so many, that tell how many pairs a threshold keeps


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in). See `reference.encode`."""
    if rule.kind == "jumprelu":
        return above_theta(encode, params, x, matmul)
    return _encode(params, x.contiguous() - params.b_pre, rule, matmul, {})


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes. See `reference.decode`."""
    n_rows, d_in = len(codes.offsets) - 1, params.W_dec.shape[1]
    x_hat = torch.empty(n_rows, d_in)
    _decode(params, codes, x_hat, {})
    return x_hat


def gradients(params: Params, x: Tensor, codes: Codes) -> tuple[float, Params]:
    """Loss and its gradient through the active pairs, dense. See `reference.gradients`."""
    grads = Params(*map(torch.empty_like, params))
    x, workspace = x.contiguous(), {}
    loss, d_hat = _error(params, x, codes, workspace)
    torch.sum(d_hat, 0, out=grads.b_dec)
    _gradients(params, x - params.b_pre, codes, d_hat, grads, workspace, _jump(params, grads.theta, len(x)))
    return loss, grads


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[float, int]:
    """One training step, in place. See `reference.train_step`. Buffers are kept in `state.workspace`."""
    params, workspace, x = state.params, state.workspace, x.contiguous()
    centred = torch.sub(x, params.b_pre, out=buffer(workspace, "centred", x.shape))
    if rule.kind == "jumprelu":
        lists = functools.partial(_encode, workspace=workspace)
        codes = above_theta(lists, params, centred, settings.matmul, settings.bandwidth / 2)
        active = int((codes.values > 0).sum())
        pull = l0_pull(active, len(x), rule.k, settings.l0_coef)
    else:
        codes = _encode(params, centred, rule, settings.matmul, workspace)
        active, pull = len(codes.values), 0.0
    g_theta = buffer(workspace, "grad theta", params.theta.shape)
    jump = _jump(params, g_theta, len(x), settings.bandwidth, pull)
    beta1, beta2 = BETAS
    state.step += 1
    rate, correction = settings.lr / (1 - beta1**state.step), 1 / (1 - beta2**state.step)
    adam = tuple(map(np.float32, (1 - beta1, beta2, 1 - beta2, rate, correction, EPS)))
    weights, m, v = (tuple(arrays(p[:3])) for p in (params, state.m, state.v))
    if settings.prefixes:
        loss, codes, d_hat = _prefix_errors(params, x, codes, settings.prefixes, workspace)
    else:
        loss, d_hat = _error(params, x, codes, workspace)
    g_dec_bias = d_hat[: len(x)].sum(0)
    if settings.aux_coef:
        codes, d_hat = _with_auxk(state, centred, codes, d_hat, settings)
    if settings.sink is not None:  # W_enc's gradient is a sum of these rows
        centred.addr_(centred @ settings.sink, settings.sink, alpha=-1)
    if settings.grad_clip or _is_dense(codes, params):
        grads = Params(*(buffer(workspace, f"grad {name}", p.shape) for name, p in params._asdict().items()))
        grads.b_dec.copy_(g_dec_bias)
        _gradients(params, centred, codes, d_hat, grads, workspace, jump)
        edges = even(len(params.b_enc))
        if settings.project_grad:
            run(pairs.project_latents, edges, *arrays((grads.W_dec, params.W_dec)))
        _clip(grads, settings.grad_clip)
        run(pairs.apply_latents, edges, *arrays(grads[:3]), weights, m, v, adam)
        g_dec_bias, g_pre_bias = grads.b_dec, grads.b_pre
    else:
        lists, edges = _by_latent(codes, len(params.b_enc), len(x))
        pull = buffer(workspace, "pull", (CHUNKS, x.shape[1]))
        run(
            pairs.step_latents, edges, *lists, *arrays((d_hat, centred)), weights, m, v, pull.numpy(),
            settings.project_grad, jump, adam,
        )  # fmt: skip
        g_pre_bias = g_dec_bias - pull.sum(0)
    pairs.apply_vector(*arrays((g_dec_bias, params.b_dec, state.m.b_dec, state.v.b_dec)), adam)
    pairs.apply_vector(*arrays((g_pre_bias, params.b_pre, state.m.b_pre, state.v.b_pre)), adam)
    faster = (*adam[:3], np.float32(THETA_RATE) * adam[3], *adam[4:])
    pairs.apply_vector(*arrays((g_theta, params.theta, state.m.theta, state.v.theta)), faster)
    params.theta.clamp_min_(0.0)
    if settings.sink is not None:
        keep_apart(params.W_enc, settings.sink)
    return loss, active


# --- encoder ---


def _encode(params: Params, centred: Tensor, rule: Rule, matmul: str, workspace: dict) -> Codes:
    """Codes of centred rows (N, d_in)."""
    bound = np.float32(max(rule.threshold, 0.0) if rule.kind == "threshold" else 0.0)
    narrow = matmul == "bf16" and _share_kept(params, centred, rule) <= BF16_BELOW
    offsets, latents, values = _select(params, centred, rule, bound, narrow, workspace)
    if narrow:
        rows = arrays((centred, params.W_enc, params.b_enc))
        run(pairs.recompute, by_weight(offsets), *rows, offsets, latents, values)
        if (values <= bound).any():
            select.cut_batch(offsets, latents, values, bound, 0)
    kept = offsets[-1]
    return Codes(*map(torch.from_numpy, (offsets, latents[:kept], values[:kept])))


def _share_kept(params: Params, centred: Tensor, rule: Rule) -> float:
    """Share of the pairs that the rule will keep; for a threshold, as some rows and latents have it."""
    if rule.kind != "threshold":
        return rule.k / len(params.b_enc)
    rows, stride = PROBE
    pre = torch.addmm(params.b_enc[::stride], centred[:rows], params.W_enc[::stride].T)
    return (pre > max(rule.threshold, 0.0)).float().mean().item()


def _select(
    params: Params, centred: Tensor, rule: Rule, bound: np.float32, narrow: bool, workspace: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR lists (offsets, latents, values) of what the rule keeps, from blocks of rows that stay in cache."""
    n_rows, d_sae = len(centred), len(params.b_enc)
    count = min(rule.k, d_sae) * n_rows if rule.kind == "batchtopk" else 0
    k = min(rule.k, d_sae) if rule.kind == "topk" else 0
    size = max(1, BLOCK_VALUES // d_sae)
    bias = params.b_enc.detach().numpy()
    w_enc = params.W_enc
    if narrow:
        w_enc = buffer(workspace, "W_enc bf16", w_enc.shape, torch.bfloat16).copy_(w_enc)

    def listed(bound: np.float32 | None) -> tuple[np.float32, list[tuple[np.ndarray, ...]]]:
        """The bound (None: found by a sample of the first block), and each block's lists above it."""
        parts = []
        for rows in centred.split(size):
            pre = _pre_acts(rows, w_enc, workspace)
            if bound is None:
                wanted = count if len(rows) == n_rows else int(SPARE * count * len(rows) / n_rows)
                bound = select.batch_bound(pre, bias, min(wanted, pre.size))
            parts.append(_list_block(pre, bias, bound, k, workspace))
        return bound, parts

    bound, parts = listed(None if count else bound)
    if bound > 0 and sum(len(values) for _, _, values in parts) < count:  # the sample misled
        _, parts = listed(np.float32(0))
    counts, latents, values = (np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    offsets = np.concatenate([[0], counts.cumsum()])
    if 0 < count < len(values):
        cut = select.kth_largest(values, len(values), count)
        ties = count - select.count_above(values, len(values), cut)
        select.cut_batch(offsets, latents, values, cut, ties)
    return offsets, latents[: offsets[-1]], values[: offsets[-1]]


def _pre_acts(rows: Tensor, w_enc: Tensor, workspace: dict) -> np.ndarray:
    """Pre-activations (n, d_sae) of centred rows without b_enc: float32, or the bits of bfloat16 where `w_enc` is."""
    out = buffer(workspace, f"pre {w_enc.dtype}", (len(rows), len(w_enc)), w_enc.dtype)
    torch.mm(rows.to(w_enc.dtype), w_enc.T, out=out)
    return out.numpy() if out.dtype == torch.float32 else out.view(torch.uint16).numpy()


def _list_block(
    pre: np.ndarray, bias: np.ndarray, bound: np.float32, k: int, workspace: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts (n,), latents, values) of what of pre + bias is above `bound`, or with k > 0 largest in its row."""
    wide = arrays((buffer(workspace, "latents", pre.shape, torch.int32), buffer(workspace, "values", pre.shape)))
    counts, edges = np.empty(len(pre), np.int64), even(len(pre))
    run(select.list_above, edges, pre, bias, bound, k, *wide, counts)
    offsets = np.concatenate([[0], counts.cumsum()])
    latents, values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    run(select.pack, edges, *wide, offsets, latents, values)
    return counts, latents, values


# --- decoder and backward ---


def _is_dense(codes: Codes, params: Params) -> bool:
    """Whether plain products pay. Never where thetas are trained: their gradient comes from loops over pairs."""
    return not len(params.theta) and len(codes.values) > DENSE_ABOVE * (len(codes.offsets) - 1) * len(params.b_enc)


def _dense(codes: Codes, d_sae: int, workspace: dict) -> Tensor:
    """Codes as (N, d_sae)."""
    z = buffer(workspace, "z", (len(codes.offsets) - 1, d_sae)).zero_()
    run(pairs.scatter, by_weight(codes.offsets.numpy()), *arrays(codes), z.numpy())
    return z


def _decode(params: Params, codes: Codes, out: Tensor, workspace: dict) -> None:
    bias = params.b_dec + params.b_pre
    if _is_dense(codes, params):
        torch.addmm(bias, _dense(codes, len(params.b_enc), workspace), params.W_dec, out=out)
    else:
        run(pairs.decode_rows, by_weight(codes.offsets.numpy()), *arrays((*codes, params.W_dec, bias, out)))


def _error(params: Params, x: Tensor, codes: Codes, workspace: dict) -> tuple[float, Tensor]:
    """Loss, and its gradient d_hat (N, d_in) with respect to x_hat."""
    d_hat = buffer(workspace, "d_hat", x.shape)
    _decode(params, codes, d_hat, workspace)
    square_sums = np.empty(len(x))
    run(pairs.error_rows, even(len(x)), *arrays((x, d_hat)), np.float32(2 / x.numel()), square_sums)
    return square_sums.sum().item() / x.numel(), d_hat


def _by_latent(codes: Codes, d_sae: int, n_rows: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Latent-major lists (starts, rows, rows of x, values) of the pairs, and edges of chunks of latents of like work.

    Codes may be stacked, one loss behind the other, each `n_rows` rows.
    """
    nnz = len(codes.values)
    starts, rows, values = np.empty(d_sae + 1, np.int64), np.empty(nnz, np.int32), np.empty(nnz, np.float32)
    pairs.by_latent(*arrays(codes), starts, rows, values)
    x_rows = rows if len(codes.offsets) == n_rows + 1 else rows % np.int32(n_rows)
    return (starts, rows, x_rows, values), by_weight(starts + LATENT_COST * np.arange(d_sae + 1))


def _jump(params: Params, g_theta: Tensor, n_rows: int, bandwidth: float = 0.0, pull: float = 0.0) -> tuple:
    """What `_cpu_pairs.theta_gradient` needs; without a bandwidth, theta's gradient is 0."""
    return (*arrays((params.theta, g_theta)), np.float32(bandwidth / 2), np.float32(pull), n_rows)


def _gradients(
    params: Params, centred: Tensor, codes: Codes, d_hat: Tensor, grads: Params, workspace: dict, jump: tuple
) -> None:
    """Write the gradients, that of b_dec being there already, to `grads`. Codes and d_hat may be stacked."""
    if len(d_hat) == len(centred) and _is_dense(codes, params):
        z = buffer(workspace, "z", (len(centred), len(params.b_enc)))  # filled by _decode
        torch.mm(z.T, d_hat, out=grads.W_dec)
        d_z = torch.mm(d_hat, params.W_dec.T, out=buffer(workspace, "d_z", z.shape)).masked_fill_(z == 0, 0)
        torch.mm(d_z.T, centred, out=grads.W_enc)
        torch.sum(d_z, 0, out=grads.b_enc)
        pull = grads.b_enc @ params.W_enc
    else:
        lists, edges = _by_latent(codes, len(params.b_enc), len(centred))
        chunk_pulls = buffer(workspace, "pull", (CHUNKS, centred.shape[1]))
        tensors = (d_hat, centred, params.W_enc, params.W_dec, *grads[:3], chunk_pulls)
        run(pairs.gradient_latents, edges, *lists, *arrays(tensors), jump)
        pull = chunk_pulls.sum(0)
    torch.sub(grads.b_dec, pull, out=grads.b_pre)


def _clip(grads: Params, limit: float) -> None:
    """Scale the gradients in place so that their global norm is at most `limit` (0: none)."""
    if limit:
        norm = sum(g.norm(dtype=torch.float64).item() ** 2 for g in grads) ** 0.5
        scale = min(1.0, limit / (norm + 1e-6))
        for g in grads if scale < 1 else ():
            g.mul_(scale)


# --- several losses: their codes and errors are stacked, each N rows, one behind the other ---


def _prefix_errors(
    params: Params, x: Tensor, codes: Codes, prefixes: tuple[int, ...], workspace: dict
) -> tuple[float, Codes, Tensor]:
    """Loss of the whole dictionary; codes of the latents between two prefixes; what their sums' gradients are.

    See `reference.matryoshka_gradients`: the latents behind prefix g are in all larger ones, whose errors they get.
    """
    n_rows, n_parts = len(x), len(prefixes)
    offsets = torch.empty(n_parts * n_rows + 1, dtype=torch.int64)
    stacked = Codes(offsets, torch.empty_like(codes.latents), torch.empty_like(codes.values))
    select.split_by_prefix(*arrays(codes), np.array(prefixes), *arrays(stacked))
    sums = buffer(workspace, "stacked d_hat", ((n_parts + 1) * n_rows, x.shape[1]))[: n_parts * n_rows]
    zero = torch.zeros_like(params.b_dec)
    run(pairs.decode_rows, by_weight(offsets.numpy()), *arrays((*stacked, params.W_dec, zero, sums)))
    parts = sums.view(n_parts, n_rows, -1)
    parts[0] += params.b_dec + params.b_pre
    for g in range(1, n_parts):
        parts[g] += parts[g - 1]
    square_sums, scale = np.empty(n_rows), np.float32(2 / (x.numel() * n_parts))
    for part in parts:
        run(pairs.error_rows, even(n_rows), *arrays((x, part)), scale, square_sums)
    for g in reversed(range(n_parts - 1)):
        parts[g] += parts[g + 1]
    return square_sums.sum().item() / x.numel(), stacked, sums


def _with_auxk(
    state: TrainState, centred: Tensor, codes: Codes, d_hat: Tensor, settings: StepSettings
) -> tuple[Codes, Tensor]:
    """Codes and d_hat with those of the dead latents stacked behind, and the dead counted. See `auxk_gradients`."""
    dead = (state.quiet >= settings.dead_after).nonzero()[:, 0]
    state.quiet += len(centred)
    state.quiet[codes.latents[codes.values > 0].long()] = 0
    if not len(dead):
        return codes, d_hat
    params, workspace = state.params, state.workspace.setdefault("dead", {})
    zero = torch.zeros_like(params.b_dec)
    small = Params(params.W_enc[dead], params.b_enc[dead], params.W_dec[dead], zero, zero)
    aux = _encode(small, centred, Rule("topk", k=min(settings.aux_k, len(dead))), "fp32", workspace)
    residual = d_hat[-len(centred) :] * (-d_hat.numel() / 2)
    stacked = buffer(state.workspace, "stacked d_hat", (len(d_hat) + len(centred), centred.shape[1]))
    if stacked.data_ptr() != d_hat.data_ptr():
        stacked[: len(d_hat)] = d_hat
    error = stacked[len(d_hat) :]
    _decode(small, aux, error, workspace)
    variance = residual.var(0, correction=0).mean().item()
    error.sub_(residual).mul_(2 * settings.aux_coef / (centred.numel() * variance) if variance else 0.0)
    offsets = torch.cat([codes.offsets, codes.offsets[-1] + aux.offsets[1:]])
    latents = torch.cat([codes.latents, dead.int()[aux.latents.long()]])
    return Codes(offsets, latents, torch.cat([codes.values, aux.values])), stacked
