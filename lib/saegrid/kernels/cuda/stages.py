"""The stages of the `cuda` kernel's step. Each takes tensors and buffers and launches kernels; none waits for them."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saegrid.errors import ConfigError
from saegrid.kernels.cuda import pairs, select
from saegrid.kernels.cuda.dense import product_if_dense
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

DENSE_ABOVE = 1 / 16  # share of active pairs above which products beat lists: estimated from an H100's rates
BLOCK = 1024  # pre-activations of a row at a time
SEGMENT, TILE_ROWS, TILE_LATENTS = 128, 32, 64  # tile sizes for reordering lists from rows to latents
PAIRS, WIDTH = 16, 128  # tile sizes for pairs and weight columns
ROW_FLOATS = 8192  # values of one array that a program of `step_latents` holds at a time
PROGRAMS = 1024  # of kernels that loop; fixed, so that sums across programs are the same on any GPU
PRODUCT_TILE = {"M": 64, "N": 128, "K": 32, "num_warps": 8}


class Lists(NamedTuple):
    """Kept pairs, row by row, in buffers that may be longer than the count in `facts` (see `select`)."""

    offsets: Tensor  # (N + 1,) int32
    rows: Tensor  # (capacity,) int32
    latents: Tensor  # (capacity,) int32
    values: Tensor  # (capacity,) float32; 0 where a bf16 product kept what float32 would not
    facts: Tensor  # (3,) int32


class ByLatent(NamedTuple):
    """The same pairs latent by latent: latent j has entries starts[j * segments] to starts[(j + 1) * segments]."""

    starts: Tensor  # (1 + d_sae * segments,) int32
    segments: int
    rows: Tensor  # (capacity,) int32, ascending within a latent
    values: Tensor  # (capacity,) float32


class Buffers(dict):
    """A step's tensors by name, uninitialised. A smaller batch uses the front of a larger one's."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}  # None: such a step has run, and may be captured

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        size, kept = torch.Size(shape).numel(), self.get(name)
        if kept is None or len(kept) < size or kept.dtype != dtype:
            kept = self[name] = torch.empty(size, dtype=dtype, device=self.device)
            self.graphs.clear()  # graphs would write to the old one
        return kept[:size].view(shape)


# --- encoder ---


class Cuts(NamedTuple):
    """Where each row's code is cut, as bits of a float, and the layout of the lists."""

    bits: Tensor  # (N,) int32
    ties: Tensor  # (N,) int32: how many of the values that equal the cut are kept
    offsets: Tensor  # (N + 1,) int32
    facts: Tensor  # (3,) int32


def pre_acts(params: Params, centred: Tensor, matmul: str, buffers: Buffers) -> Tensor:
    """Pre-activations (N, d_sae) without b_enc, in the product's precision.

    Raises:
        ConfigError: there are too many to count in 32 bits.
    """
    if len(centred) * len(params.b_enc) >= 2**31:
        shape = f"{len(centred)} * {len(params.b_enc)}"
        raise ConfigError(f"batch_size * d_sae = {shape}: the cuda kernel takes less than 2**31; lower batch_size")
    dtype = torch.bfloat16 if matmul == "bf16" else torch.float32
    out = buffers.take(f"pre {dtype}", (len(centred), len(params.b_enc)), dtype)
    weights = params.W_enc
    if matmul == "bf16":
        centred = buffers.take("centred bf16", centred.shape, dtype).copy_(centred)
        weights = buffers.take("W_enc bf16", weights.shape, dtype).copy_(weights)
    return torch.mm(centred, weights.T, out=out)


def _bound(rule: Rule) -> float:
    return max(rule.threshold, 0.0) if rule.kind == "threshold" else 0.0


def cut(pre: Tensor, params: Params, rule: Rule, capacity: int, buffers: Buffers) -> Cuts:
    """What the rule keeps of each row of pre (N, d_sae) + b_enc; lists have room for `capacity` pairs."""
    n_rows, d_sae = pre.shape
    bits, above, ties = (buffers.take(name, (n_rows,), torch.int32) for name in ("cuts", "above", "ties"))
    offsets = buffers.take("offsets", (n_rows + 1,), torch.int32)
    facts = buffers.take("facts", (3,), torch.int32).zero_()
    histograms = buffers.take("histograms", (4, 256), torch.int32)
    batch, count = rule.kind == "batchtopk", n_rows * min(rule.k, d_sae)
    if rule.kind == "topk":
        select.cut_rows[(n_rows,)](pre, params.b_enc, d_sae, min(rule.k, d_sae), bits, above, ties, BLOCK=BLOCK)
    else:
        if batch:
            histograms.zero_()
            for level in range(4):
                select.batch_digits[(min(n_rows, PROGRAMS),)](
                    pre, params.b_enc, n_rows, d_sae, count, histograms, LEVEL=level, BLOCK=BLOCK
                )
        (threshold,) = struct.unpack("i", struct.pack("f", _bound(rule)))
        select.count_rows[(n_rows,)](
            pre, params.b_enc, d_sae, threshold, histograms, count, bits, above, ties, BATCH=batch, BLOCK=BLOCK
        )
    select.place_rows[(1,)](
        above, ties, histograms, count, n_rows, capacity, offsets, facts, BATCH=batch, BLOCK=BLOCK
    )  # fmt: skip
    return Cuts(bits, ties, offsets, facts)


def list_pairs(
    pre: Tensor, params: Params, cuts: Cuts, capacity: int, by_latent: bool, buffers: Buffers
) -> tuple[Lists, tuple[Tensor | None, Tensor | None, int]]:
    """The kept pairs, and (places, counts, segments) for the lists by latent, see `list_rows`."""
    n_rows, d_sae = pre.shape
    rows, latents = (buffers.take(f"pairs' {name}", (capacity,), torch.int32) for name in ("rows", "latents"))
    values = buffers.take("pairs' values", (capacity,))
    places, counts, segments = None, None, triton.cdiv(n_rows, SEGMENT)
    if by_latent:
        places = buffers.take("places", pre.shape, torch.int32)
        counts = buffers.take("counts", (1 + d_sae * segments,), torch.int32).zero_()
    select.list_rows[(n_rows,)](
        pre, params.b_enc, d_sae, cuts.bits, cuts.ties, cuts.offsets, capacity, rows, latents, values,
        places, counts, segments, BY_LATENT=by_latent, SEGMENT=SEGMENT, BLOCK=BLOCK,
    )  # fmt: skip
    return Lists(cuts.offsets, rows, latents, values, cuts.facts), (places, counts, segments)


def recompute(params: Params, centred: Tensor, lists: Lists, rule: Rule) -> None:
    """The listed values in float32."""
    programs = min(triton.cdiv(len(lists.values), PAIRS), 8 * PROGRAMS)
    if programs:
        pairs.recompute[(programs,)](
            centred, params.W_enc, params.b_enc, lists.rows, lists.latents, lists.values, lists.facts,
            _bound(rule), centred.shape[1], PAIRS=PAIRS, WIDTH=WIDTH,
        )  # fmt: skip


# --- decoder and backward ---


def decode(
    params: Params, lists: Lists, product: Tensor | None, x: Tensor | None, out: Tensor, square_sums: Tensor | None
) -> None:
    """Write the reconstruction to `out`, or, given x, the loss's gradient with respect to it; see `decode_rows`."""
    n_rows, d_in = out.shape
    pairs.decode_rows[(n_rows, triton.cdiv(d_in, WIDTH))](
        lists.offsets, lists.latents, lists.values, params.W_dec, params.b_dec, params.b_pre, product, x, out,
        square_sums, lists.facts, 2 / out.numel(), d_in,
        MAY_BE_DENSE=product is not None, ERROR=x is not None, PAIRS=PAIRS, WIDTH=WIDTH,
    )  # fmt: skip


def error(params: Params, x: Tensor, lists: Lists, may_be_dense: bool, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Loss (float64, no dimensions), and its gradient d_hat (N, d_in) with respect to x_hat."""
    d_hat = buffers.take("d_hat", x.shape)
    square_sums = buffers.take("square sums", (len(x), triton.cdiv(x.shape[1], WIDTH)), torch.float64)
    product = buffers.take("product", x.shape) if may_be_dense else None
    decode(params, lists, product, x, d_hat, square_sums)
    loss = buffers.take("loss", (1,), torch.float64)
    torch.sum(square_sums.view(-1), 0, keepdim=True, out=loss).div_(x.numel())
    return loss[0], d_hat


def by_latent(places: Tensor, counts: Tensor, lists: Lists, segments: int, buffers: Buffers) -> ByLatent:
    n_rows, d_sae = places.shape
    starts = torch.cumsum(counts, 0, dtype=torch.int32, out=buffers.take("starts", counts.shape, torch.int32))
    rows = buffers.take("latents' rows", lists.rows.shape, torch.int32)
    values = buffers.take("latents' values", lists.values.shape)
    select.list_latents[(triton.cdiv(d_sae, TILE_LATENTS), segments)](
        places, lists.values, starts, lists.facts, n_rows, d_sae, segments, rows, values,
        SEGMENT=SEGMENT, ROWS=TILE_ROWS, LATENTS=TILE_LATENTS,
    )  # fmt: skip
    return ByLatent(starts, segments, rows, values)


def gradients(
    params: Params, centred: Tensor, d_hat: Tensor, lists: Lists, by_latent: ByLatent, may_be_dense: bool,
    project: bool, buffers: Buffers,
) -> tuple[Params, Tensor]:  # fmt: skip
    """Gradients, in buffers, and each latent's part of their squared norm (d_sae,) float64."""
    squares = buffers.take("squares", (len(params.b_enc),), torch.float64)
    pull = _latents(
        (params, params, params), d_hat, centred, lists, by_latent, squares, buffers,
        from_pairs=True, from_memory=may_be_dense, project=project, apply=False,
    )  # fmt: skip
    return Params(*_gradient_buffers(params, buffers), *_bias_gradients(d_hat, pull)), squares


def _gradient_buffers(params: Params, buffers: Buffers) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(buffers.take(f"grad {name}", getattr(params, name).shape) for name in Params._fields[:3])


def _bias_gradients(d_hat: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Of b_dec and b_pre, (d_in,) each."""
    of_decoder = d_hat.sum(0)
    return of_decoder, of_decoder - pull.sum(0)


def _latents(
    weights: tuple[Params, Params, Params], d_hat: Tensor | None, centred: Tensor, lists: Lists, by_latent: ByLatent,
    squares: Tensor | None, buffers: Buffers, *, from_pairs: bool, from_memory: bool, project: bool, apply: bool,
) -> Tensor:  # fmt: skip
    """One pass over the latents, see `step_latents`. Returns its `pull`."""
    params, d_sae, d_in = weights[0], *weights[0].W_enc.shape
    programs, width = min(d_sae, PROGRAMS), triton.next_power_of_2(d_in)
    grads = (None, None, None) if apply and not from_memory else _gradient_buffers(params, buffers)
    pull = buffers.take("pull", (programs, d_in))
    pairs.step_latents[(programs,)](
        by_latent.starts, by_latent.segments, by_latent.rows, by_latent.values, d_hat, centred, lists.facts,
        buffers.get("hyper"), *(tensor for part in weights for tensor in part[:3]), *grads,
        pull, squares, d_sae, d_in,
        FROM_PAIRS=from_pairs, FROM_MEMORY=from_memory, PROJECT=project, APPLY=apply,
        PAIRS=max(1, min(PAIRS, ROW_FLOATS // width)), WIDTH=width, num_warps=min(8, max(1, width // 128)),
    )  # fmt: skip
    return pull


def update(
    state: TrainState, centred: Tensor, d_hat: Tensor, lists: Lists, by_latent: ByLatent, may_be_dense: bool,
    settings: StepSettings, buffers: Buffers,
) -> None:  # fmt: skip
    """Gradients, clipping, Adam, unit norm."""
    weights, hyper = (state.params, state.m, state.v), buffers["hyper"]
    common = d_hat, centred, lists, by_latent
    if settings.grad_clip:
        grads, squares = gradients(state.params, centred, d_hat, lists, by_latent, may_be_dense,
                                    settings.project_grad, buffers)  # fmt: skip
        norm = (squares.sum() + sum(g.double().square().sum() for g in grads[3:5])).sqrt()
        hyper[2].copy_((settings.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        _latents(weights, *common, None, buffers, from_pairs=False, from_memory=True, project=False, apply=True)
        of_decoder, of_centre = grads[3:5]
    else:
        pull = _latents(
            weights, *common, None, buffers, from_pairs=True, from_memory=may_be_dense,
            project=settings.project_grad, apply=True,
        )  # fmt: skip
        of_decoder, of_centre = _bias_gradients(d_hat, pull)
    pairs.step_vectors[(triton.cdiv(len(of_centre), WIDTH),)](
        of_decoder, of_centre, *(part.b_dec for part in weights), *(part.b_pre for part in weights), hyper,
        len(of_centre), CLIP=settings.grad_clip > 0, WIDTH=WIDTH,
    )  # fmt: skip


# --- codes that are not sparse ---


def multiply_if_dense(a: Tensor, b: Tensor, out: Tensor, lists: Lists, gate: Tensor | None = None) -> None:
    """out = a @ b, with 0 where `gate` is not above 0; does nothing if the device finds the codes sparse."""
    _launch_product(a, b, out, lists, gate, None, 0.0)


def _launch_product(a, b, out, lists: Lists, gate, bias, bound: float) -> None:
    (m, k), n = a.shape, b.shape[1]
    product_if_dense[(triton.cdiv(m, PRODUCT_TILE["M"]), triton.cdiv(n, PRODUCT_TILE["N"]))](
        a, b, out, lists.facts, gate, bias, bound, m, n, k, *a.stride(), *b.stride(),
        ENCODE=bias is not None, GATED=gate is not None and bias is None, **PRODUCT_TILE,
    )  # fmt: skip


def dense_codes(params: Params, centred: Tensor, places: Tensor, lists: Lists, rule: Rule, buffers: Buffers) -> Tensor:
    """z (N, d_sae) of the kept pairs, if the codes are dense."""
    z = buffers.take("z", places.shape)
    _launch_product(centred, params.W_enc.T, z, lists, places, params.b_enc, _bound(rule))
    return z


def dense_gradients(
    params: Params, z: Tensor, d_hat: Tensor, centred: Tensor, lists: Lists, buffers: Buffers
) -> None:  # fmt: skip
    """Gradients of both matrices and b_enc, in their buffers, if the codes are dense."""
    of_encoder, of_bias, of_decoder = _gradient_buffers(params, buffers)
    d_z = buffers.take("d_z", z.shape)
    multiply_if_dense(d_hat, params.W_dec.T, d_z, lists, gate=z)
    multiply_if_dense(z.T, d_hat, of_decoder, lists)
    multiply_if_dense(d_z.T, centred, of_encoder, lists)
    torch.sum(d_z, 0, out=of_bias)
