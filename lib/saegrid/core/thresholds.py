"""Thresholds from rows: initial thetas, and cuts that make L0 equal K on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from saegrid.core.metrics import is_sink, sink_norm
from saegrid.core.sae import SAE
from saegrid.data.store import Store
from saegrid.kernels import Kernel
from saegrid.kernels.state import Params, Rule

CALIBRATION_ROWS = 65_536
"""Most validation rows that a calibration uses."""
TINY = 1e-6


def calibrated_threshold(sae: SAE, store: Store, batch_size: int, kernel: Kernel) -> float:
    """The scalar cut with `k` pre-activations per row above it, averaged over validation rows (arXiv:2412.06410, §3).

    Midpoint of the last value kept and the first one dropped, so that rounding moves no latent across the cut; 0 if
    fewer are positive.
    """
    spare = 2  # a batch's own cut must lie below the cut over all batches
    while True:
        rule = Rule("batchtopk", k=min(spare * sae.k, sae.d_sae))
        rows = _held_out(store, batch_size, sae.device)
        batches = [(len(x), kernel.encode(sae.params, x, rule).values) for x in rows]
        count = sum(rows for rows, _ in batches) * sae.k
        values = torch.cat([values for _, values in batches])
        if count >= len(values):
            return 0.0
        cut = values.kthvalue(len(values) - count).values.item()  # the largest value dropped
        complete = (len(kept) < rows * spare * sae.k or kept.min().item() <= cut for rows, kept in batches)
        if all(complete) or spare * sae.k >= sae.d_sae:
            return (cut + values.kthvalue(len(values) - count + 1).values.item()) / 2
        spare *= 2


def _held_out(store: Store, batch_size: int, device: str) -> Iterator[Tensor]:
    """Batches of the first `CALIBRATION_ROWS` validation rows."""
    rows = 0
    for x in store.batches("val", batch_size, device=device):
        yield x[: CALIBRATION_ROWS - rows]
        rows += len(x)
        if rows >= CALIBRATION_ROWS:
            return


def calibrated_factor(
    params: Params, k: int, store: Store, batch_size: int, kernel: Kernel, scale: float = 1.0
) -> float:
    """Factor on all thetas that makes `k` latents per row active, averaged over validation rows.

    Midpoint of the ratios pre / theta of the last pair kept and the first one dropped. A latent with theta 0 keeps
    every positive pre-activation; if these alone are k per row or more, the factor is 1.

    Args:
        scale: the weights are for rows x / scale.
    """
    share = 1.0
    while True:
        lower = params._replace(theta=params.theta * share)
        ratios, rows, always = [], 0, 0
        for x in _held_out(store, batch_size, params.theta.device.type):
            codes = kernel.encode(lower, x / scale if scale != 1 else x, Rule("jumprelu", k=k))
            theta = params.theta[codes.latents.long()]
            always += int((theta == 0).sum())
            ratios.append((codes.values / theta)[theta > 0])
            rows += len(x)
        ratio, count = torch.cat(ratios), rows * k - always
        if count <= 0:
            return 1.0
        if count < len(ratio):
            kept = ratio.topk(count + 1, sorted=True).values
            return ((kept[-2] + kept[-1]) / 2).item()
        if share < TINY:  # fewer than `count` pairs are positive
            return share
        share /= 2


def start_of_theta(params: Params, x: Tensor, k: int) -> float:
    """Initial theta: `k` pre-activations per row lie above it, averaged over rows x (N, d_in) without sinks."""
    x = ordinary(x)
    pre = torch.addmm(params.b_enc, x - params.b_pre, params.W_enc.T).flatten()
    return max(pre.topk(min(len(x) * k, len(pre)), sorted=False).values.min().item(), TINY)


def rms_pre_acts(params: Params, x: Tensor) -> float:
    """Root mean square of the pre-activations of rows x (N, d_in) without attention sinks: the unit of "rms"."""
    x = ordinary(x)
    return torch.addmm(params.b_enc, x - params.b_pre, params.W_enc.T).double().square().mean().sqrt().item()


def ordinary(x: Tensor) -> Tensor:
    """The rows of x (N, d_in) that are not attention sinks."""
    return x[~is_sink(x, sink_norm([x]))]
