"""What a result was made by: the version of the code, and the machine."""

from __future__ import annotations

import hashlib
import platform
from importlib.resources import files as package_files
from pathlib import Path

import saegrid

CODE = (
    *("activations.py", "calibration.py", "embedded.py", "estimates.py", "evaluation.py", "fetch.py", "files.py"),
    *("lm.py", "metrics.py", "model_config.py", "prompts.py", "published.py"),
    *("recipes.py", "run.py", "sae.py", "splice.py", "store.py", "train.py", "transfer.py", "kernels"),
)
"""Sources whose change can change a run's result: their hash is the run's code version."""


def code_version() -> str:
    """Version of the package, with a hash of the sources that can change a result."""
    digest = hashlib.sha256()
    root = package_files(saegrid)
    for name in CODE:
        part = root / name
        for source in sorted(part.glob("*.py")) if part.is_dir() else [part]:
            digest.update(source.read_bytes())
    return f"{saegrid.__version__}+{digest.hexdigest()[:12]}"


def processor() -> str:
    """Name of the processor, for the record of times."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
