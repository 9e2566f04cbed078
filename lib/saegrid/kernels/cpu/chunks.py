"""Support for the `cpu` kernel's loops: chunks of similar work, plain threads, and reusable buffers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNKS = 16  # pieces of a parallel loop; fixed, so that sums across pieces don't depend on the number of threads


@functools.cache
def even(total: int) -> np.ndarray:
    """Edges (CHUNKS + 1,) of chunks of equal length."""
    return np.linspace(0, total, CHUNKS + 1).astype(np.int64)


def by_weight(cumulative: np.ndarray) -> np.ndarray:
    """Edges (CHUNKS + 1,) of chunks of about equal weight; item i weighs cumulative[i + 1] - cumulative[i]."""
    edges = np.searchsorted(cumulative, np.linspace(0, cumulative[-1], CHUNKS + 1))
    edges[0], edges[-1] = 0, len(cumulative) - 1
    return edges


def run(loop: Callable, edges: np.ndarray, *arguments: Any) -> None:
    """Run a compiled loop over all chunks, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    if threads == 1:
        loop(0, CHUNKS, edges, *arguments)
        return
    size = max(1, CHUNKS // (2 * threads))
    firsts = iter(range(0, CHUNKS, size))

    def work() -> None:
        for first in firsts:  # a free thread takes the next chunks
            loop(first, min(first + size, CHUNKS), edges, *arguments)

    helpers = [_pool(threads, os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()


@functools.lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Worker threads, which sleep between loops. A forked process starts its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix=f"saegrid-{process}")


def arrays(tensors: Iterable[Tensor]) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() for t in tensors)


def buffer(workspace: dict, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor, kept in `workspace`: fresh pages cost milliseconds. A shorter batch uses its front."""
    kept = workspace.get(name)
    if kept is None or len(kept) < shape[0] or kept.shape[1:] != shape[1:] or kept.dtype != dtype:
        kept = workspace[name] = torch.empty(shape, dtype=dtype)
    return kept[: shape[0]]
