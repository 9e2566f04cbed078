"""What the training rows tell a recipe before training: their centre, their scale, the direction of their sinks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saegrid.config.run_config import RunConfig
from saegrid.core.metrics import sink_norm
from saegrid.data.store import Store


class Estimates(NamedTuple):
    """In the unit of the scaled rows x / scale."""

    mean: Tensor  # (d_in,): where b_pre starts
    scale: float = 1.0
    sink: Tensor | None = None  # (d_in,) of norm 1: from the ordinary rows' mean to the sinks'; None: nothing apart
    limit: float = math.inf  # norm of a row as it is above which it is a sink

    def to_train_on(self, x: Tensor) -> Tensor:
        """The rows x (N, d_in), as they are, but for sinks that are apart.

        A sink that is not along `sink`, so that what is left of it is as large as a sink, has to be learnt.
        """
        if self.sink is None:
            return x
        left = x - self.scale * self.mean
        left = torch.addr(left, left @ self.sink, self.sink, alpha=-1)
        return x[(x.norm(dim=1) <= self.limit) | (left.norm(dim=1) > self.limit)]


def estimate(config: RunConfig, store: Store) -> Estimates:
    """What the run's choices need.

    The same store and config give the same numbers, so that a resumed run goes on with its own.
    """
    if config.b_pre_init != "centre" and config.act_scale == "none" and config.sinks == "keep":
        return Estimates(store.mean)
    limit = sink_norm(store.batches("train", config.batch_size))
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
    return Estimates((mean / scale).float(), scale, sink, limit)
