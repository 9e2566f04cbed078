"""Grid searches of sparse autoencoders on one layer of a language model, and the report on them."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`saegrid.load_sae`, imported on first use: importing the package alone does not import torch."""
    if name == "load_sae":
        from saegrid.formats import load_sae

        return load_sae
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
