"""Codes of the `cpu` kernel: one product, the exact cut among few candidates, sparse lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saegrid.kernels import has_bf16
from saegrid.kernels.cpu import pairs, select
from saegrid.kernels.cpu.chunks import arrays, buffer, by_weight, even, run
from saegrid.kernels.state import Codes, Params, Rule

BF16_BELOW = 0.12  # share of active pairs up to which a bf16 product + float32 values beat one fp32 product (measured)
BLOCK_VALUES = 2**22  # pre-activations computed at a time: 16 MB in float32, about the last-level cache
SPARE = 1.5  # the bound from the first of several blocks aims at this many times the wanted pairs
MARGIN = 2**-8  # bfloat16's relative rounding error: the unit of the margins in `exact_codes`
PROBE = 64, 32  # rows, and stride of latents, of the sample that estimates how many pairs a threshold keeps


def sparse_codes(params: Params, centred: Tensor, rule: Rule, matmul: str, workspace: dict) -> Codes:
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


def exact_codes(params: Params, centred: Tensor, rule: Rule) -> Codes:
    """Codes of centred rows (N, d_in) with float32 pre-activations, from a bfloat16 product where that is faster.

    The product lists every pair that may be kept: the bound is lowered by a margin for rounding errors. Then the listed
    values are computed again in float32, and the rule is applied to these.
    """
    if not has_bf16() or rule.kind == "topk" or _share_kept(params, centred, rule) > BF16_BELOW / 2:
        return sparse_codes(params, centred, rule, "fp32", {})
    bound = np.float32(max(rule.threshold, 0.0) if rule.kind == "threshold" else 0.0)
    lowest, offsets, latents, values = _listed(params, centred, rule, bound, True, True, {})
    run(pairs.recompute, by_weight(offsets), *arrays((centred, params.W_enc, params.b_enc)), offsets, latents, values)
    if rule.kind == "batchtopk":
        bound, ties = _batch_cut(values, min(rule.k, len(params.b_enc)) * len(centred))
        if bound <= lowest and lowest > 0:  # the sample misled
            return sparse_codes(params, centred, rule, "fp32", {})
    else:
        ties = 0
    select.cut_batch(offsets, latents, values, bound, ties)
    return Codes(*map(torch.from_numpy, (offsets, latents[: offsets[-1]], values[: offsets[-1]])))


def _share_kept(params: Params, centred: Tensor, rule: Rule) -> float:
    """Share of the pairs that the rule will keep; for a threshold, estimated from some rows and latents."""
    if rule.kind != "threshold":
        return rule.k / len(params.b_enc)
    rows, stride = PROBE
    pre = torch.addmm(params.b_enc[::stride], centred[:rows], params.W_enc[::stride].T)
    return (pre > max(rule.threshold, 0.0)).float().mean().item()


def _select(
    params: Params, centred: Tensor, rule: Rule, bound: np.float32, narrow: bool, workspace: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR lists (offsets, latents, values) of what the rule keeps."""
    _, offsets, latents, values = _listed(params, centred, rule, bound, narrow, False, workspace)
    count = min(rule.k, len(params.b_enc)) * len(centred) if rule.kind == "batchtopk" else 0
    if 0 < count < len(values):
        select.cut_batch(offsets, latents, values, *_batch_cut(values, count))
    return offsets, latents[: offsets[-1]], values[: offsets[-1]]


def _batch_cut(values: np.ndarray, count: int) -> tuple[np.float32, int]:
    """The `count`-th largest value, and how many equal to it are kept; 0 and none if fewer are positive."""
    if count >= select.count_above(values, len(values), np.float32(0)):
        return np.float32(0), 0
    cut = select.kth_largest(values, len(values), count)
    return cut, count - select.count_above(values, len(values), cut)


def _listed(
    params: Params,
    centred: Tensor,
    rule: Rule,
    bound: np.float32,
    narrow: bool,
    exact: bool,
    workspace: dict,
) -> tuple[np.float32, np.ndarray, np.ndarray, np.ndarray]:
    """The bound, and CSR lists (offsets, latents, values) of at least what the rule keeps, made in blocks of rows.

    For top-k they hold the k largest of each row, else the values above the bound; with `exact`, above the bound minus
    a margin. For BatchTopK the bound is estimated from a sample; for other rules it is the given one.
    """
    n_rows, d_sae = len(centred), len(params.b_enc)
    count = min(rule.k, d_sae) * n_rows if rule.kind == "batchtopk" else 0
    k = min(rule.k, d_sae) if rule.kind == "topk" else 0
    size = max(1, BLOCK_VALUES // d_sae)
    bias = params.b_enc.detach().numpy()
    w_enc = params.W_enc
    margin, lowered = (_margin(params, centred), 1 - MARGIN) if exact else (np.zeros(n_rows, np.float32), 1)
    if narrow:
        w_enc = buffer(workspace, "W_enc bf16", w_enc.shape, torch.bfloat16).copy_(w_enc)

    def listed(bound: np.float32 | None) -> tuple[Any, list[Any]]:
        """The bound (None: estimated from a sample of the first block), and each block's lists above it."""
        parts = []
        for n, rows in enumerate(centred.split(size)):
            pre = _pre_acts(rows, w_enc, workspace)
            if bound is None:
                wanted = count if len(rows) == n_rows else int(SPARE * count * len(rows) / n_rows)
                bound = select.batch_bound(pre, bias, min(wanted, pre.size))
            bounds = lowered * bound - margin[n * size : n * size + len(rows)]
            parts.append(_list_block(pre, bias, bounds, k, workspace))
        return bound, parts

    bound, parts = listed(None if count else bound)
    if bound > 0 and sum(len(values) for _, _, values in parts) < count:  # the sample misled
        bound, parts = listed(np.float32(0))
    counts, latents, values = (np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    return bound, np.concatenate([[0], counts.cumsum()]), latents, values


def _margin(params: Params, centred: Tensor) -> np.ndarray:
    """Upper bound (N,) of a bfloat16 product's rounding errors, for pairs whose value with b_enc is 0.

    Errors of the factors add up like a random walk: they are far below the row's largest element times the norm of an
    encoder row. The product is rounded, too: it is -b_enc here, and for other pairs up to their value larger.
    """
    factors = centred.abs().amax(1) * params.W_enc.norm(dim=1).max()
    margin: np.ndarray = (MARGIN * (factors + params.b_enc.abs().max())).detach().numpy()
    return margin


def _pre_acts(rows: Tensor, w_enc: Tensor, workspace: dict) -> np.ndarray:
    """Pre-activations (n, d_sae) of centred rows without b_enc: float32, or the bits of bfloat16 if `w_enc` is."""
    out = buffer(workspace, f"pre {w_enc.dtype}", (len(rows), len(w_enc)), w_enc.dtype)
    torch.mm(rows.to(w_enc.dtype), w_enc.T, out=out)
    return out.numpy() if out.dtype == torch.float32 else out.view(torch.uint16).numpy()


def _list_block(
    pre: np.ndarray, bias: np.ndarray, bounds: np.ndarray, k: int, workspace: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts (n,), latents, values) of pre + bias: entries above each row's bound, or, with k > 0, the k largest."""
    wide = arrays((buffer(workspace, "latents", pre.shape, torch.int32), buffer(workspace, "values", pre.shape)))
    counts, edges = np.empty(len(pre), np.int64), even(len(pre))
    run(select.list_above, edges, pre, bias, bounds, k, *wide, counts)
    offsets = np.concatenate([[0], counts.cumsum()])
    latents, values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    run(select.pack, edges, *wide, offsets, latents, values)
    return counts, latents, values
