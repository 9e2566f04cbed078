"""Read files from other sources: nothing in them is executed, each fault is reported in one line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from saegrid.errors import DamagedError, SaeFileError, explain
from saegrid.storage import checksums

MAX_JSON_BYTES = 1 << 22
"""No SAE's configuration is larger; a larger file is not parsed."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Model = TypeVar("Model", bound=BaseModel)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `SaeFileError`."""
    try:
        return checksums.read_json(path, MAX_JSON_BYTES)
    except DamagedError as error:
        raise SaeFileError(str(error)) from None


def as_model(model: type[Model], content: dict[str, Any], where: Path) -> Model:
    """A configuration validated by its pydantic model. Raises `SaeFileError`, which names the field at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        missing = f"{'.'.join(map(str, first['loc']))} is missing"
        raise SaeFileError(f"{where}: {missing if first['type'] == 'missing' else explain(error)[:300]}") from None


def read_pt(path: Path, mmap: bool = False) -> Any:
    """Content of a `.pt` file: only tensors and plain containers (`weights_only=True`).

    Args:
        mmap: keep the tensors on disk until they are used, for files larger than memory.

    Raises:
        SaeFileError: the file is missing, of another kind, or a pickle that would import or call anything else,
            which is named and not executed.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise SaeFileError(f"{path}: {error.strerror}") from None
    with file, warnings.catch_warnings(action="ignore"):
        try:
            return torch.load(str(path) if mmap else file, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # a damaged or hostile file can make the unpickler raise nearly anything
            raise SaeFileError(f"{path}: not a state dict of tensors: {_pickle_fault(error)}") from None


def _pickle_fault(error: Exception) -> str:
    """torch's reason without its advice to switch the check off."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it would import {wanted[1]}; only tensors and plain containers are read"
    reason = text.rsplit("WeightsUnpickler error:", maxsplit=1)[-1].strip().split("\n")[0]
    return reason.split(". ")[0][:200] or type(error).__name__


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; the library checks the header against the file size. Raises `SaeFileError`."""
    try:
        return load_file(path)
    except OSError as error:
        raise SaeFileError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # SafetensorError, or torch's error for a dtype that it lacks
        raise SaeFileError(f"{path}: not a safetensors file: {str(error)[:200]}") from None


def check_tensors(tensors: Any, shapes: dict[str, tuple[str, ...]], where: Path) -> dict[str, int]:
    """Check tensors against names and shapes, such as `{"W_enc": ("d_in", "d_sae"), "b_dec": ("d_in",)}`.

    Exactly these names; dense floating-point tensors whose storage holds all their bytes (a few bytes can pose as
    terabytes); finite in float32; one size per dimension, taken from the first tensor that has it.

    Returns:
        The size of each dimension.

    Raises:
        SaeFileError: names the file and the first tensor at fault.
    """
    if not isinstance(tensors, dict):
        raise SaeFileError(f"{where}: holds a {type(tensors).__name__}, not named tensors")
    if set(tensors) != set(shapes):
        found = ", ".join(sorted(ascii(name)[:40] for name in list(tensors)[:12])) or "nothing"
        raise SaeFileError(f"{where}: needs the tensors {', '.join(shapes)}; found {found}")
    sizes: dict[str, int] = {}
    for name, dimensions in shapes.items():
        tensor = tensors[name]
        _check_kind(tensor, name, where)
        if tensor.ndim == len(dimensions):
            for dimension, size in zip(dimensions, tensor.shape, strict=True):
                sizes.setdefault(dimension, size)
        wanted = [sizes.get(dimension, dimension) for dimension in dimensions]
        if list(tensor.shape) != wanted or 0 in tensor.shape:
            raise SaeFileError(
                f"{where}: {name} has shape {list(tensor.shape)}, not [{', '.join(map(str, wanted))}]".replace("'", "")
            )
        if not tensor.float().isfinite().all():
            raise SaeFileError(f"{where}: {name} holds values that are not finite")
    return sizes


def check_sizes(stated: BaseModel, sizes: dict[str, int], where: Path) -> None:
    """Check a configuration's `d_in` and `d_sae`, if stated, against the weights. Raises `SaeFileError`."""
    for name, size in sizes.items():
        if getattr(stated, name) not in (None, size):
            raise SaeFileError(f"{where}: {name} = {getattr(stated, name)}, but the weights have {size}")


def _check_kind(tensor: Any, name: str, where: Path) -> None:
    if not isinstance(tensor, Tensor):
        raise SaeFileError(f"{where}: {name} is a {type(tensor).__name__}, not a tensor")
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype not in FLOATS:
        kind = tensor.dtype if dense else f"{tensor.layout} on {tensor.device}"
        raise SaeFileError(f"{where}: {name} is of kind {kind}, not dense floating-point numbers")
    if tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise SaeFileError(f"{where}: {name} states {tensor.nbytes} bytes and holds fewer")


def number(value: Any, name: str, where: Path) -> float | int:
    """The number in a tensor of one element. Raises `SaeFileError`."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    kind = plain and not value.is_complex() and value.dtype != torch.bool
    if not kind or value.numel() != 1 or not value.isfinite().all():
        raise SaeFileError(f"{where}: {name} is not one finite number")
    found: float | int = value.item()
    return found
