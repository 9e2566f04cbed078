"""Training steps by dense matrix products in plain torch, for GPUs. Every rule and every training choice.

At the usual sizes (d_sae / K below about 250), five dense products in bf16 cost less on a GPU than gathers along
sparse lists. A step has fixed shapes and never waits for the device: inactive pairs are zeros in dense codes, batches
are padded to `batch_size` rows, and the largest values are found by counting (`_smallest_kept`) instead of by sorting.
So `torch.compile` takes the whole step, and a CUDA graph replays it. `TORCH_COMPILE_DISABLE=1` skips the compiler.

Same results as `reference` up to rounding. With matmul "bf16", all products take bf16 factors and add in float32.
On one kind of GPU, the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saegrid.errors import first_line
from saegrid.kernels import reference
from saegrid.kernels.reference import BETAS, EPS
from saegrid.kernels.state import L1_RATE, THETA_RATE, UNDER_L1, Codes, Params, Rule, StepSettings, TrainState

logger = logging.getLogger(__name__)

DIGIT = 3
"""Bits of a batch's cut that one pass over the pre-activations determines."""
ROW_DIGIT = 2
"""The same for a cut of each row: all passes over a row are one GPU kernel."""
ROUGH = 11
"""Last bits of a cut that stay 0 with bf16 products: it is lower by less than 1/4000 of itself."""
LOOK_AHEAD = 32
"""Steps between two counts of the latents that AuxK may need."""
compiles = os.environ.get("TORCH_COMPILE_DISABLE") != "1"
"""Whether steps on a GPU are compiled."""


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in). See `reference.encode`."""
    return reference.encode(params, x, rule, matmul)


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes. See `reference.decode`."""
    return reference.decode(params, codes)


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[Tensor, Tensor]:
    """One training step, in place, without waiting for the device. See `reference.train_step`.

    Buffers, CUDA graphs and L1's weight (a tensor) are kept in `state.workspace`.

    Returns:
        The batch's mean squared error before the step and the number of active pairs: tensors without dimensions.
    """
    rows = max(len(x), settings.batch_size)
    key = (rows, rule.kind, settings._replace(lr=0.0, sink=None, start=None), settings.sink is None)
    work = state.workspace.setdefault("dense", {})
    if "l1" not in work:
        work["l1"] = torch.tensor(state.l1, device=x.device)
        state.l1 = work["l1"]  # a number again in checkpoints
    step = work.get(key) or work.setdefault(key, _Step(rows, x, rule.kind, settings))
    return step(state, x, rule, settings)


class Numbers(NamedTuple):
    """What changes from step to step: float32 tensors without dimensions on the device."""

    rows: Tensor  # rows of the batch that are not padding
    rate: Tensor  # Adam's learning rate / bias correction of the first moment
    correction: Tensor  # 1 / bias correction of the second moment
    tie: Tensor  # share of its distance to W_dec that W_enc moves
    theta_tie: Tensor  # share of its distance to the mean that theta moves
    k: Tensor  # latents per row
    aim: Tensor  # L1 is adapted until aim * k per row are active
    threshold: Tensor  # the given threshold


class _Step:
    """A step for one kind of rule, settings and batch size, with the buffers that hold its input.

    It does not hold the state, which holds it: graphs are freed with their state, not whenever cycles are collected.
    """

    def __init__(self, rows: int, x: Tensor, kind: str, settings: StepSettings):
        self.kind, self.rows = kind, rows
        self.settings = settings._replace(lr=0.0)  # each new number would be compiled again
        self.x = torch.zeros(rows, x.shape[1], device=x.device)
        self.numbers = Numbers(*(torch.zeros((), device=x.device) for _ in Numbers._fields))
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph | None, Any]] = {}
        self.room = self.due = 0  # latents that AuxK may need, until step `due`
        self.counted: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, state: TrainState, x: Tensor, rule: Rule, told: StepSettings) -> tuple[Tensor, Tensor]:
        settings = self.settings
        state.step += 1
        self.x[: len(x)].copy_(x)
        self.x[len(x) :].zero_()
        corrections = [1 - beta**state.step for beta in BETAS]
        values = (len(x), told.lr / corrections[0], 1 / corrections[1], told.tie_share, told.theta_share)
        for tensor, value in zip(self.numbers, (*values, rule.k, rule.aim, rule.threshold), strict=True):
            tensor.fill_(value)  # the kernel's launch carries the number: nothing waits for a copy
        room = self._room(state) if settings.aux_coef else 0
        run = partial(_step if x.device.type == "cpu" else _compiled, state.params, state.m, state.v, state.quiet,
                      state.workspace["dense"]["l1"], self.x, self.numbers, self.kind, settings, room)  # fmt: skip
        loss, active = self._replayed(room, run) if x.is_cuda else run()
        return loss.clone(), active.clone()

    def _replayed(self, room: int, run: Any) -> Any:
        """The step as a CUDA graph: the first of its kind runs directly, the second is captured."""
        if room not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = run()
            torch.cuda.current_stream().wait_stream(side)
            self.graphs[room] = (None, found)
            return found
        graph, found = self.graphs[room]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that sends batches may allocate meanwhile
            with _uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = run()
            self.graphs[room] = (graph, found)
        graph.replay()
        return found

    def _room(self, state: TrainState) -> int:
        """Upper bound on the latents that are dead in this step: 0, the most that AuxK uses per row, or d_sae.

        Counts are made on the device and read `LOOK_AHEAD` steps later, so each looks 2 * `LOOK_AHEAD` steps ahead.
        """
        step, settings = state.step, self.settings
        if self.counted is not None and step < self.due:
            return self.room
        first = self.counted is None
        if not first:
            self.room = self._read(len(state.params.b_enc))
        soon = settings.dead_after - 2 * LOOK_AHEAD * self.rows
        count = (state.quiet >= soon).sum()
        self.counted = (count, None)
        if count.is_cuda:
            pinned = torch.empty((), dtype=count.dtype, pin_memory=True)
            pinned.copy_(count, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.counted = (pinned, event)
        if first:
            self.room = self._read(len(state.params.b_enc))
        self.due = step + LOOK_AHEAD
        return self.room

    def _read(self, d_sae: int) -> int:
        assert self.counted is not None
        count, event = self.counted
        if event is not None:
            event.synchronize()  # long past: it was recorded LOOK_AHEAD steps ago
        dead = int(count)
        return 0 if not dead else min(d_sae, next(r for r in (self.settings.aux_k, d_sae) if dead <= r or r == d_sae))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: it may free another CUDA graph, which ends the capture of this one with an error."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compiled(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The compiled step; the plain one if compiling fails, for example without a C compiler."""
    global compiles
    if compiles:
        torch._dynamo.config.recompile_limit = 1024  # a long process has many kinds of steps, each compiled once
        try:
            return _compiled_step(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            compiles = False
            logger.warning("torch.compile failed, steps are slower without it: %s", first_line(error))
    return _step(*inputs)


# --- the step: fixed shapes, no branch on data ---


def _step(
    params: Params,
    m: Params,
    v: Params,
    quiet: Tensor,
    l1: Tensor,
    x: Tensor,
    numbers: Numbers,
    kind: str,
    settings: StepSettings,
    room: int,
) -> tuple[Tensor, Tensor]:
    """Loss and number of active pairs; changes params, m, v, quiet and l1 in place."""
    live = (torch.arange(len(x), device=x.device) < numbers.rows)[:, None]  # (N, 1): not padding
    batch = _Batch(params, x, live, numbers.rows, settings.matmul == "bf16")
    if kind == "gated":
        code = _gated(batch, settings.l1_coef * l1)
    elif kind == "jumprelu":
        code = _jumprelu(batch, numbers.k, settings)
    else:
        code = _kept(batch, kind, numbers, settings, l1)
    if settings.aux_coef:
        if room:
            _add_auxk(batch, code, quiet >= settings.dead_after, room, settings)
        quiet.add_(numbers.rows.to(quiet.dtype)).masked_fill_((code.z > 0).any(0), 0)
    active = (code.z > 0).sum()
    if kind in UNDER_L1:
        excess = active / numbers.rows / (numbers.aim * numbers.k) - 1
        l1.mul_(torch.exp(L1_RATE * excess.clamp(-1.0, 1.0))).clamp_(1e-6, 1e6)
    _update(params, m, v, _clipped(reference.allowed(code.grads, params, settings), settings), numbers)
    reference.settle(params, kind, settings, numbers.tie, numbers.theta_tie)
    return code.loss, active


_compiled_step = torch.compile(_step, fullgraph=True, dynamic=False)


class _Batch:
    """The batch and the products with it. Rows of padding have pre-activations, errors and gradients of 0."""

    def __init__(self, params: Params, x: Tensor, live: Tensor, rows: Tensor, bf16: bool):
        self.params, self.x, self.live, self.rows, self.bf16 = params, x, live, rows, bf16
        self.numel = rows * x.shape[1]
        self.centred = self.factor(x - params.b_pre)
        self.W_enc, self.W_dec = self.factor(params.W_enc), self.factor(params.W_dec)
        self.pre = torch.where(live, self.product(self.centred, self.W_enc.T) + params.b_enc, 0.0)

    def factor(self, t: Tensor) -> Tensor:
        return t.bfloat16() if self.bf16 else t

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, float32."""
        a, b = self.factor(a), self.factor(b)
        if self.bf16 and a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        return (a @ b).float()

    def smallest_kept(self, pre: Tensor, count: Tensor | int, by_row: bool) -> Tensor:
        return _smallest_kept(pre, count, by_row, ROUGH if self.bf16 else 0)

    def error(self, x_hat_part: Tensor) -> Tensor:
        """x_hat - x (N, d_in), given z W_dec."""
        return torch.where(self.live, x_hat_part + self.params.b_dec + self.params.b_pre - self.x, 0.0)

    def loss(self, error: Tensor) -> Tensor:
        return error.square().sum() / self.numel

    def slope(self, error: Tensor) -> Tensor:
        """Gradient of the mean squared error with respect to x_hat."""
        return error * (2.0 / self.numel)


class _Code(NamedTuple):
    z: Tensor  # (N, d_sae)
    error: Tensor  # (N, d_in): x_hat - x
    loss: Tensor
    grads: Params


def _kept(batch: _Batch, kind: str, numbers: Numbers, settings: StepSettings, l1: Tensor) -> _Code:
    """TopK, BatchTopK, a given threshold, ReLU; with Matryoshka's prefixes."""
    pre = batch.pre
    if kind in ("topk", "batchtopk"):
        by_row = kind == "topk"
        count = (numbers.k if by_row else numbers.k * numbers.rows).long()
        z = torch.where(pre >= batch.smallest_kept(pre, count, by_row), pre, 0.0).clamp_min(0.0)
    else:
        z = torch.where(pre > numbers.threshold, pre, 0.0).clamp_min(0.0)
    push = l1 * settings.l1_coef / batch.numel if kind in UNDER_L1 else 0.0
    ends = settings.prefixes or (pre.shape[1],)
    codes, blocks = batch.factor(z), list(_blocks(ends))
    x_hat: Any = 0.0
    errors = []
    for start, end in blocks:  # prefix by prefix: x_hat grows by one block of latents
        x_hat = x_hat + batch.product(codes[:, start:end], batch.W_dec[start:end])
        errors.append(batch.error(x_hat))
    slopes = [batch.slope(error) / len(ends) for error in errors]
    bias: Any = sum(slope.sum(0) for slope in slopes)
    d_z: list[Tensor] = []
    d_dec: list[Tensor] = []
    onwards: Any = 0.0
    for (start, end), slope in zip(reversed(blocks), reversed(slopes), strict=True):
        onwards = onwards + slope
        d_z.insert(0, batch.product(onwards, batch.W_dec[start:end].T))
        d_dec.insert(0, batch.product(codes[:, start:end].T, onwards))
    d_pre = torch.where(z > 0, torch.cat(d_z, 1) + push, 0.0)
    return _Code(z, errors[-1], batch.loss(errors[-1]), _of_encoder(batch, d_pre, torch.cat(d_dec), bias))


def _blocks(ends: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, end) of the latents that each prefix adds."""
    return zip((0, *ends[:-1]), ends, strict=True)


def _of_encoder(batch: _Batch, d_pre: Tensor, of_dec: Tensor, bias: Tensor, **others: Tensor) -> Params:
    """All gradients, given those of the pre-activations (N, d_sae), of W_dec, and of the biases through x_hat."""
    params, total = batch.params, d_pre.sum(0)
    return Params(
        W_enc=batch.product(d_pre.T, batch.centred),
        b_enc=total,
        W_dec=of_dec,
        b_dec=bias,
        b_pre=bias - total @ params.W_enc,
        theta=others.get("theta", torch.zeros_like(params.theta)),
        gain=others.get("gain", torch.zeros_like(params.gain)),
    )


def _jumprelu(batch: _Batch, k: Tensor, settings: StepSettings) -> _Code:
    """See `reference.jumprelu_gradients`."""
    params, pre, half = batch.params, batch.pre, settings.bandwidth / 2
    z = torch.where((pre > params.theta) & batch.live, pre, 0.0)
    error = batch.error(batch.product(z, batch.W_dec))
    slope = batch.slope(error)
    d_z = batch.product(slope, batch.W_dec.T)
    active = (z > 0).sum()
    pull = 2 * settings.l0_coef * (active / batch.rows / k - 1) / (k * batch.rows)
    near = (pre > params.theta - half) & (z < params.theta + half) & batch.live
    of_theta = torch.where(near, -(params.theta * d_z + pull) / settings.bandwidth, 0.0).sum(0)
    d_pre = torch.where(z > 0, d_z, 0.0)
    of_dec = batch.product(z.T, slope)
    return _Code(z, error, batch.loss(error), _of_encoder(batch, d_pre, of_dec, slope.sum(0), theta=of_theta))


def _gated(batch: _Batch, l1: Tensor) -> _Code:
    """See `reference.gated_gradients`."""
    params, gate, scale = batch.params, batch.pre.clamp_min(0.0), batch.params.gain.exp()
    z = torch.where(gate > 0, scale * gate + params.theta, 0.0).clamp_min(0.0)
    error = batch.error(batch.product(z, batch.W_dec))
    slope = batch.slope(error)
    d_z = torch.where(z > 0, batch.product(slope, batch.W_dec.T), 0.0)
    gate_slope = batch.slope(batch.error(batch.product(gate, batch.W_dec)))
    push = l1 / batch.numel
    of_gate = torch.where(gate > 0, batch.product(gate_slope, batch.W_dec.T) + push, 0.0)
    grads = _of_encoder(
        batch, scale * d_z + of_gate, batch.product(z.T, slope), slope.sum(0),
        theta=d_z.sum(0), gain=(d_z * (z - params.theta)).sum(0),
    )  # fmt: skip
    return _Code(z, error, batch.loss(error), grads)


def _add_auxk(batch: _Batch, code: _Code, dead: Tensor, room: int, settings: StepSettings) -> None:
    """Add AuxK's gradient (`reference.auxk_gradients`), from `room` latents, all dead ones among them."""
    params, grads = batch.params, code.grads
    chosen: Any = dead.int().topk(room, sorted=False).indices if room < len(dead) else slice(None)
    pre = torch.where(dead[chosen], batch.pre[:, chosen], 0.0)  # (N, room)
    if room > settings.aux_k:
        pre = torch.where(pre >= batch.smallest_kept(pre, settings.aux_k, by_row=True), pre, 0.0)
    z = pre.clamp_min(0.0)
    residual = -code.error  # 0 in rows of padding
    mean = residual.sum(0) / batch.rows
    variance = torch.where(batch.live, residual - mean, 0.0).square().sum() / batch.numel
    scale = torch.where(variance > 0, settings.aux_coef / variance, 0.0)
    W_dec = batch.W_dec[chosen]
    slope = torch.where(batch.live, batch.product(z, W_dec) - residual, 0.0) * (2.0 * scale / batch.numel)
    d_pre = torch.where(z > 0, batch.product(slope, W_dec.T), 0.0)
    total = d_pre.sum(0)
    grads.W_enc[chosen] += batch.product(d_pre.T, batch.centred)
    grads.W_dec[chosen] += batch.product(z.T, slope)
    grads.b_enc[chosen] += total
    grads.b_pre.sub_(total @ params.W_enc[chosen])


def _smallest_kept(pre: Tensor, count: Tensor | int, by_row: bool, rough: int = 0) -> Tensor:
    """The `count`-th largest value of pre (N, d_sae): of all, (1, 1), or of each row, (N, 1).

    Exact: positive floats have the order of their bits, and each pass counts how many values reach each possible next
    digit. Equal values at the cut are all kept. 0 if fewer than `count` are positive. The last `rough` bits stay 0.
    """
    bits = pre.clamp_min(0.0).view(torch.int32)
    cut = torch.zeros(len(pre) if by_row else 1, 1, dtype=torch.int32, device=pre.device)
    step = ROW_DIGIT if by_row else DIGIT
    for high in range(31, rough, -step):
        low = max(high - step, rough)
        digits = range(1, 2 ** (high - low))
        reached = [(bits >= cut + (digit << low)).sum(1, dtype=torch.int32) for digit in digits]  # each (N,)
        if not by_row:
            reached = [counts.sum(0, keepdim=True) for counts in reached]
        digit: Any = sum((counts >= count).to(torch.int32) for counts in reached)
        cut = cut + (digit << low)[:, None]
    return cut.view(torch.float32)


def _clipped(grads: Params, settings: StepSettings) -> Params:
    if not settings.grad_clip:
        return grads
    norm = sum(g.square().sum() for g in grads).sqrt()  # type: ignore[union-attr]
    scale = (settings.grad_clip / (norm + 1e-6)).clamp_max(1.0)
    return Params(*(g * scale for g in grads))


def _update(params: Params, m: Params, v: Params, grads: Params, numbers: Numbers) -> None:
    """Adam and unit-norm decoder rows."""
    beta1, beta2 = BETAS
    for name, p, g, mean, square in zip(Params._fields, params, grads, m, v, strict=True):
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        rate = numbers.rate * (THETA_RATE if name == "theta" else 1.0)
        p.sub_(rate * mean / ((square * numbers.correction).sqrt() + EPS))
    params.W_dec.div_(params.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
