"""What the training rows tell a recipe before training: their centre, their scale, the direction of their sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saegrid.config import RunConfig
from saegrid.metrics import SINK_RATIO, median_norm
from saegrid.store import Store


class Estimates(NamedTuple):
    """In the unit of the scaled rows x / scale."""

    mean: Tensor  # (d_in,): where b_pre starts
    scale: float = 1.0
    sink: Tensor | None = None  # (d_in,) of norm 1: from the ordinary rows' mean to the sinks'; None: nothing apart


def estimate(config: RunConfig, store: Store) -> Estimates:
    """What the run's choices need. Sinks are the rows of more than `SINK_RATIO` times the median norm.

    The same store and config give the same numbers, so that a resumed run goes on with its own.
    """
    if config.b_pre_init != "centre" and config.act_scale == "none" and config.sinks == "keep":
        return Estimates(store.mean)
    limit = SINK_RATIO * median_norm(store.batches("train", config.batch_size))
    ordinary, sinks = (torch.zeros(store.d_in, dtype=torch.float64) for _ in range(2))
    n_sinks, square_sum = 0, 0.0
    for x in store.batches("train", config.batch_size):
        is_sink = x.norm(dim=1) > limit
        exact = x.double()
        ordinary += exact[~is_sink].sum(0)
        sinks += exact[is_sink].sum(0)
        square_sum += exact[~is_sink].square().sum().item()
        n_sinks += int(is_sink.sum())
    n_ordinary = store.n_train - n_sinks
    centre = ordinary / n_ordinary
    scale, sink = 1.0, None
    if config.act_scale == "unit":
        scale = (square_sum / (n_ordinary * store.d_in)) ** 0.5 or 1.0
    if config.sinks == "apart" and n_sinks:
        sink = sinks / n_sinks - centre
        sink = (sink / sink.norm()).float()
    mean = centre if config.b_pre_init == "centre" else store.mean.double()
    return Estimates((mean / scale).float(), scale, sink)
