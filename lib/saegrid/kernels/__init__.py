"""The arithmetic of encoding, decoding and training: `reference` defines it, the others compute it faster."""

from __future__ import annotations

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

CAPABILITY = (8, 0)
"""Minimum compute capability of the `cuda` kernel: that of Triton; it includes bf16 and TF32."""


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

    kernel: str  # "reference", "cpu" or "cuda"
    matmul: str  # "fp32" or "bf16"
    threads: int  # at least 1


def load(name: str) -> Kernel:
    """The module of a kernel: "reference", "cpu" or "cuda". Raises `ConfigError` if it can't run here."""
    if name not in ("reference", "cpu", "cuda"):
        raise ConfigError(f"kernel = {name!r}: must be 'reference', 'cpu' or 'cuda'")
    if name == "cpu" and importlib.util.find_spec("numba") is None:
        raise ConfigError("kernel = 'cpu': needs the package numba; install it or use 'reference'")
    if name == "cuda" and (missing := _missing_for_cuda()):
        raise ConfigError(f"kernel = 'cuda': {missing}; use 'cpu', 'reference' or 'auto'")
    _settle_caches(name)
    return importlib.import_module(f"saegrid.kernels.{name}")


def _settle_caches(name: str) -> None:
    """Keep compiled code in the cache if the compiler's own folder is not writable (read-only checkout, no home)."""
    if name == "cpu":
        place = os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "cpu" / "__pycache__"
        if not can_write(Path(place)):
            import numba

            numba.config.CACHE_DIR = str(own_cache_dir() / "numba")  # type: ignore[attr-defined]
    elif name == "cuda":
        place = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton")
        if not can_write(Path(place)):
            os.environ["TRITON_CACHE_DIR"] = str(own_cache_dir() / "triton")


def device(name: str) -> str:
    """Device of a kernel's tensors: "cuda" (the current GPU) or "cpu"."""
    import torch

    return "cuda" if name == "cuda" and torch.cuda.is_available() else "cpu"


def choose(kernel: str, matmul: str, threads: int, not_on_cuda: str = "") -> Choice:
    """Resolve "auto" (kernel, matmul) and 0 (threads) for this machine, and log the choice and its reasons.

    Args:
        not_on_cuda: what the run needs and the `cuda` kernel lacks, so that "auto" skips that kernel.

    Raises:
        ConfigError: `kernel` can't run here.
    """
    reasons = []
    if kernel == "auto":
        kernel, reason = _fastest_kernel(not_on_cuda and f"it has no {not_on_cuda}")
        reasons.append(reason)
    load(kernel)
    if matmul == "auto":
        matmul, reason = _fastest_matmul(kernel)
        reasons.append(reason)
    if threads == 0:
        threads, reason = _cores()
        reasons.append(reason)
    choice = Choice(kernel, matmul, threads)
    logger.info("kernel %s, matmul %s, threads %d (%s)", *choice, "; ".join(reasons) or "as asked")
    return choice


def set_threads(threads: int) -> None:
    """Set the threads of torch and of the `cpu` kernel's own loops."""
    import torch

    torch.set_num_threads(threads)


def _missing_for_cuda() -> str:
    """Why the `cuda` kernel can't run here; empty if it can.

    With TRITON_INTERPRET=1 (for debugging; very slow) it needs no GPU.
    """
    import torch

    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which torch's CUDA builds bring along"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU here"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= CAPABILITY else f"needs a GPU of compute capability 8.0, this one has {capability}"


def _fastest_kernel(missing: str = "") -> tuple[str, str]:
    """The fastest kernel that runs here, and the reason. `missing`: why it can't be `cuda`."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    missing = missing or ("Triton only interprets" if interpreted else _missing_for_cuda())
    if not missing:
        import torch

        return "cuda", f"kernel: {torch.cuda.get_device_name()} is here"
    if importlib.util.find_spec("numba"):
        return "cpu", f"kernel: not cuda ({missing}), numba is here"
    return "reference", f"kernel: not cuda ({missing}), numba is not installed"


def _fastest_matmul(kernel: str) -> tuple[str, str]:
    """bf16 if the processor multiplies it natively: 2.1 times the fp32 rate with AVX512_BF16 (measured)."""
    import torch

    if kernel == "reference":
        return "fp32", "matmul: the reference's precision"
    if kernel == "cuda":
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "matmul: the GPU has bf16 instructions"
        return "fp32", "matmul: no GPU with bf16 instructions"
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    if any(probe and probe() for probe in probes):
        return "bf16", "matmul: the processor has bf16 instructions"
    return "fp32", "matmul: the processor has no bf16 instructions"


def _cores() -> tuple[int, str]:
    """Threads for one run: OMP_NUM_THREADS, which Snakemake sets to a job's share, else all cores available."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = os.environ.get("OMP_NUM_THREADS", "")
    if share.isdecimal() and 0 < int(share) < cores:
        return int(share), f"threads: OMP_NUM_THREADS is {share}"
    return cores, f"threads: this process may use {cores} cores"
