"""The kernel for NVIDIA GPUs: torch's matrix product for the encoder, Triton loops over the active pairs for the rest.

Same functions, arguments and results as `reference`, up to rounding, on the device of the tensors; loss and number of
active pairs come back as tensors without dimensions. A step is

1. pre-activations by one product (float32 or bfloat16), an exact cut by radix select, and lists of the kept pairs;
2. with a bfloat16 product, the kept values recomputed in float32;
3. reconstruction row by row, from the decoder rows of the active latents alone;
4. latent by latent: gradient from the active pairs, Adam, unit norm, while the latent's rows are in registers.

The host never waits for the device inside `train_step`, and launches a step as one CUDA graph if the same kind of
step has run before. Lists have room for what TopK and BatchTopK can keep, but for at most `DENSE_ABOVE` of all pairs;
if the device finds more (JumpReLU with a low threshold), its dense products do 2 to 4 instead, and the lists
stay empty (`dense`). Sums run in a fixed order and no float is added atomically: on one GPU model, the same
input gives the same bytes.

So far this has run in Triton's interpreter, and every kernel of a step has been compiled for compute capability 9.0.
It has not run on a GPU yet: the sizes of blocks, grids and `DENSE_ABOVE` are estimates, and CUDA graphs and the absence
of waiting are tested only on machines with a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from saegrid.errors import ConfigError
from saegrid.kernels.cuda import stages
from saegrid.kernels.cuda.stages import Buffers, Lists
from saegrid.kernels.reference import BETAS, above_theta, folded_gate
from saegrid.kernels.state import Codes, Params, Rule, StepSettings, TrainState


def encode(params: Params, x: Tensor, rule: Rule, matmul: str = "fp32") -> Codes:
    """Codes of the rows x (N, d_in). See `reference.encode`. Waits for the device, which alone knows their number."""
    if rule.kind == "gated":
        params, rule = folded_gate(params), Rule("jumprelu")
    if rule.kind == "jumprelu":
        return above_theta(encode, params, x, matmul)
    if rule.kind == "relu":
        rule = Rule("threshold")
    buffers, d_sae = Buffers(x.device), len(params.b_enc)
    centred = (x - params.b_pre).contiguous()
    pre = stages.pre_acts(params, centred, matmul, buffers)
    cuts = stages.cut(pre, params, rule, len(x) * d_sae, buffers)
    lists, _ = stages.list_pairs(pre, params, cuts, cuts.facts[0].item(), False, buffers)
    offsets, latents, values = lists.offsets.long(), lists.latents, lists.values
    if matmul == "bf16":
        stages.recompute(params, centred, lists, rule)
        kept = values > 0
        before = torch.cat([offsets[:1], kept.cumsum(0)])  # kept pairs before each one
        offsets, latents, values = before[offsets], latents[kept], values[kept]
    return Codes(offsets, latents, values)


def decode(params: Params, codes: Codes) -> Tensor:
    """Reconstruction x_hat (N, d_in) of sparse codes. See `reference.decode`."""
    n_rows, d_in = len(codes.offsets) - 1, params.W_dec.shape[1]
    x_hat = torch.empty(n_rows, d_in, device=params.W_dec.device)
    lists = Lists(codes.offsets, codes.latents, codes.latents, codes.values, None)
    stages.decode(params, lists, None, None, x_hat, None)
    return x_hat


def gradients(params: Params, x: Tensor, codes: Codes) -> tuple[Tensor, Params]:
    """Loss and its dense gradient through the active pairs. See `reference.gradients`; there is no `push` here."""
    buffers, (n_rows, d_sae) = Buffers(x.device), (len(x), len(params.b_enc))
    x, capacity = x.contiguous(), len(codes.values)
    facts = torch.tensor([capacity, 0, 0], dtype=torch.int32, device=x.device)
    rows = torch.repeat_interleave(torch.arange(n_rows, device=x.device), codes.offsets.diff())
    lists = Lists(codes.offsets, rows.int(), codes.latents, codes.values, facts)
    places = torch.zeros(n_rows, d_sae, dtype=torch.int32, device=x.device)
    places[rows, codes.latents.long()] = torch.arange(1, capacity + 1, dtype=torch.int32, device=x.device)
    segments = triton.cdiv(n_rows, stages.SEGMENT)
    counts = torch.zeros(1 + d_sae * segments, dtype=torch.int32, device=x.device)
    counts[1:] = torch.bincount(codes.latents.long() * segments + rows // stages.SEGMENT, minlength=d_sae * segments)
    loss, d_hat = stages.error(params, x, lists, False, buffers)
    by_latent = stages.by_latent(places, counts, lists, segments, buffers)
    grads, _ = stages.gradients(params, x - params.b_pre, d_hat, lists, by_latent, False, False, buffers)
    return loss, Params(*(g.clone() for g in grads))


def train_step(state: TrainState, x: Tensor, rule: Rule, settings: StepSettings) -> tuple[Tensor, Tensor]:
    """One training step, in place, without waiting for the device. See `reference.train_step`.

    Buffers and CUDA graphs are kept in `state.workspace`.

    Returns:
        The batch's mean squared error before the step, float64, and the number of active pairs, int64: tensors without
        dimensions on the device of x.

    Raises:
        ConfigError: AuxK, sinks apart, a tie, Matryoshka, trained thresholds or L1, which this kernel lacks.
    """
    other = rule.kind not in ("topk", "batchtopk", "threshold")
    if other or settings.aux_coef or settings.sink is not None or settings.prefixes or settings.tie:
        missing = "no AuxK, no sinks apart, no tie, no Matryoshka, no trained thresholds and no L1"
        raise ConfigError(f"kernel = 'cuda': has {missing} yet; take 'cpu'")
    if "cuda" not in state.workspace:
        state.workspace["cuda"] = Buffers(x.device)
    buffers: Buffers = state.workspace["cuda"]
    buffers.take("x", x.shape).copy_(x)
    state.step += 1
    hyper = buffers.take("hyper", (3,))  # set by kernels that take the numbers as arguments: no copy from the host
    hyper[:1].fill_(settings.lr / (1 - BETAS[0] ** state.step))
    hyper[1:2].fill_(1 / (1 - BETAS[1] ** state.step))
    if x.is_cuda:
        _replay(state, len(x), rule, settings._replace(lr=0.0), buffers)
    else:
        _step(state, len(x), rule, settings, buffers)
    return buffers["loss"][0].clone(), buffers["facts"][2].long()


# --- CUDA graphs ---


def _replay(state: TrainState, n_rows: int, rule: Rule, settings: StepSettings, buffers: Buffers) -> None:
    """The step as a graph: the first of its kind runs directly to compile and allocate; the second is captured."""
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
    capacity = min(at_most, max(1, int(stages.DENSE_ABOVE * n_rows * d_sae)))
    may_be_dense = capacity < at_most
    pre = stages.pre_acts(params, centred, settings.matmul, buffers)
    cuts = stages.cut(pre, params, rule, capacity, buffers)
    lists, (places, counts, segments) = stages.list_pairs(pre, params, cuts, capacity, True, buffers)
    if settings.matmul == "bf16":
        stages.recompute(params, centred, lists, rule)
    if may_be_dense:
        z = stages.dense_codes(params, centred, places, lists, rule, buffers)
        stages.multiply_if_dense(z, params.W_dec, buffers.take("product", x.shape), lists)
    _, d_hat = stages.error(params, x, lists, may_be_dense, buffers)
    if may_be_dense:
        stages.dense_gradients(params, z, d_hat, centred, lists, buffers)
    by_latent = stages.by_latent(places, counts, lists, segments, buffers)
    stages.update(state, centred, d_hat, lists, by_latent, may_be_dense, settings, buffers)
