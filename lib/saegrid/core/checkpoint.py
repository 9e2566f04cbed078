"""A training checkpoint: one safetensors file that contains its own SHA-256 and the id of its run.

The tensors are `{weights,m,v,best}.{W_enc,b_enc,W_dec,b_dec,b_pre,theta,gain}`; its one metadata key holds the rest as
JSON.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saegrid.errors import DamagedError
from saegrid.storage.atomic import replacing

KEY = "checkpoint"
MAX_HEADER_BYTES = 1 << 24


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and plain facts, without a second copy in memory.

    Raises:
        DiskError: the file can't be written; the previous checkpoint is unchanged.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = json.dumps({"facts": facts, "sha256": _digest(tensors, facts)})
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary, {KEY: sealed})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote: (tensors, facts).

    Raises:
        DamagedError: the file can't be read, or does not match its SHA-256.
    """
    try:
        sealed = json.loads(_header(path)["__metadata__"][KEY])
        facts, stated = sealed["facts"], sealed["sha256"]
        tensors = load_file(path)
        intact = isinstance(facts, dict) and stated == _digest(tensors, facts)
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise DamagedError(f"{path}: damaged checkpoint ({error})") from None
    if not intact:
        raise DamagedError(f"{path}: damaged checkpoint (not the SHA-256 that it was written with)")
    return tensors, facts


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        header: dict[str, Any] = json.loads(file.read(size))
        return header


def _digest(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
