"""The kernel for processors: torch's matrix product for the encoder, compiled loops over the active pairs for the rest.

Same functions, arguments and results as `reference`, up to rounding. A step is

1. pre-activations by one product; exact cut by bisection on a short list of candidates (no sort);
2. reconstruction row by row, from the decoder rows of the active latents alone;
3. latent by latent: gradient from the active pairs, Adam, unit norm, while the latent's row is in cache.

Dense codes (JumpReLU with a low threshold) use plain products in 2 and 3 instead. With `matmul="bf16"` the product
only selects, and the kept values are recomputed in float32; if too many are kept for this to pay, the product is in
float32. The same input and thread count give the same bytes: loops are split into chunks by the amount of work, never
by the number of threads, and sums that cross chunks are kept per chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saegrid.kernels.cpu import pairs, select
from saegrid.kernels.cpu.chunks import CHUNKS, arrays, buffer, by_weight, even, run
from saegrid.kernels.cpu.codes import exact_codes, sparse_codes
from saegrid.kernels.reference import BETAS, EPS, above_theta, folded_gate, l0_pull, magnitudes, settle
from saegrid.kernels.state import THETA_RATE, Codes, Params, Rule, StepSettings, TrainState

DENSE_ABOVE = 0.5  # share of active pairs above which plain products beat loops over pairs (measured)
LATENT_COST = 8  # work per latent in the backward pass, in active pairs (Adam relative to a pair's gradient)


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in). See `reference.encode`."""
    if rule.kind == "gated":
        params, rule = folded_gate(params), Rule("jumprelu")
    if rule.kind == "jumprelu":
        return above_theta(encode, params, x, matmul)
    centred = x.contiguous() - params.b_pre
    if matmul == "fp32":
        return exact_codes(params, centred, rule)
    return sparse_codes(params, centred, rule, matmul, {})


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes. See `reference.decode`."""
    n_rows, d_in = len(codes.offsets) - 1, params.W_dec.shape[1]
    x_hat = torch.empty(n_rows, d_in)
    _decode(params, codes, x_hat, {})
    return x_hat


def gradients(params: Params, x: Tensor, codes: Codes, push: float = 0.0) -> tuple[float, Params]:
    """Loss and its dense gradient through the active pairs; theta's and gain's are 0. See `reference.gradients`."""
    grads = Params(*map(torch.zeros_like, params))
    x, workspace = x.contiguous(), dict[str, Tensor]()
    loss, d_hat = _error(params, x, codes, torch.empty_like(x), workspace)
    torch.sum(d_hat, 0, out=grads.b_dec)
    none = np.empty(0, np.float32)
    slopes = pairs.Slopes(none, none, none, none, push=np.float32(push), n_rows=len(x))
    _gradients(params, x - params.b_pre, codes, d_hat, grads, workspace, slopes)
    return loss, grads


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[float, int]:
    """One training step, in place. See `reference.train_step`. Buffers are kept in `state.workspace`."""
    params, workspace, x = state.params, state.workspace, x.contiguous()
    centred = torch.sub(x, params.b_pre, out=buffer(workspace, "centred", x.shape))
    codes, gate = _training_codes(params, centred, rule, settings, workspace)
    active = int((codes.values > 0).sum()) if len(params.theta) else len(codes.values)
    push = state.l1_push(x, rule, settings)
    state.move_l1(active, len(x), rule)
    beta1, beta2 = BETAS
    state.step += 1
    rate, correction = settings.lr / (1 - beta1**state.step), 1 / (1 - beta2**state.step)
    after = settings if settings.freeze != "none" else settings._replace(tie=0.0)  # else the loops tie
    tie = 0.0 if after.tie else settings.tie_share
    adam = tuple(map(np.float32, (1 - beta1, beta2, 1 - beta2, rate, correction, EPS, tie)))
    weights, m, v = (tuple(arrays(p[:3])) for p in (params, state.m, state.v))
    if len(settings.prefixes) > 1:
        loss, codes, d_hat = _prefix_errors(params, x, codes, settings.prefixes, workspace)
    else:
        loss, d_hat = _error(params, x, codes, buffer(workspace, "d_hat", x.shape), workspace)
    g_dec_bias = d_hat[: len(x)].sum(0)
    if settings.aux_coef:
        codes, d_hat = _with_auxk(state, centred, codes, d_hat, settings)
    gate_rows = len(codes.offsets) - 1
    if gate is not None:
        codes, d_hat = _with_gate(params, x, gate, codes, d_hat, workspace)
    vectors = tuple(buffer(workspace, f"grad {name}", getattr(params, name).shape) for name in ("theta", "gain"))
    pull = l0_pull(active, len(x), rule.k, settings.l0_coef) if rule.kind == "jumprelu" else 0.0
    numbers = map(np.float32, (settings.bandwidth / 2, pull, push))
    parts: Any = (*arrays((params.theta, vectors[0], params.gain, vectors[1])), *numbers, len(x), gate_rows)
    slopes = pairs.Slopes(*parts)
    if settings.sink is not None:  # W_enc's gradient is a sum of these rows
        centred.addr_(centred @ settings.sink, settings.sink, alpha=-1)
    if settings.grad_clip or settings.frozen or _is_dense(codes, params):
        grads = Params(*(buffer(workspace, f"grad {name}", p.shape) for name, p in params._asdict().items()))
        grads.b_dec.copy_(g_dec_bias)
        _gradients(params, centred, codes, d_hat, grads, workspace, slopes)
        if settings.frozen:
            getattr(grads, settings.frozen).zero_()
        edges, squares = even(len(params.b_enc)), np.empty(CHUNKS)
        matrices = arrays((grads.W_enc, grads.W_dec, params.W_dec))
        run(pairs.finish_gradients, edges, *matrices, settings.project_grad, squares)
        _clip(grads, settings.grad_clip, squares.sum())
        run(pairs.apply_latents, edges, *arrays(grads[:3]), weights, m, v, adam)
        g_dec_bias, g_pre_bias = grads.b_dec, grads.b_pre
    else:
        lists, edges = _by_latent(codes, len(params.b_enc), len(x))
        b_pre_pulls = buffer(workspace, "pull", (CHUNKS, x.shape[1]))
        run(
            pairs.step_latents, edges, *lists, *arrays((d_hat, centred)), weights, m, v, b_pre_pulls.numpy(),
            settings.project_grad, slopes, adam,
        )  # fmt: skip
        g_pre_bias = g_dec_bias - b_pre_pulls.sum(0)
    _apply_vectors(state, (g_dec_bias, g_pre_bias, *vectors), adam)
    settle(params, rule.kind, after, after.tie_share, after.theta_share)
    return loss, active


def _apply_vectors(state: TrainState, grads: tuple[Tensor, ...], adam: tuple) -> None:
    """Adam on b_dec, b_pre, theta and gain, given their gradients."""
    for name, grad in zip(Params._fields[3:], grads, strict=True):
        rate = np.float32(THETA_RATE if name == "theta" else 1.0) * adam[3]
        moved = arrays((grad, *(getattr(part, name) for part in (state.params, state.m, state.v))))
        pairs.apply_vector(*moved, (*adam[:3], rate, *adam[4:]))


def _training_codes(
    params: Params, centred: Tensor, rule: Rule, settings: StepSettings, workspace: dict
) -> tuple[Codes, Codes | None]:
    """A step's codes, with pairs of value 0 if thetas are trained, and Gated's open gates."""
    if rule.kind == "jumprelu":
        lists = functools.partial(sparse_codes, workspace=workspace)
        return above_theta(lists, params, centred, settings.matmul, settings.bandwidth / 2), None
    if rule.kind == "gated":
        gate = sparse_codes(params, centred, Rule("relu", rule.k), settings.matmul, workspace)
        return magnitudes(params, gate), gate
    return sparse_codes(params, centred, rule, settings.matmul, workspace), None


# --- decoder and backward ---


def _is_dense(codes: Codes, params: Params) -> bool:
    """Whether plain products are faster. Never if thetas are trained: their gradient comes from loops over pairs."""
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


def _error(params: Params, x: Tensor, codes: Codes, d_hat: Tensor, workspace: dict) -> tuple[float, Tensor]:
    """Loss, and its gradient with respect to x_hat, written to `d_hat` (N, d_in)."""
    _decode(params, codes, d_hat, workspace)
    square_sums = np.empty(len(x))
    run(pairs.error_rows, even(len(x)), *arrays((x, d_hat)), np.float32(2 / x.numel()), square_sums)
    return square_sums.sum().item() / x.numel(), d_hat


def _by_latent(codes: Codes, d_sae: int, n_rows: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Latent-major lists (starts, rows, rows of x, values) of the pairs, and edges of latent chunks of similar work.

    Codes of several losses may be stacked, `n_rows` rows each.
    """
    nnz = len(codes.values)
    starts, rows, values = np.empty(d_sae + 1, np.int64), np.empty(nnz, np.int32), np.empty(nnz, np.float32)
    pairs.by_latent(*arrays(codes), starts, rows, values)
    x_rows = rows if len(codes.offsets) == n_rows + 1 else rows % np.int32(n_rows)
    return (starts, rows, x_rows, values), by_weight(starts + LATENT_COST * np.arange(d_sae + 1))


def _gradients(
    params: Params, centred: Tensor, codes: Codes, d_hat: Tensor, grads: Params, workspace: dict, slopes: pairs.Slopes
) -> None:
    """Write the gradients to `grads`, which already has that of b_dec. Codes and d_hat may be stacked."""
    if len(d_hat) == len(centred) and _is_dense(codes, params):
        z = buffer(workspace, "z", (len(centred), len(params.b_enc)))  # filled by _decode
        torch.mm(z.T, d_hat, out=grads.W_dec)
        d_z = torch.mm(d_hat, params.W_dec.T, out=buffer(workspace, "d_z", z.shape))
        d_z.add_(slopes.push.item()).masked_fill_(z == 0, 0)
        torch.mm(d_z.T, centred, out=grads.W_enc)
        torch.sum(d_z, 0, out=grads.b_enc)
        pull = grads.b_enc @ params.W_enc
    else:
        chunk_pulls = buffer(workspace, "pull", (CHUNKS, centred.shape[1]))
        tensors = (d_hat, centred, params.W_enc, params.W_dec, *grads[:3], chunk_pulls)
        lists, edges = _by_latent(codes, len(params.b_enc), len(centred))
        run(pairs.gradient_latents, edges, *lists, *arrays(tensors), slopes)
        pull = chunk_pulls.sum(0)
    torch.sub(grads.b_dec, pull, out=grads.b_pre)


def _clip(grads: Params, limit: float, square_sum: float) -> None:
    """Scale the gradients in place so that their global norm is at most `limit` (0: none).

    `square_sum`: sum of squares of the two matrices' gradients.
    """
    if limit:
        vectors = (grads.b_enc, *grads[3:])
        norm = (square_sum + sum(g.norm(dtype=torch.float64).item() ** 2 for g in vectors)) ** 0.5
        scale = min(1.0, limit / (norm + 1e-6))
        for g in grads if scale < 1 else ():
            g.mul_(scale)


# --- several losses: their codes and errors are stacked, N rows each ---


def _prefix_errors(
    params: Params, x: Tensor, codes: Codes, prefixes: tuple[int, ...], workspace: dict
) -> tuple[float, Codes, Tensor]:
    """Loss of the whole dictionary; stacked codes, one part per prefix with the latents that it adds; their d_hat.

    See `reference.matryoshka_gradients`: part g is in prefix g and all larger ones, and gets the sum of their errors.
    """
    n_rows, n_parts = len(x), len(prefixes)
    offsets = torch.empty(n_parts * n_rows + 1, dtype=torch.int64)
    stacked = Codes(offsets, torch.empty_like(codes.latents), torch.empty_like(codes.values))
    select.split_by_prefix(*arrays(codes), np.array(prefixes), *arrays(stacked))
    sums = buffer(workspace, "stacked d_hat", ((n_parts + 1) * n_rows, x.shape[1]))[: n_parts * n_rows]
    zero = torch.zeros_like(params.b_dec)
    run(pairs.decode_rows, by_weight(offsets.numpy()), *arrays((*stacked, params.W_dec, zero, sums)))
    square_sums, scale = np.empty(n_rows), np.float32(2 / (x.numel() * n_parts))
    rows = arrays((x, sums.view(n_parts, n_rows, -1), params.b_dec + params.b_pre))
    run(pairs.prefix_error_rows, even(n_rows), *rows, scale, square_sums)
    return square_sums.sum().item() / x.numel(), stacked, sums


def _with_auxk(
    state: TrainState, centred: Tensor, codes: Codes, d_hat: Tensor, settings: StepSettings
) -> tuple[Codes, Tensor]:
    """Codes and d_hat, those of the dead latents appended; updates `state.quiet`. See `auxk_gradients`."""
    dead = (state.quiet >= settings.dead_after).nonzero()[:, 0]
    state.quiet += len(centred)
    state.quiet.index_fill_(0, codes.latents[codes.values > 0].long(), 0)
    if not len(dead):
        return codes, d_hat
    params, workspace = state.params, state.workspace.setdefault("dead", {})
    zero = torch.zeros_like(params.b_dec)
    small = Params(params.W_enc[dead], params.b_enc[dead], params.W_dec[dead], zero, zero)
    aux = sparse_codes(small, centred, Rule("topk", k=min(settings.aux_k, len(dead))), "fp32", workspace)
    residual = d_hat[-len(centred) :] * (-d_hat.numel() / 2)
    behind = aux._replace(latents=dead.int()[aux.latents.long()])
    stacked, d_hat, error = _stacked(codes, d_hat, behind, state.workspace)
    _decode(small, aux, error, workspace)
    variance = (residual - residual.mean(0)).square_().mean().item()  # torch's `var` takes several times as long
    error.sub_(residual).mul_(2 * settings.aux_coef / (centred.numel() * variance) if variance else 0.0)
    return stacked, d_hat


def _with_gate(
    params: Params, x: Tensor, gate: Codes, codes: Codes, d_hat: Tensor, workspace: dict
) -> tuple[Codes, Tensor]:
    """Codes and d_hat, those of the gates appended with values of 0: their loss does not train W_dec."""
    silent = gate._replace(values=torch.zeros_like(gate.values))
    stacked, d_hat, room = _stacked(codes, d_hat, silent, workspace)
    _error(params, x, gate, room, workspace)
    return stacked, d_hat


def _stacked(codes: Codes, d_hat: Tensor, more: Codes, workspace: dict) -> tuple[Codes, Tensor, Tensor]:
    """Codes with `more` (N rows) appended; d_hat with room appended for theirs; that room."""
    n_rows = len(d_hat) + len(more.offsets) - 1
    room = buffer(workspace, "stacked d_hat", (n_rows, d_hat.shape[1]))
    if room.data_ptr() != d_hat.data_ptr():
        room[: len(d_hat)] = d_hat
    offsets = torch.cat([codes.offsets, codes.offsets[-1] + more.offsets[1:]])
    joined = Codes(offsets, *(torch.cat(parts) for parts in zip(codes[1:], more[1:], strict=True)))
    return joined, room, room[len(d_hat) :]
