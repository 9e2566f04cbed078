"""SAE files of all libraries: `load_sae` reads every known format, from disk or the Hub; `export` writes them.

| format | files |
|---|---|
| published | `{name}.pt`, a bare state dict, and next to it `{name}.json` or `cfg.json` with what it lacks |
| saegrid | `cfg.json` + `sae.safetensors`: a run's folder |
| saelens | `cfg.json` + `sae_weights.safetensors` |
| dictionary_learning | `config.json` + `ae.pt` |
| sparsify | `cfg.json` + `sae.safetensors` |
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from saegrid.config.architectures import ARCHITECTURES, Arch
from saegrid.core.sae import SAE
from saegrid.errors import SaeFileError
from saegrid.formats import dictionary_learning, run_folder, saelens, sparsify
from saegrid.formats.exchange import check_facts
from saegrid.formats.published_pt import Told, agree, check_sparsity, given_by, read_published, write_published
from saegrid.storage.foreign_files import as_model, check_sizes, check_tensors, read_json, read_safetensors
from saegrid.storage.hub_access import expanded, hub_errors

WEIGHTS = ("sae.safetensors", "sae_weights.safetensors", "ae.pt")
"""A folder that holds one of these is an SAE."""
OWN_SHAPES = {
    **{"W_enc": ("d_sae", "d_in"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)},
    "b_pre": ("d_in",),
}
CONFIGS = ("cfg.json", "config.json")
HUB_SOURCE = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")


def load_sae(source: str | Path, arch: str = "", k: int = 0, threshold: float = 0.0) -> SAE:
    """The SAE in a local file or folder, or on the Hub as `repo_id[/file or folder][@revision]`.

    Args:
        source: a published `.pt` file; a run's folder; a SAELens, dictionary_learning or sparsify folder (or its
            weights file); a folder with a single `.pt`. Local paths take precedence over the Hub.
        arch: one of `ARCHITECTURES`; needed only if neither a sidecar nor a published name states it.
        k: latents per row; needed likewise.
        threshold: JumpReLU's theta, or BatchTopK's calibrated cut, in the activations' unit; needed likewise.

    Returns:
        The SAE in float32 on the CPU. A published BatchTopK without a sidecar has no calibrated cut: it cuts per
        batch, as the published class does.

    Raises:
        SaeFileError: the file is missing, damaged, hostile or of an unknown format, or the arguments, the sidecar and
            the file's name contradict each other. No code in a file is executed.
        ConfigError: the Hub has no such repository or revision, or can't be reached.
    """
    given = given_by(arch, k, threshold)
    path = _found(str(source))
    if path.is_file() and path.name in WEIGHTS:
        path = path.parent
    if path.is_dir():
        return _load_folder(path, given)
    if path.suffix != ".pt" or not path.is_file():
        raise SaeFileError(f"{path}: not an SAE file; must be *.pt, {', '.join(WEIGHTS)}, or a folder with one of them")
    return read_published(path, given)


def export(sae: SAE, folder: str | Path, format: str, facts: dict[str, Any] | None = None) -> Path:
    """Write an SAE for other tools; the same SAE gives the same bytes.

    Args:
        folder: created if missing; one folder per SAE, except for "published", which may hold many.
        format: "published" (all), "saelens" (TopK as `topk`, ReLU as `standard`, Gated as `gated`; all others as
            `jumprelu`, BatchTopK and Matryoshka with their calibrated cut), "dictionary_learning" (all) or
            "sparsify" (TopK).
        facts: facts about the SAE, of JSON types: `name` (of the published file), `model`, `layer`, `site`,
            `dataset`, `context_size`, `prepend_bos` and any others; leave out unknown ones. A run's `cfg.json` works.

    Returns:
        The folder, or the `.pt` file of "published".

    Raises:
        SaeFileError: the format is unknown or can't hold this SAE, the folder holds an SAE of another format, or a
            fact has the wrong type or does not fit into JSON.
    """
    folder, facts = _expanded(str(folder)), facts or {}
    if format not in WRITERS:
        raise SaeFileError(f"format = {format!r}: must be one of {', '.join(WRITERS)}")
    check_facts(facts)
    if format != "published":
        present = [name for name in WEIGHTS if (folder / name).exists()]
        if present and _kind(folder, present) != format:
            raise SaeFileError(f"{folder}: already holds another SAE ({', '.join(present)}); name another folder")
    return WRITERS[format](sae, folder, facts) or folder


# --- finding a source ---


def _found(source: str) -> Path:
    path = _expanded(source)
    if os.path.exists(path):  # False, too, for what can't be a path
        return path
    hub = HUB_SOURCE.fullmatch(source)
    if not hub:
        raise SaeFileError(f"{source}: no such file or folder, and not of the form organisation/name/file[@revision]")
    inner = PurePosixPath(hub["file"] or ".")
    if inner.is_absolute() or ".." in inner.parts:
        raise SaeFileError(f"{source}: no such file or folder")
    return _downloaded(source, hub["repo"], inner, hub["revision"] or "")


def _expanded(path: str) -> Path:
    try:
        return expanded(path)
    except ValueError as error:
        raise SaeFileError(f"{path}: {error}") from None


def _downloaded(source: str, repo: str, inner: PurePosixPath, revision: str) -> Path:
    """Fetch a file with its sidecars, or the known files of a folder, into the Hub's cache."""
    from huggingface_hub import snapshot_download

    single = inner.suffix in (".pt", ".safetensors")
    folder = inner.parent if single else inner
    names = [inner, inner.with_suffix(".json")] if single else [folder / name for name in WEIGHTS]
    patterns = [glob.escape(str(name)) for name in (*names, *(folder / name for name in CONFIGS))]
    with hub_errors("source", repo, revision):
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns)) / inner
    if not path.exists():
        raise SaeFileError(f"{source}: {repo} has no {inner} that can be read as an SAE")
    return path


# --- folders ---


class _OwnCfg(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    arch: Arch
    d_in: int
    d_sae: int
    k: int = Field(ge=0)
    threshold: float = Field(ge=0.0, allow_inf_nan=False)
    inference_threshold: float | None = Field(ge=0.0, allow_inf_nan=False)
    weights_sha256: str


def _load_folder(folder: Path, given: Told) -> SAE:
    present = [name for name in WEIGHTS if (folder / name).exists()]
    if not present:
        published = sorted(folder.glob("*.pt"))
        if len(published) == 1:
            return read_published(published[0], given)
        what = f"{len(published)} .pt files; name one" if published else f"none of {', '.join(WEIGHTS)} and no .pt file"
        raise SaeFileError(f"{folder}: holds {what}")
    if len(present) > 1:
        raise SaeFileError(f"{folder}: holds more than one SAE: {', '.join(present)}")
    sae = READERS[_kind(folder, present)](folder)
    batch_cut = ARCHITECTURES[sae.arch].batch_cut
    theta = sae.inference_threshold if batch_cut else sae.threshold or None
    own = Told("its configuration", sae.arch, sae.k or None, theta)
    told = agree(folder, [own, given])
    if batch_cut:
        sae.inference_threshold = told.threshold
    elif (told.k, told.threshold) != (own.k, own.threshold):
        name = "k" if told.k != own.k else "threshold"
        raise SaeFileError(f"{folder}: {name} = {getattr(given, name)}: this {sae.arch} takes none")
    return sae


def _kind(folder: Path, present: list[str]) -> str:
    """Format of a folder that holds a weights file; this project and sparsify use the same names."""
    if present[0] != "sae.safetensors":
        return {"sae_weights.safetensors": "saelens", "ae.pt": "dictionary_learning"}[present[0]]
    return "saegrid" if "arch" in read_json(folder / "cfg.json") else "sparsify"


def _read_own(folder: Path) -> SAE:
    """A run's SAE. `run_folder.load_folder` trusts `cfg.json`, so that is checked against the weights first."""
    path, weights_path = folder / "cfg.json", folder / "sae.safetensors"
    cfg = as_model(_OwnCfg, read_json(path), path)
    tensors = read_safetensors(weights_path)
    own = {"theta": ("d_sae",)} if "theta" in tensors else {}
    sizes = check_tensors(tensors, OWN_SHAPES | own, weights_path)
    check_sizes(cfg, sizes, path)
    theta = cfg.threshold if ARCHITECTURES[cfg.arch].takes_threshold and not own else cfg.threshold or None
    check_sparsity(path, cfg.arch, cfg.k or None, theta, sizes["d_sae"], tensors.get("theta"))
    return run_folder.load_folder(folder)


READERS: dict[str, Callable[[Path], SAE]] = {
    "saegrid": _read_own,
    "saelens": saelens.read_saelens,
    "dictionary_learning": dictionary_learning.read_dictionary,
    "sparsify": sparsify.read_sparsify,
}
WRITERS: dict[str, Callable[[SAE, Path, dict[str, Any]], Path | None]] = {
    "published": write_published,
    "saelens": saelens.write_saelens,
    "dictionary_learning": dictionary_learning.write_dictionary,
    "sparsify": sparsify.write_sparsify,
}
