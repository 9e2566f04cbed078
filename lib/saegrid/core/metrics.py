"""Every metric and what counts as an attention sink, each defined once (see the method page).

Numerators and denominators are summed over all rows in float64 and divided once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saegrid.kernels.state import Codes

SINK_RATIO = 10.0
"""Rows whose norm is above this many times the median norm are attention sinks (left out of `*_no_sink`)."""


@dataclass
class Moments:
    """Sums over rows for computing variances: per dimension, in float64."""

    rows: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (d_in,)
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (d_in,)

    def add(self, x: Tensor) -> None:
        """Add the rows x (N, d_in)."""
        x = x.double()
        self.rows += len(x)
        self.total = self.total + x.sum(0)
        self.squares = self.squares + x.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean per dimension, (d_in,)."""
        return self.total / self.rows

    @property
    def centred(self) -> float:
        """Sum over rows of ‖x - mean‖²."""
        return (self.squares - self.total.square() / self.rows).sum().item()

    @property
    def pooled_variance(self) -> float:
        """One variance over all elements (the published NMSE's denominator)."""
        elements = self.rows * len(self.total)
        return (self.squares.sum() / elements - (self.total.sum() / elements).square()).item()


def sink_norm(batches: Iterable[Tensor]) -> float:
    """Norm above which a row is an attention sink: `SINK_RATIO` times the median norm of all rows of `batches`."""
    return SINK_RATIO * torch.cat([x.norm(dim=1) for x in batches]).median().item()


def is_sink(x: Tensor, limit: float) -> Tensor:
    """Which rows of x (N, d_in) are attention sinks, (N,) bool; `limit`: the `sink_norm` of all rows."""
    found: Tensor = x.norm(dim=1) > limit
    return found


@dataclass
class Reconstruction:
    """Running sums over rows and their reconstructions; `result` turns them into metrics."""

    d_sae: int
    sink_norm: float = float("inf")  # rows with a larger norm are sinks
    every: Moments = field(default_factory=Moments)
    no_sink: Moments = field(default_factory=Moments)
    sq_error: float = 0.0
    sq_error_no_sink: float = 0.0
    active: int = 0
    active_no_sink: int = 0
    fired: Tensor = field(init=False)  # (d_sae,) int64: number of rows on which each latent fired
    fired_no_sink: Tensor = field(init=False)  # (d_sae,) int64
    act_sum: Tensor = field(init=False)  # (d_sae,) float64
    act_max: Tensor = field(init=False)  # (d_sae,) float32

    def __post_init__(self) -> None:
        self.fired, self.fired_no_sink = torch.zeros(2, self.d_sae, dtype=torch.int64)
        self.act_sum = torch.zeros(self.d_sae, dtype=torch.float64)
        self.act_max = torch.zeros(self.d_sae)

    def add(self, x: Tensor, x_hat: Tensor, codes: Codes) -> Tensor:
        """Add rows x and their reconstructions x_hat, both (N, d_in), with their codes, all on one device.

        Returns:
            The squared error of each row, (N,) float64.
        """
        errors = (x.double() - x_hat.double()).square().sum(1)
        keep = ~is_sink(x, self.sink_norm)
        self.every.add(x)
        if keep.any():
            self.no_sink.add(x[keep])
        self.sq_error += errors.sum().item()
        self.sq_error_no_sink += errors[keep].sum().item()
        offsets, latents, values = (part.cpu() for part in codes)  # sums on a GPU would have no fixed order
        latents, ordinary = latents.long(), keep.cpu().repeat_interleave(offsets.diff())
        self.active += len(values)
        self.active_no_sink += int(ordinary.sum())
        self.fired += torch.bincount(latents, minlength=self.d_sae)
        self.fired_no_sink += torch.bincount(latents[ordinary], minlength=self.d_sae)
        self.act_sum.index_add_(0, latents, values.double())
        self.act_max.scatter_reduce_(0, latents, values, "amax")
        return errors

    def result(self) -> dict[str, float]:
        """val_mse, nmse, sink_pct; fvu, l0 and dead_pct with and without sinks; NaN where a denominator is 0."""
        rows, elements = self.every.rows, self.every.rows * len(self.every.total)
        mse = self.sq_error / elements
        return {
            "val_mse": mse,
            "nmse": _ratio(mse, self.every.pooled_variance),
            "fvu": _ratio(self.sq_error, self.every.centred),
            "fvu_no_sink": _ratio(self.sq_error_no_sink, self.no_sink.centred if self.no_sink.rows else 0.0),
            "sink_pct": 100 * (rows - self.no_sink.rows) / rows,
            "l0": self.active / rows,
            "l0_no_sink": _ratio(self.active_no_sink, self.no_sink.rows),
            "dead_pct": 100 * (self.fired == 0).double().mean().item(),
            "dead_pct_no_sink": 100 * (self.fired_no_sink == 0).double().mean().item(),
        }


def splice_metrics(clean: float, spliced: float, zero: float, mean: float, kl: float) -> dict[str, float]:
    """Metrics of a splice from four cross-entropies and a KL divergence, in nats per token over the same tokens.

    `frac_rec_pct` is the published ratio 100 * clean / spliced; `loss_recovered_*` are the standard measures.
    """
    return {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_mean": mean,
        "kl": kl,
        "delta_loss": spliced - clean,
        "frac_rec_pct": 100 * _ratio(clean, spliced),
        "loss_recovered_zero": _ratio(zero - spliced, zero - clean),
        "loss_recovered_mean": _ratio(mean - spliced, mean - clean),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
