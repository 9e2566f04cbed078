"""The published activation files: bare tensors [n, d_in], `{stage}_layer{layer}_train.pt` and `_val.pt`, or one.

An unsplit `{stage}_layer{layer}.pt` is split like the published files: the last fifth of `torch.randperm` with seed 0
is for validation.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from saegrid.config.run_config import RunConfig
from saegrid.data.store import ShardWriter
from saegrid.errors import ConfigError, SaeFileError, StoreError
from saegrid.storage.foreign_files import read_pt
from saegrid.storage.hub_access import hub_errors, local_folder

CHUNK_ROWS = 16_384


def published_files(config: RunConfig) -> tuple[dict[str, Path], str]:
    """({"train": …, "val": …} or {"all": …}, revision): the files for the run's stage and layer, in any subfolder.

    Raises:
        ConfigError: no such folder or dataset, no such file in it, or several with the same name.
    """
    folder = local_folder("activations", config.activations)
    if folder:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
        return {split: folder / name for split, name in _match(config, names).items()}, ""
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors("activations", config.activations, config.activations_revision):
        facts: Any = HfApi().dataset_info(config.activations, revision=config.activations_revision or None)
        chosen = _match(config, sorted(file.rfilename for file in facts.siblings))
        get = {"repo_type": "dataset", "revision": facts.sha}
        return {
            split: Path(hf_hub_download(config.activations, name, **get)) for split, name in chosen.items()
        }, facts.sha


def add_published(config: RunConfig, files: dict[str, Path], writers: dict[str, ShardWriter]) -> None:
    """Write the files' rows; their tokens and positions are unknown (-1).

    Raises:
        StoreError: a file is not a bare floating-point tensor [n, d_in].
    """
    d_in = writers["train"].d_in
    if "all" in files:
        acts = _load(files["all"], d_in, config.model)
        order = torch.randperm(len(acts), generator=torch.Generator().manual_seed(0))
        n_train = len(acts) - int(len(acts) * 0.2)
        if n_train == len(acts):
            raise StoreError(f"{files['all']}: {n_train} rows; needs at least 5, a fifth of which are for validation")
        parts = {"train": (acts, order[:n_train]), "val": (acts, order[n_train:])}
    else:
        tensors = {split: _load(path, d_in, config.model) for split, path in files.items()}
        parts = {split: (acts, torch.arange(len(acts))) for split, acts in tensors.items()}
    for split, (acts, order) in parts.items():
        for rows in order.split(CHUNK_ROWS):
            unknown = torch.full((len(rows),), -1)
            writers[split].add(acts[rows].float(), unknown, unknown, unknown)


def _match(config: RunConfig, names: list[str]) -> dict[str, str]:
    """The wanted files of a folder or repository, matched by name alone."""
    stem = f"{config.activations_stage}_layer{config.layer}"
    where = f"activations = {config.activations!r}"
    found: dict[str, str] = {}
    for split, wanted in {"train": f"{stem}_train.pt", "val": f"{stem}_val.pt", "all": f"{stem}.pt"}.items():
        hits = [name for name in names if PurePosixPath(name).name == wanted]
        if len(hits) > 1:
            raise ConfigError(f"{where}: {wanted} exists {len(hits)} times: {', '.join(hits)}")
        if hits:
            found[split] = hits[0]
    if {"train", "val"} <= found.keys():
        return {split: found[split] for split in ("train", "val")}
    if "all" in found:
        return {"all": found["all"]}
    there = ", ".join(name for name in names if name.endswith(".pt")) or "none"
    raise ConfigError(f"{where}: needs {stem}_train.pt and {stem}_val.pt, or {stem}.pt; its .pt files: {there}")


def _load(path: Path, d_in: int, model: str) -> Tensor:
    try:
        acts = read_pt(path, mmap=True)
    except SaeFileError as error:
        raise StoreError(str(error).replace("a state dict of tensors", "a saved tensor")) from None
    if not isinstance(acts, Tensor) or acts.layout != torch.strided or not acts.is_floating_point():
        raise StoreError(f"{path}: holds {type(acts).__name__}, not a tensor of floating-point numbers")
    if acts.ndim != 2 or acts.shape[1] != d_in or len(acts) < 2:
        raise StoreError(f"{path}: shape {list(acts.shape)}; rows of {model} need [n, {d_in}], n at least 2")
    if acts.untyped_storage().nbytes() < acts.nbytes:
        raise StoreError(f"{path}: states {acts.nbytes} bytes and holds fewer")
    return acts
