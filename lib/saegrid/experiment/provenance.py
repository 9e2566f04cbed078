"""Provenance of a result: the version of the code, and the machine."""

from __future__ import annotations

import hashlib
import platform
from importlib.resources import files as package_files
from pathlib import Path

import saegrid

CODE = ("config", "core", "data", "experiment", "kernels")
"""Folders whose sources can change a run's result: their hash is in the run's code version."""


def code_version() -> str:
    """Version of the package, with a hash of the sources that can change a result."""
    digest = hashlib.sha256()
    root = Path(str(package_files(saegrid)))
    for name in CODE:
        for source in sorted((root / name).rglob("*.py")):
            digest.update(source.read_bytes())
    return f"{saegrid.__version__}+{digest.hexdigest()[:12]}"


def processor() -> str:
    """Name of the processor, for the timing record."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
