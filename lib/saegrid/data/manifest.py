"""The manifest of an activation store: its content, validated before use. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saegrid.errors import DamagedError, StoreError, explain
from saegrid.storage.checksums import read_sealed

FORMAT = 3
"""3: `sources` also names the model's other files, the text and the code."""
SHARD_ROWS = 16_384
"""Rows per shard."""
BUFFER_SHARDS = 8
"""Shards whose rows are shuffled together (at 896 float16 values per row: 235 MB)."""
MEND = "delete the folder, or run `python -m saegrid mend GRID`, to collect it again"


class _Entry(BaseModel):
    """One file of a store."""

    model_config = ConfigDict(strict=True, extra="forbid")
    file: str = Field(pattern=r"^(train-\d{5,9}|val-\d{5,9}|mean)\.safetensors$")
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Shard(_Entry):
    rows: int = Field(ge=1)


class _Shards(BaseModel):
    train: list[_Shard] = Field(min_length=1)
    val: list[_Shard] = Field(min_length=1)


class _Model(BaseModel):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Data(BaseModel):
    """Facts about the training prompts; None: not known."""

    model_config = ConfigDict(strict=True)
    context_size: int | None = None
    prepend_bos: bool | None = None


class _Statistics(BaseModel):
    rows: int
    sq_norm_centred: float
    max_norm: float


class _Manifest(BaseModel):
    """The fields of a manifest that are read; it may have more."""

    model_config = ConfigDict(strict=True, extra="ignore")
    d_in: int = Field(ge=1)
    act_dtype: Literal["float16", "float32"]
    shards: _Shards
    mean: _Entry
    data_sha256: str
    model: _Model
    data: _Data = _Data()
    statistics: dict[Literal["train", "val"], _Statistics]
    parameters: dict[str, Any]
    sources: dict[str, str]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store; all its files must exist with the recorded sizes. Raises `StoreError`."""
    path = folder / "manifest.json"
    try:
        manifest = read_sealed(path)
        if manifest.get("format") != FORMAT:
            found = manifest.get("format")
            raise StoreError(f"{path}: a store of format {found!r}, where this version reads {FORMAT}", MEND)
        _Manifest.model_validate(manifest)
        for entry in [*manifest["shards"]["train"], *manifest["shards"]["val"], manifest["mean"]]:
            size = (folder / entry["file"]).stat().st_size
            if size != entry["bytes"]:
                raise StoreError(f"{folder / entry['file']}: damaged ({size} bytes, not {entry['bytes']})", MEND)
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}", MEND) from None
    except DamagedError as error:
        raise StoreError(str(error), MEND) from None
    except ValidationError as error:
        raise StoreError(f"{path}: damaged ({explain(error)})", MEND) from None
    return manifest
