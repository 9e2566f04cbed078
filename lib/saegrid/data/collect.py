"""Collect the activations of a run's prompts into a store, or build it from published files.

One pass of the model makes the stores of several layers and sites, each with the same bytes as a pass of its own would.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm.auto import tqdm

from saegrid.config.run_config import RunConfig
from saegrid.data.language_model import LM, Point, check_tokens, lm_shape, load_lm, take_apart
from saegrid.data.manifest import FORMAT, MEND, SHARD_ROWS
from saegrid.data.prompts import Prompt, draw_prompts, streamed_prompts
from saegrid.data.published_activations import add_published, published_files
from saegrid.data.sources import check_sources, hub_sources, local_sources
from saegrid.data.store import ShardWriter, Store, written
from saegrid.data.stream import Stream, site_rows
from saegrid.errors import StoreError
from saegrid.storage.atomic import write_json
from saegrid.storage.checksums import write_sealed
from saegrid.storage.hub_access import files_sha256
from saegrid.storage.locks import replacing_folder, waiting_lock

__all__ = ["Store", "collect", "open_store"]

WINDOW = 512
"""Prompts sorted by length together; bounds memory, as rows are written in prompt order."""


def collect(
    config: RunConfig, device: str | None = None, shard_rows: int = SHARD_ROWS, also: Iterable[RunConfig] = ()
) -> Path:
    """Folder of the run's activation store, created if missing; concurrent processes create it only once.

    A row is what `site` of block `layer` holds at one stored position of a prompt. Rows are ordered by prompt, then by
    position, independent of batching.

    Args:
        device: where the language model runs; by default a GPU if there is one.
        also: further runs. Missing stores of those that differ only in `layer` and `site` are made in the same pass.

    Raises:
        ConfigError: the model or the dataset is missing or unsuitable.
        StoreError: the existing store is damaged or made from other inputs, or the rows can't be stored.
    """
    if not _exists(store_folder(config)):
        stores = {store_folder(one): one for one in also if _of_one_pass(one, config)} | {store_folder(config): config}
        with contextlib.ExitStack() as stack:
            locked = sorted(folder for folder in stores if not _exists(folder))  # so no two deadlock
            for folder in locked:
                stack.enter_context(waiting_lock(folder.with_name(f".{folder.name}.lock")))
            if not _exists(store_folder(config)):
                missing = [folder for folder in locked if not _exists(folder)]
                parts = {stack.enter_context(replacing_folder(folder)): stores[folder] for folder in missing}
                _make(parts, device, shard_rows)
    open_store(config)
    return store_folder(config)


def _exists(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _of_one_pass(one: RunConfig, other: RunConfig) -> bool:
    """Whether two runs read different points of the same pass of a language model."""
    differ = {name for name, value in one.store_parameters.items() if other.store_parameters.get(name) != value}
    same = one.store_parameters.keys() == other.store_parameters.keys() and one.store_dir == other.store_dir
    return same and differ <= {"layer", "site"} and not one.activations


def open_store(config: RunConfig) -> Store:
    """The run's activation store, if it is complete and made from this run's parameters and from unchanged sources.

    Raises:
        StoreError: it is missing, damaged, or made from other parameters or other files.
    """
    folder = store_folder(config)
    if not _exists(folder):
        raise StoreError(f"{folder}: no activation store here; collect it first")
    store = Stream(folder, config) if config.rows == "streamed" else Store(folder)
    for name, value in config.store_parameters.items():
        made = store.manifest["parameters"].get(name)
        if made != value:
            raise StoreError(f"{folder}: made with {name} = {made!r}, where the run has {value!r}; delete the folder")
    check_sources(config, folder, store.manifest)
    return store


def store_folder(config: RunConfig) -> Path:
    return Path(config.store_dir) / config.store_id


def _make(stores: dict[Path, RunConfig], device: str | None, shard_rows: int) -> None:
    """Write stores that share a pass of the language model into empty folders, their manifests last."""
    started = time.perf_counter()
    config = next(iter(stores.values()))
    sources = local_sources(config)  # before reading: a change made meanwhile is found when the store is opened
    d_in, n_layers = lm_shape(config)
    for one in stores.values():
        one.check_shape(d_in, n_layers)
    dtype = getattr(torch, config.act_dtype)
    writers = {
        (one.layer, one.site): {s: ShardWriter(folder, s, d_in, dtype, shard_rows) for s in ("train", "val")}
        for folder, one in stores.items()
    }
    source = (_add_published if config.activations else _add_collected)(config, writers, device)
    sources |= hub_sources(config, "" if config.activations else source["data"]["revision"])
    source |= {"sources": sources}
    for folder, one in stores.items():
        _finish(one, folder, writers[one.layer, one.site], source, time.perf_counter() - started)


def _finish(
    config: RunConfig, folder: Path, writers: dict[str, ShardWriter], source: dict[str, Any], seconds: float
) -> None:
    """Write the last shards, the mean, the time that the pass took, and the manifest."""
    shards = {split: writer.close() for split, writer in writers.items()}
    mean = written(folder / "mean.safetensors", save({"mean": writers["train"].mean}))
    digest = hashlib.sha256("".join(shard["sha256"] for split in shards for shard in shards[split]).encode())
    rows = sum(writer.rows for writer in writers.values())
    write_json(folder / "timing.json", {"collect_seconds": round(seconds, 3), "rows_per_second": round(rows / seconds)})
    manifest = {
        "format": FORMAT,
        "parameters": config.store_parameters,
        **source,
        "d_in": writers["train"].d_in,
        "act_dtype": config.act_dtype,
        "shards": shards,
        "mean": mean,
        "data_sha256": digest.hexdigest(),
        "statistics": {split: writer.statistics() for split, writer in writers.items()},
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
    }
    write_sealed(folder / "manifest.json", manifest)


Writers = dict[Point, dict[str, ShardWriter]]
"""The writers of each point's splits."""


def _add_collected(config: RunConfig, writers: Writers, device: str | None) -> dict[str, Any]:
    """Run the language model over the prompts. Returns the manifest's facts on the rows' origin."""
    lm, prompts, facts = _model_and_prompts(config, device)
    for layer, site in writers.keys() - {(config.layer, config.site)}:
        take_apart(lm.model, lm.tokenizer, lm.identity, layer, site)  # only to check the point
    for split in ("train", "val"):
        of_split = {point: some[split] for point, some in writers.items()}
        casts = {point: writer.cast for point, writer in of_split.items()}
        rows = sum(len(prompt.positions) for prompt in prompts[split])
        with tqdm(total=rows, unit="tok", unit_scale=True, desc=f"activations ({split})", mininterval=1.0) as bar:
            for first in range(0, len(prompts[split]), WINDOW):
                window = prompts[split][first : first + WINDOW]
                for index, of_prompt in enumerate(site_rows(lm, window, casts, bar.update), first):
                    prompt = prompts[split][index]
                    positions = torch.tensor(prompt.positions, dtype=torch.int64)
                    tokens = torch.tensor(prompt.tokens)[positions]
                    for writer, acts in zip(of_split.values(), of_prompt, strict=True):
                        writer.add(acts, tokens, positions, torch.full_like(positions, index))
    data = {
        "dataset": config.dataset,
        **facts,
        "sha256": _identity(prompts),
        "prompts": {split: len(some) for split, some in prompts.items()},
        "templates": {split: len({prompt.template for prompt in some}) for split, some in prompts.items()},
        "shared_prefix": prompts["eval"][0].prefix,
        "context_size": max(len(prompt.tokens) for prompt in prompts["train"]),
        "prepend_bos": _starts_alike(prompts["train"], getattr(lm.tokenizer, "bos_token_id", None)),
    }
    return {"model": {**lm.identity, "device": lm.model.device.type}, "data": data}


def _starts_alike(prompts: list[Prompt], start_token: int | None) -> bool | None:
    """Whether the prompts begin with the tokenizer's start token; None: mixed."""
    begin = {start_token is not None and prompt.tokens[0] == start_token for prompt in prompts}
    return begin.pop() if len(begin) == 1 else None


def _model_and_prompts(config: RunConfig, device: str | None) -> tuple[LM, dict[str, list[Prompt]], dict[str, Any]]:
    """The run's language model, prompts that fit it, and facts on them. Raises `ConfigError`."""
    lm = load_lm(config, device)
    prompts, facts = draw_prompts(config, lm.tokenizer)
    every: Iterable[Prompt] = itertools.chain(*prompts.values())
    if config.rows == "streamed":  # all of the text is read now: a text that is too small is an error before training
        every = itertools.chain(every, streamed_prompts(config, lm.tokenizer, prompts["eval"][0].prefix))
    check_tokens(config, lm, (prompt.tokens for prompt in every))
    return lm, prompts, facts


def check_prompts(store: Store, prompts: dict[str, list[Prompt]]) -> None:
    """Check redrawn prompts against those of a collected store. Raises `StoreError`."""
    data = store.manifest["data"]
    if "prompts" in data and data["sha256"] != _identity(prompts):
        raise StoreError(f"{store.folder}: dataset and tokenizer now give other prompts than those of its rows", MEND)


def _identity(prompts: dict[str, list[Prompt]]) -> str:
    """SHA-256 of all prompts as one JSON text, hashed in pieces."""
    records = {split: [prompt.record() for prompt in some] for split, some in prompts.items()}
    digest = hashlib.sha256()
    for piece in json.JSONEncoder().iterencode(records):
        digest.update(piece.encode())
    return digest.hexdigest()


def _add_published(config: RunConfig, writers: Writers, device: str | None) -> dict[str, Any]:
    """Add the rows of published files; `train_tokens` and `val_tokens` do not apply.

    The language model, which the splice needs, is loaded first: a mismatch is reported before any row is read.
    """
    files, revision = published_files(config)
    model = _model_and_prompts(config, device)[0].identity
    add_published(config, files, writers[config.layer, config.site])
    names = {split: path.name for split, path in files.items()}
    data = {"activations": config.activations, "revision": revision, "files": names}
    data["note"] = "all rows of the published files: train_tokens and val_tokens do not apply"
    data["sha256"] = files_sha256(list(files.values()))
    return {"model": model, "data": data}
