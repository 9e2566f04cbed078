"""The arithmetic of encoding, decoding and training: `reference` defines it, the others compute it faster."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from saegrid.errors import ConfigError
from saegrid.storage.hub_access import can_write, own_cache_dir

if TYPE_CHECKING:
    from torch import Tensor

    from saegrid.kernels.state import Codes, Params, Rule, StepSettings, TrainState

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """Interface of each kernel's module. `reference` is the definition; a test checks the others against it."""

    def encode(self, params: Params, x: Tensor, rule: Rule) -> Codes:
        """Sparse codes of the rows x (N, d_in)."""

    def decode(self, params: Params, codes: Codes) -> Tensor:
        """Reconstructions x_hat (N, d_in)."""

    def train_step(
        self, state: TrainState, x: Tensor, rule: Rule, settings: StepSettings
    ) -> tuple[float | Tensor, int | Tensor]:
        """One step on the rows x (N, d_in), updating `state`. Returns (loss, active pairs), possibly on a GPU."""


class Choice(NamedTuple):
    """How one run computes; recorded in its config and reused on resume."""

    kernel: str  # "reference", "cpu" or "dense"
    matmul: str  # "fp32" or "bf16"
    threads: int  # at least 1
    device: str  # "cpu" or "cuda" (which torch also calls AMD's GPUs)


def load(name: str) -> Kernel:
    """The module of a kernel: "reference", "cpu" or "dense". Raises `ConfigError` if it can't run here."""
    if name not in ("reference", "cpu", "dense"):
        raise ConfigError(f"kernel = {name!r}: must be 'reference', 'cpu' or 'dense'")
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        raise ConfigError("kernel = 'cpu': needs the package numba; install it or use 'reference'")
    if name == "cpu":
        _settle_cache()
    return importlib.import_module(f"saegrid.kernels.{name}")


def _settle_cache() -> None:
    """Keep compiled code in the cache if the compiler's own folder is not writable (read-only checkout, no home)."""
    place = os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "cpu" / "__pycache__"
    if not can_write(Path(place)):
        import numba

        numba.config.CACHE_DIR = str(own_cache_dir() / "numba")


def choose_device(device: str = "auto") -> str:
    """The device "cpu" or "cuda"; "auto" takes a GPU if torch finds one. Raises `ConfigError` if "cuda" has no GPU."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = 'cuda': torch {torch.__version__} finds no GPU here; use 'cpu' or 'auto'")
    return device


def choose(kernel: str, matmul: str, threads: int, device: str = "auto") -> Choice:
    """Resolve "auto" (kernel, matmul, device) and 0 (threads) for this machine, and log the choice and its reasons.

    Raises:
        ConfigError: `kernel` or `device` is not available here, or the kernel `cpu` is asked for on a GPU.
    """
    reasons = []
    if kernel == "cpu" and device == "cuda":
        raise ConfigError("kernel = 'cpu': runs on device = 'cpu' only; use 'dense' or 'auto' on a GPU")
    if device == "auto" and kernel in ("cpu", "reference"):
        device = "cpu"
    device = choose_device(device)
    if kernel == "auto":
        kernel, reason = _fastest_kernel(device)
        reasons.append(reason)
    load(kernel)
    if matmul == "auto":
        matmul, reason = _fastest_matmul(kernel, device)
        reasons.append(reason)
    if threads == 0:
        threads, reason = _cores()
        reasons.append(reason)
    choice = Choice(kernel, matmul, threads, device)
    logger.info("kernel %s, matmul %s, threads %d, device %s (%s)", *choice, "; ".join(reasons) or "as asked")
    return choice


def set_threads(threads: int) -> None:
    """Set the threads of torch and of the `cpu` kernel's own loops."""
    import torch

    torch.set_num_threads(threads)


def _fastest_kernel(device: str) -> tuple[str, str]:
    """The fastest kernel on the device, and the reason."""
    if device == "cuda":
        import torch

        return "dense", f"kernel: {torch.cuda.get_device_name()} is here"
    if importlib.util.find_spec("numba"):
        return "cpu", "kernel: no GPU, numba is here"
    return "reference", "kernel: no GPU, numba is not installed"


def _fastest_matmul(kernel: str, device: str) -> tuple[str, str]:
    """bf16 if the device multiplies it natively: 2.1 times the fp32 rate with AVX512_BF16 (measured)."""
    import torch

    if kernel == "reference":
        return "fp32", "matmul: the reference's precision"
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "matmul: the GPU has bf16 instructions"
        return "fp32", "matmul: the GPU has no bf16 instructions"
    if has_bf16():
        return "bf16", "matmul: the processor has bf16 instructions"
    return "fp32", "matmul: the processor has no bf16 instructions"


@functools.cache
def has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively."""
    import torch

    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(probe and probe() for probe in probes)


def _cores() -> tuple[int, str]:
    """Threads for one run: OMP_NUM_THREADS, which Snakemake sets to a job's share, else all cores available."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("OMP_NUM_THREADS", "")
    if share.isdecimal() and 0 < int(share) < cores:
        return int(share), f"threads: OMP_NUM_THREADS is {share}"
    return cores, f"threads: this process may use {cores} cores"
