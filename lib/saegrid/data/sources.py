"""The sources of a store's rows and reference passes, and which of them have changed since. Free of torch.

Weights, the model's other files, text and code are identified by content. Hub files are identified by commit, which
the store records: a branch that moves on does not affect an existing store.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

from saegrid.config.run_config import RunConfig
from saegrid.data.corpora.embedded_text import embedded_identity
from saegrid.data.corpora.files import corpus_files, local_corpus
from saegrid.data.language_model import HUB_FILES, weight_files
from saegrid.data.manifest import MEND
from saegrid.data.models import embedded
from saegrid.errors import ConfigError, DamagedError, StoreError
from saegrid.storage.checksums import read_json, read_sealed
from saegrid.storage.hub_access import expanded, files_sha256, local_folder

COMMIT = re.compile(r"[0-9a-f]{40}")
ROW_CODE = ("data/[!_]*.py", "data/corpora/[!_]*.py", "data/models/[!_]*.py", "core/splice.py")
"""Modules whose change can change a store's rows, or the reference passes stored with them."""
FEW_FILES = 20
"""A dataset of more files is identified by one hash of all their names and hashes."""


def local_sources(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each local source of a store.

    A key is a parameter, or a parameter (or "code") and a file: `model` (the weights), `model/tokenizer.json`, …
    """
    package = Path(__file__).parents[1]
    paths = sorted(path for pattern in ROW_CODE for path in package.glob(pattern))
    found = {f"code/{path.name}": files_sha256([path]) for path in paths}
    if config.model.startswith("embedded:"):
        found["model"] = embedded.GGUF_SHA256
    elif folder := _folder("model", config):
        found["model"] = files_sha256(weight_files(folder))
        patterns = [*HUB_FILES, "additional_chat_templates/*.jinja"]
        others = {path for pattern in patterns if pattern != "*.safetensors" for path in folder.glob(pattern)}
        others -= {folder / "generation_config.json"}  # sampling settings
        found |= _each("model", folder, sorted(others))
    if config.dataset.startswith("embedded:"):
        found["dataset"] = embedded_identity(config.dataset)
    else:
        with contextlib.suppress(ConfigError):  # a Hub id, or files that are gone
            found |= _dataset_files(config)
    if config.activations and _folder("activations", config):
        from saegrid.data.published_activations import published_files  # imports torch

        with contextlib.suppress(ConfigError):  # the files are gone
            found["activations"] = files_sha256(list(published_files(config)[0].values()))
    return found


def hub_sources(config: RunConfig, dataset_revision: str) -> dict[str, str]:
    """Commits of a store's model and dataset, if they come from the Hub and have been fetched."""
    found = {}
    if not (config.model.startswith("embedded:") or _folder("model", config)):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(config.model, "config.json", revision=config.model_revision or None)
        found["model"] = Path(path).parent.name if isinstance(path, str) else config.model_revision
    if not (config.dataset.startswith("embedded:") or expanded(config.dataset).exists()):
        found["dataset"] = dataset_revision
    return {name: commit for name, commit in found.items() if commit}


def pinned(config: RunConfig, manifest: dict[str, Any]) -> RunConfig:
    """The config with the commits of model and dataset that its store was made from."""
    made = manifest["sources"]
    names = [name for name in ("model", "dataset") if COMMIT.fullmatch(made.get(name, ""))]
    return config.model_copy(update={f"{name}_revision": made[name] for name in names})


def check_sources(config: RunConfig, folder: Path, manifest: dict[str, Any]) -> None:
    """Check the sources that a store records against the current ones. Raises `StoreError`.

    A parameter's folder that no longer exists is not compared.
    """
    sources: dict[str, str] = manifest.get("sources", {})
    now = local_sources(config)
    parameters = {name.split("/")[0] for name in now}
    made = {name: digest for name, digest in sources.items() if name.split("/")[0] in parameters}
    names = sorted(name for name in now.keys() | made.keys() if now.get(name) != made.get(name))
    if any(name.startswith("dataset/") for name in names):
        names = [name for name in names if name != "dataset"]
    if names:
        raise StoreError(f"{folder}: {', '.join(names)} changed since it was made", MEND)


def check_made_from(run_dir: Path, folder: Path) -> None:
    """Check a finished run's hashes and reference losses against its store, if that is intact. Raises `StoreError`."""
    try:
        manifest, sums = read_sealed(folder / "manifest.json"), read_sealed(folder / "baseline.json")["sums"]
        stored = {"data_sha256": manifest["data_sha256"], "model_sha256": manifest["model"]["sha256"]}
        row = read_json(run_dir / "metrics.json")
        with open(run_dir / "prompts.csv", newline="", encoding="utf-8") as file:
            prompts = list(csv.DictReader(file))
        rows_differ = any(row[name] != digest for name, digest in stored.items())
        prompts_differ = any([float(row[name]) for row in prompts] != values for name, values in sums.items())
    except (DamagedError, KeyError, OSError, ValueError):
        return
    if rows_differ or prompts_differ:
        what = "trained on other rows" if rows_differ else "measured on other prompts"
        raise StoreError(f"{run_dir}: {what} than those now in its store {folder}")


def _dataset_files(config: RunConfig) -> dict[str, str]:
    """The files of a local dataset: all together, and one by one if they are few."""
    path = local_corpus(config)
    if not path:
        return {}
    paths = sorted(itertools.chain(*corpus_files(config, path).values()))
    each = _each("dataset", path if path.is_dir() else path.parent, paths)
    if len(paths) <= FEW_FILES:
        return {"dataset": files_sha256(paths), **each}
    return {"dataset": hashlib.sha256(repr(each).encode()).hexdigest()}


def _each(parameter: str, folder: Path, paths: list[Path]) -> dict[str, str]:
    return {f"{parameter}/{path.relative_to(folder).as_posix()}": files_sha256([path]) for path in paths}


def _folder(parameter: str, config: RunConfig) -> Path | None:
    """The local folder that a parameter names; None for a Hub id, or a folder that no longer exists."""
    with contextlib.suppress(ConfigError):
        return local_folder(parameter, getattr(config, parameter))
    return None
