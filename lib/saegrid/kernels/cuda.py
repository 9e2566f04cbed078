"""The kernel for NVIDIA GPUs: torch's matrix product for the encoder, Triton loops over the active pairs for the rest.

Same functions, arguments and results as `reference`, up to rounding, on the device of the tensors; loss and number of
active pairs come back as tensors without dimensions. A step is

1. pre-activations by one product (float32 or bfloat16), an exact cut by radix select, and lists of the kept pairs;
2. with a bfloat16 product, the kept values again in float32;
3. reconstruction row by row, from the decoder rows of the active latents alone;
4. latent by latent: gradient from the active pairs, Adam, unit norm, while the latent's rows are in registers.

The host never waits for the device inside `train_step`, and launches a step as one CUDA graph once it has run the same
kind of step before. Lists have room for what TopK and BatchTopK can keep, but for no more than `DENSE_ABOVE` of all
pairs; where the device finds more (JumpReLU with a low threshold), its dense products do 2 to 4 instead, and the lists
stay empty (`_triton_dense`). Sums run in a fixed order and no float is added atomically: on one GPU model, the same
input gives the same bytes.

So far this has run in Triton's interpreter, and every kernel of a step has been compiled for compute capability 9.0.
It has not run on a GPU yet: the sizes of blocks, grids and `DENSE_ABOVE` are estimates, and CUDA graphs and the absence
of waiting are tested only where a GPU is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saegrid.kernels import _triton_pairs as pairs
from saegrid.kernels import _triton_select as select
from saegrid.kernels._triton_dense import product_if_dense
from saegrid.kernels.reference import BETAS, Codes, Params, Rule, StepSettings, TrainState

DENSE_ABOVE = 1 / 16  # share of active pairs above which products beat lists: estimated from an H100's rates
BLOCK = 1024  # pre-activations of a row at a time
SEGMENT, TILE_ROWS, TILE_LATENTS = 128, 32, 64  # of the tiles in which lists turn from rows to latents
PAIRS, WIDTH = 16, 128  # of the tiles in which pairs meet weights
ROW_FLOATS = 8192  # values of one array that a program of `step_latents` holds at a time
PROGRAMS = 1024  # of kernels that loop; fixed, so that sums across programs are the same on any GPU
PRODUCT_TILE = {"M": 64, "N": 128, "K": 32}


class Lists(NamedTuple):
    """Kept pairs, row by row, in buffers that may be longer than what `facts` (see `_triton_select`) says is in them."""

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
    """A step's tensors by name, of any content. A smaller batch takes the front of a larger one's."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}  # None: such a step has run, and may be captured

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        size, kept = torch.Size(shape).numel(), self.get(name)
        if kept is None or len(kept) < size or kept.dtype != dtype:
            kept = self[name] = torch.empty(size, dtype=dtype, device=self.device)
            self.graphs.clear()  # they would write to the old one
        return kept[:size].view(shape)


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in). See `reference.encode`. Waits for the device: it alone knows their number."""
    buffers, d_sae = Buffers(x.device), len(params.b_enc)
    centred = (x - params.b_pre).contiguous()
    pre = _pre_acts(params, centred, matmul, buffers)
    cuts = _cut(pre, params, rule, len(x) * d_sae, buffers)
    lists, _ = _list(pre, params, cuts, cuts.facts[0].item(), False, buffers)
    offsets, latents, values = lists.offsets.long(), lists.latents, lists.values
    if matmul == "bf16":
        _recompute(params, centred, lists, rule)
        kept = values > 0
        before = torch.cat([offsets[:1], kept.cumsum(0)])  # kept pairs in front of each one
        offsets, latents, values = before[offsets], latents[kept], values[kept]
    return Codes(offsets, latents, values)


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes. See `reference.decode`."""
    n_rows, d_in = len(codes.offsets) - 1, params.W_dec.shape[1]
    x_hat = torch.empty(n_rows, d_in, device=params.W_dec.device)
    lists = Lists(codes.offsets, codes.latents, codes.latents, codes.values, None)
    _decode(params, lists, None, None, x_hat, None)
    return x_hat


def gradients(params: Params, x: Tensor, codes: Codes) -> tuple[Tensor, Params]:
    """Loss and its gradient through the active pairs, dense. See `reference.gradients`."""
    buffers, (n_rows, d_sae) = Buffers(x.device), (len(x), len(params.b_enc))
    x, capacity = x.contiguous(), len(codes.values)
    facts = torch.tensor([capacity, 0, 0], dtype=torch.int32, device=x.device)
    rows = torch.repeat_interleave(torch.arange(n_rows, device=x.device), codes.offsets.diff())
    lists = Lists(codes.offsets, rows.int(), codes.latents, codes.values, facts)
    places = torch.zeros(n_rows, d_sae, dtype=torch.int32, device=x.device)
    places[rows, codes.latents.long()] = torch.arange(1, capacity + 1, dtype=torch.int32, device=x.device)
    segments = triton.cdiv(n_rows, SEGMENT)
    counts = torch.zeros(1 + d_sae * segments, dtype=torch.int32, device=x.device)
    counts[1:] = torch.bincount(codes.latents.long() * segments + rows // SEGMENT, minlength=d_sae * segments)
    loss, d_hat = _error(params, x, lists, False, buffers)
    by_latent = _by_latent(places, counts, lists, segments, buffers)
    grads, _ = _gradients(params, x - params.b_pre, d_hat, lists, by_latent, False, False, buffers)
    return loss, Params(*(g.clone() for g in grads))


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[Tensor, Tensor]:
    """One training step, in place, without waiting for the device. See `reference.train_step`.

    Buffers and CUDA graphs are kept in `state.workspace`.

    Returns:
        The batch's mean squared error before the step, float64, and the number of active pairs, int32: tensors without
        dimensions on the device of x.
    """
    if "cuda" not in state.workspace:
        state.workspace["cuda"] = Buffers(x.device)
    buffers: Buffers = state.workspace["cuda"]
    buffers.take("x", x.shape).copy_(x)
    state.step += 1
    hyper = buffers.take("hyper", (3,))  # by kernels that take the numbers as arguments: no copy from the host
    hyper[:1].fill_(settings.lr / (1 - BETAS[0] ** state.step))
    hyper[1:2].fill_(1 / (1 - BETAS[1] ** state.step))
    if x.is_cuda:
        _replay(state, len(x), rule, settings._replace(lr=0.0), buffers)
    else:
        _step(state, len(x), rule, settings, buffers)
    return buffers["loss"][0].clone(), buffers["facts"][2].clone()


# --- CUDA graphs ---


def _replay(state: TrainState, n_rows: int, rule: Rule, settings: StepSettings, buffers: Buffers) -> None:
    """The step as a graph: the first of its kind runs plainly and so compiles and allocates, the second is captured."""
    tensors = (tensor for part in (state.params, state.m, state.v) for tensor in part)
    key = (n_rows, rule, settings, *(tensor.data_ptr() for tensor in tensors))
    if key not in buffers.graphs:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _step(state, n_rows, rule, settings, buffers)
        torch.cuda.current_stream().wait_stream(side)
        buffers.graphs[key] = None
        return
    graph = buffers.graphs[key]
    if graph is None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that prefetches batches may allocate meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            _step(state, n_rows, rule, settings, buffers)
        buffers.graphs[key] = graph
    graph.replay()


def _step(state: TrainState, n_rows: int, rule: Rule, settings: StepSettings, buffers: Buffers) -> None:
    """All launches of a step: from buffers "x" and "hyper" to the state, and to buffers "loss" and "facts"."""
    params, d_sae = state.params, len(state.params.b_enc)
    x = buffers.take("x", (n_rows, params.W_enc.shape[1]))
    centred = torch.sub(x, params.b_pre, out=buffers.take("centred", x.shape))
    at_most = n_rows * (d_sae if rule.kind == "threshold" else min(rule.k, d_sae))
    capacity = min(at_most, max(1, int(DENSE_ABOVE * n_rows * d_sae)))
    may_be_dense = capacity < at_most
    pre = _pre_acts(params, centred, settings.matmul, buffers)
    cuts = _cut(pre, params, rule, capacity, buffers)
    lists, (places, counts, segments) = _list(pre, params, cuts, capacity, True, buffers)
    if settings.matmul == "bf16":
        _recompute(params, centred, lists, rule)
    if may_be_dense:
        z = _dense_codes(params, centred, places, lists, rule, buffers)
        _product_if_dense(z, params.W_dec, buffers.take("product", x.shape), lists)
    _, d_hat = _error(params, x, lists, may_be_dense, buffers)
    if may_be_dense:
        _dense_gradients(params, z, d_hat, centred, lists, buffers)
    by_latent = _by_latent(places, counts, lists, segments, buffers)
    _update(state, centred, d_hat, lists, by_latent, may_be_dense, settings, buffers)


# --- encoder ---


class Cuts(NamedTuple):
    """Where each row's code is cut, as bits of a float, and what the lists will look like."""

    bits: Tensor  # (N,) int32
    ties: Tensor  # (N,) int32: how many of the values that equal the cut are kept
    offsets: Tensor  # (N + 1,) int32
    facts: Tensor  # (3,) int32


def _pre_acts(params: Params, centred: Tensor, matmul: str, buffers: Buffers) -> Tensor:
    """Pre-activations (N, d_sae) without b_enc, in the product's precision."""
    dtype = torch.bfloat16 if matmul == "bf16" else torch.float32
    out = buffers.take(f"pre {dtype}", (len(centred), len(params.b_enc)), dtype)
    weights = params.W_enc
    if matmul == "bf16":
        centred = buffers.take("centred bf16", centred.shape, dtype).copy_(centred)
        weights = buffers.take("W_enc bf16", weights.shape, dtype).copy_(weights)
    return torch.mm(centred, weights.T, out=out)


def _bound(rule: Rule) -> float:
    return max(rule.threshold, 0.0) if rule.kind == "threshold" else 0.0


def _cut(pre: Tensor, params: Params, rule: Rule, capacity: int, buffers: Buffers) -> Cuts:
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
        select.count_rows[(n_rows,)](
            pre, params.b_enc, d_sae, _bound(rule), histograms, count, bits, above, ties, BATCH=batch, BLOCK=BLOCK
        )
    select.place_rows[(1,)](
        above, ties, histograms, count, n_rows, capacity, offsets, facts, BATCH=batch, BLOCK=BLOCK
    )  # fmt: skip
    return Cuts(bits, ties, offsets, facts)


def _list(
    pre: Tensor, params: Params, cuts: Cuts, capacity: int, by_latent: bool, buffers: Buffers
) -> tuple[Lists, tuple[Tensor | None, Tensor | None, int]]:
    """The kept pairs; and for the lists by latent (places, counts, segments), see `list_rows`."""
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


def _recompute(params: Params, centred: Tensor, lists: Lists, rule: Rule) -> None:
    """The listed values in float32."""
    programs = min(triton.cdiv(len(lists.values), PAIRS), 8 * PROGRAMS)
    if programs:
        pairs.recompute[(programs,)](
            centred, params.W_enc, params.b_enc, lists.rows, lists.latents, lists.values, lists.facts,
            _bound(rule), centred.shape[1], PAIRS=PAIRS, WIDTH=WIDTH,
        )  # fmt: skip


# --- decoder and backward ---


def _decode(
    params: Params, lists: Lists, product: Tensor | None, x: Tensor | None, out: Tensor, square_sums: Tensor | None
) -> None:
    """Reconstruction in `out`; where there is an x, the loss's gradient with respect to it, see `decode_rows`."""
    n_rows, d_in = out.shape
    pairs.decode_rows[(n_rows, triton.cdiv(d_in, WIDTH))](
        lists.offsets, lists.latents, lists.values, params.W_dec, params.b_dec, params.b_pre, product, x, out,
        square_sums, lists.facts, 2 / out.numel(), d_in,
        MAY_BE_DENSE=product is not None, ERROR=x is not None, PAIRS=PAIRS, WIDTH=WIDTH,
    )  # fmt: skip


def _error(params: Params, x: Tensor, lists: Lists, may_be_dense: bool, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Loss (float64, no dimensions), and its gradient d_hat (N, d_in) with respect to x_hat."""
    d_hat = buffers.take("d_hat", x.shape)
    square_sums = buffers.take("square sums", (len(x), triton.cdiv(x.shape[1], WIDTH)), torch.float64)
    product = buffers.take("product", x.shape) if may_be_dense else None
    _decode(params, lists, product, x, d_hat, square_sums)
    loss = buffers.take("loss", (1,), torch.float64)
    torch.sum(square_sums.view(-1), 0, keepdim=True, out=loss).div_(x.numel())
    return loss[0], d_hat


def _by_latent(places: Tensor, counts: Tensor, lists: Lists, segments: int, buffers: Buffers) -> ByLatent:
    n_rows, d_sae = places.shape
    starts = torch.cumsum(counts, 0, dtype=torch.int32, out=buffers.take("starts", counts.shape, torch.int32))
    rows = buffers.take("latents' rows", lists.rows.shape, torch.int32)
    values = buffers.take("latents' values", lists.values.shape)
    select.list_latents[(triton.cdiv(d_sae, TILE_LATENTS), segments)](
        places, lists.values, starts, lists.facts, n_rows, d_sae, segments, rows, values,
        SEGMENT=SEGMENT, ROWS=TILE_ROWS, LATENTS=TILE_LATENTS,
    )  # fmt: skip
    return ByLatent(starts, segments, rows, values)


def _gradients(
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


def _update(
    state: TrainState, centred: Tensor, d_hat: Tensor, lists: Lists, by_latent: ByLatent, may_be_dense: bool,
    settings: StepSettings, buffers: Buffers,
) -> None:  # fmt: skip
    """Gradients, clipping, Adam, unit norm."""
    weights, hyper = (state.params, state.m, state.v), buffers["hyper"]
    common = d_hat, centred, lists, by_latent
    if settings.grad_clip:
        grads, squares = _gradients(state.params, centred, d_hat, lists, by_latent, may_be_dense,
                                    settings.project_grad, buffers)  # fmt: skip
        norm = (squares.sum() + sum(g.double().square().sum() for g in grads[3:])).sqrt()
        hyper[2].copy_((settings.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        _latents(weights, *common, None, buffers, from_pairs=False, from_memory=True, project=False, apply=True)
        of_decoder, of_centre = grads[3:]
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


def _product_if_dense(a: Tensor, b: Tensor, out: Tensor, lists: Lists, gate: Tensor | None = None) -> None:
    """out = a @ b, 0 where there is a gate that is not above 0; does nothing where the device finds the codes sparse."""
    _launch_product(a, b, out, lists, gate, None, 0.0)


def _launch_product(a, b, out, lists: Lists, gate, bias, bound: float) -> None:
    (m, k), n = a.shape, b.shape[1]
    product_if_dense[(triton.cdiv(m, PRODUCT_TILE["M"]), triton.cdiv(n, PRODUCT_TILE["N"]))](
        a, b, out, lists.facts, gate, bias, bound, m, n, k, *a.stride(), *b.stride(),
        ENCODE=bias is not None, GATED=gate is not None and bias is None, **PRODUCT_TILE,
    )  # fmt: skip


def _dense_codes(params: Params, centred: Tensor, places: Tensor, lists: Lists, rule: Rule, buffers: Buffers) -> Tensor:
    """z (N, d_sae) of the kept pairs, where the codes are dense."""
    z = buffers.take("z", places.shape)
    _launch_product(centred, params.W_enc.T, z, lists, places, params.b_enc, _bound(rule))
    return z


def _dense_gradients(
    params: Params, z: Tensor, d_hat: Tensor, centred: Tensor, lists: Lists, buffers: Buffers
) -> None:  # fmt: skip
    """Gradients of both matrices and b_enc, in their buffers, where the codes are dense."""
    of_encoder, of_bias, of_decoder = _gradient_buffers(params, buffers)
    d_z = buffers.take("d_z", z.shape)
    _product_if_dense(d_hat, params.W_dec.T, d_z, lists, gate=z)
    _product_if_dense(z.T, d_hat, of_decoder, lists)
    _product_if_dense(d_z.T, centred, of_encoder, lists)
    torch.sum(d_z, 0, out=of_bias)
