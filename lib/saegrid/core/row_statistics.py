"""Statistics of the training rows that training starts from: centre, scale and sink direction.

`metrics.is_sink` says which rows are attention sinks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saegrid.config.run_config import RunConfig
from saegrid.core.metrics import is_sink, sink_norm
from saegrid.data.store import Store


class Estimates(NamedTuple):
    """Statistics of the training rows. `mean` is in the unit of the scaled rows x / scale."""

    mean: Tensor  # (d_in,): initial b_pre
    scale: float = 1.0
    sink: Tensor | None = None  # (d_in,) of norm 1: from the ordinary rows' mean to the sinks'; None: not set apart
    limit: float = math.inf  # unscaled norm above which a row is a sink

    def to_train_on(self, x: Tensor) -> Tensor:
        """Which of the unscaled rows x (N, d_in) to train on if sinks are set apart: (N,) bool.

        Sinks that keep a sink-sized residual after removing `sink` stay in the training set.
        """
        assert self.sink is not None
        left = x - self.scale * self.mean
        left = torch.addr(left, left @ self.sink, self.sink, alpha=-1)
        return ~is_sink(x, self.limit) | is_sink(left, self.limit)


def estimate(config: RunConfig, store: Store) -> Estimates:
    """Estimate the statistics that the run's settings need.

    The same store and config give the same numbers, so a resumed run continues with the same ones.
    """
    if config.b_pre_init != "centre" and config.act_scale == "none" and config.sinks == "keep":
        return Estimates(store.mean)
    limit = sink_norm(store.batches("train", config.batch_size))
    ordinary, sinks = (torch.zeros(store.d_in, dtype=torch.float64) for _ in range(2))
    n_sinks, square_sum = 0, 0.0
    for x in store.batches("train", config.batch_size):
        sink_rows = is_sink(x, limit)
        exact = x.double()
        ordinary += exact[~sink_rows].sum(0)
        sinks += exact[sink_rows].sum(0)
        square_sum += exact[~sink_rows].square().sum().item()
        n_sinks += int(sink_rows.sum())
    n_ordinary = store.n_train - n_sinks
    centre = ordinary / n_ordinary
    scale, sink = 1.0, None
    if config.act_scale == "unit":
        scale = (square_sum / (n_ordinary * store.d_in)) ** 0.5 or 1.0
    if config.sinks == "apart" and n_sinks:
        sink = sinks / n_sinks - centre
        sink = (sink / sink.norm()).float()
    mean = centre if config.b_pre_init == "centre" else store.mean.double()
    return Estimates((mean / scale).float(), scale, sink, limit)
