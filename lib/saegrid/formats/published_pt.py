"""The published `.pt` file: a bare state dict; the caller, a sidecar and the file's name state what it lacks.

`storage.foreign_files.read_pt` reads it and executes nothing.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saegrid.config.architectures import ARCHITECTURES, Arch
from saegrid.core.sae import SAE, SAE_CLASSES, BatchTopK
from saegrid.errors import SaeFileError
from saegrid.formats.run_folder import PUBLISHED_SHAPES, THETA, from_published, shape_and_rule, write_state_dict
from saegrid.storage.atomic import write_json
from saegrid.storage.foreign_files import as_model, check_sizes, check_tensors, read_json, read_pt

PUBLISHED_NAME = re.compile(
    rf"(?P<arch>{'|'.join(ARCHITECTURES)})_exp(?P<expansion>\d{{1,6}})x_"
    r"(k(?P<k>\d{1,9})|t(?P<threshold>\d[\d.e+-]*))(_improved)?"
)
SAME_THRESHOLD = 1e-5
"""Relative tolerance; a published name has six digits."""


class Told(NamedTuple):
    """What one source states about an SAE; None: not stated."""

    who: str
    arch: str | None = None
    k: int | None = None
    threshold: float | None = None  # JumpReLU's theta, BatchTopK's calibrated cut
    expansion: int | None = None


class _Sidecar(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    arch: Arch
    d_in: int | None = None
    d_sae: int | None = None
    k: int | None = Field(None, ge=0)
    threshold: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    inference_threshold: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    threshold_unit: str = "absolute"


def read_published(path: Path, given: Told) -> SAE:
    """The SAE of a published `.pt` file, described by the caller, else the sidecar, else the file's name.

    A BatchTopK has a calibrated cut only if one of them states it, else it cuts per batch.

    Raises:
        SaeFileError: not such a file, no source states its architecture and sparsity, or two contradict each other.
    """
    state = read_pt(path)
    own = {THETA: ("d_sae",)} if isinstance(state, dict) and THETA in state else {}
    sizes = check_tensors(state, {"encoder.weight": ("d_sae", "d_in"), **PUBLISHED_SHAPES, **own}, path)
    sidecar, unit = _sidecar(path, sizes)
    told = agree(path, [given, sidecar, _from_name(path, unit)])
    if not told.arch:
        raise SaeFileError(
            f"{path}: its architecture is unknown: give arch= ({', '.join(SAE_CLASSES)}) and its k= or threshold="
        )
    if told.expansion not in (None, sizes["d_sae"] / sizes["d_in"]):
        d_sae = f"{told.expansion} * {sizes['d_in']}"
        raise SaeFileError(f"{path}: its name says d_sae = {d_sae}, but the weights have {sizes['d_sae']}")
    theta = None if ARCHITECTURES[told.arch].batch_cut else told.threshold
    theta = theta or None if own else theta
    check_sparsity(path, told.arch, told.k, theta, sizes["d_sae"], state.get(THETA))
    sae = from_published(state, told.arch, told.k or 0, theta or 0.0)
    if isinstance(sae, BatchTopK):
        sae.inference_threshold = told.threshold
    return sae


def given_by(arch: str, k: int, threshold: float) -> Told:
    """What the caller states; "" and 0 mean "not given". Raises `SaeFileError` for an impossible value."""
    if arch and arch not in ARCHITECTURES:
        raise SaeFileError(f"arch = {arch!r}: must be one of {', '.join(SAE_CLASSES)}")
    if not isinstance(k, int) or k < 0:  # type: ignore[redundant-expr]
        raise SaeFileError(f"k = {k!r}: must be a whole number of at least 1")
    if not (threshold >= 0 and math.isfinite(threshold)):
        raise SaeFileError(f"threshold = {threshold!r}: must be a number above 0")
    return Told("what is given", arch or None, k or None, threshold or None)


def _sidecar(path: Path, sizes: dict[str, int]) -> tuple[Told, str]:
    """What `{name}.json`, else `cfg.json`, states, and the threshold's unit; nothing if it is another tool's."""
    for sidecar in (path.with_suffix(".json"), path.with_name("cfg.json")):
        if sidecar.exists() and "arch" in (content := read_json(sidecar)):
            cfg = as_model(_Sidecar, content, sidecar)
            check_sizes(cfg, sizes, sidecar)
            arch = ARCHITECTURES[cfg.arch]
            theta = cfg.threshold if arch.takes_threshold and not cfg.k else None
            theta = cfg.inference_threshold if arch.batch_cut else theta
            return Told(sidecar.name, cfg.arch, cfg.k or None, theta), cfg.threshold_unit
    return Told("no sidecar"), "absolute"


def _from_name(path: Path, unit: str) -> Told:
    name = PUBLISHED_NAME.fullmatch(path.stem)
    if not name:
        return Told("its name")
    try:
        theta = float(name["threshold"]) if name["threshold"] and unit == "absolute" else None
    except ValueError:
        return Told("its name")
    return Told("its name", name["arch"], int(name["k"]) if name["k"] else None, theta, int(name["expansion"]))


def agree(where: Path, told: list[Told]) -> Told:
    """Merge the sources, each field from the first that states it. Raises `SaeFileError` if two contradict."""
    agreed: dict[str, Any] = {}
    for field in Told._fields[1:]:
        says = [(source.who, getattr(source, field)) for source in told if getattr(source, field) is not None]
        first_who, first = says[0] if says else ("", None)
        for who, value in says[1:]:
            close = field == "threshold" and math.isclose(value, first or 0.0, rel_tol=SAME_THRESHOLD)
            if value != first and not close:
                raise SaeFileError(f"{where}: {field} is {first} by {first_who}, but {value} by {who}")
        agreed[field] = first
    return Told("all", **agreed)


def check_sparsity(
    where: Path, arch: str, k: int | None, threshold: float | None, d_sae: int, theta: Tensor | None = None
) -> None:
    """Raises `SaeFileError` if an architecture lacks its k or threshold, or has one that it does not take.

    Args:
        theta: the file's theta per latent (d_sae,), if any; a JumpReLU or Gated then needs nothing else.
    """
    if theta is not None:
        own = arch in ("JumpReLU", "Gated")
        if not own or threshold is not None:
            what = f"threshold = {threshold}" if own else f"arch = {arch!r}"
            raise SaeFileError(f"{where}: {what}: its theta per latent needs arch JumpReLU or Gated, and no threshold")
        if (theta < 0).any():
            raise SaeFileError(f"{where}: theta must not be below 0")
        return
    if arch == "JumpReLU":
        if k is not None:
            raise SaeFileError(f"{where}: k = {k}: not a parameter of JumpReLU, which takes threshold")
        if threshold is None:
            raise SaeFileError(f"{where}: JumpReLU's threshold is unknown: give threshold=")
        return
    if arch == "Gated":
        raise SaeFileError(f"{where}: Gated's theta per latent is missing")
    if k is None and arch != "ReLU":
        raise SaeFileError(f"{where}: {arch}'s k is unknown: give k=")
    least = 0 if arch == "ReLU" else 1  # another library's ReLU has no k
    if k is not None and not least <= k <= d_sae:
        raise SaeFileError(f"{where}: k = {k}: must be from 1 to d_sae = {d_sae}")
    if threshold is not None:
        raise SaeFileError(f"{where}: threshold = {threshold}: not a parameter of {arch}, which takes k")


def write_published(sae: SAE, folder: Path, facts: dict[str, Any]) -> Path:
    """Write `{name}.pt`, and `{name}.json` with what a bare state dict lacks. Returns the path of the `.pt` file."""
    theta = f"{sae.threshold:g}" if float(f"{sae.threshold:g}") == sae.threshold else repr(sae.threshold)
    sparsity = f"t{theta}" if sae.arch == "JumpReLU" and not sae.k else f"k{sae.k}"
    name = facts.get("name") or f"{sae.arch}_exp{sae.d_sae / sae.d_in:g}x_{sparsity}"
    if not re.fullmatch(r"[\w.+-]+", str(name)):
        raise SaeFileError(f"name = {name!r}: letters, digits and _ . + - make a file name")
    write_state_dict(sae, folder / f"{name}.pt")
    write_json(folder / f"{name}.json", facts | shape_and_rule(sae))
    return folder / f"{name}.pt"
