"""Codes of the `cpu` kernel: one product, the exact cut among few candidates, sparse lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from saegrid.kernels.cpu import pairs, select
from saegrid.kernels.cpu.chunks import arrays, buffer, by_weight, even, run
from saegrid.kernels.state import Codes, Params, Rule

BF16_BELOW = 0.12  # share of active pairs up to which a bf16 product + float32 values beat one fp32 product (measured)
BLOCK_VALUES = 2**22  # pre-activations computed at a time: 16 MB in float32, about the last-level cache
SPARE = 1.5  # the bound from the first of several blocks aims at this many times the wanted pairs
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
    """CSR lists (offsets, latents, values) of what the rule keeps, from blocks of rows that stay in cache."""
    n_rows, d_sae = len(centred), len(params.b_enc)
    count = min(rule.k, d_sae) * n_rows if rule.kind == "batchtopk" else 0
    k = min(rule.k, d_sae) if rule.kind == "topk" else 0
    size = max(1, BLOCK_VALUES // d_sae)
    bias = params.b_enc.detach().numpy()
    w_enc = params.W_enc
    if narrow:
        w_enc = buffer(workspace, "W_enc bf16", w_enc.shape, torch.bfloat16).copy_(w_enc)

    def listed(bound: np.float32 | None) -> tuple[Any, list[Any]]:
        """The bound (None: estimated from a sample of the first block), and each block's lists above it."""
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
    """Pre-activations (n, d_sae) of centred rows without b_enc: float32, or the bits of bfloat16 if `w_enc` is."""
    out = buffer(workspace, f"pre {w_enc.dtype}", (len(rows), len(w_enc)), w_enc.dtype)
    torch.mm(rows.to(w_enc.dtype), w_enc.T, out=out)
    return out.numpy() if out.dtype == torch.float32 else out.view(torch.uint16).numpy()


def _list_block(
    pre: np.ndarray, bias: np.ndarray, bound: np.float32, k: int, workspace: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(counts (n,), latents, values) of pre + bias: entries above `bound`, or, with k > 0, the k largest per row."""
    wide = arrays((buffer(workspace, "latents", pre.shape, torch.int32), buffer(workspace, "values", pre.shape)))
    counts, edges = np.empty(len(pre), np.int64), even(len(pre))
    run(select.list_above, edges, pre, bias, bound, k, *wide, counts)
    offsets = np.concatenate([[0], counts.cumsum()])
    latents, values = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
    run(select.pack, edges, *wide, offsets, latents, values)
    return counts, latents, values
