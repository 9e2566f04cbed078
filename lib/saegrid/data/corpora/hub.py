"""Datasets from the Hub, or from its local cache."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saegrid.config.run_config import RunConfig
from saegrid.data.corpora.documents import Document, content_fields, content_of, documents
from saegrid.errors import ConfigError
from saegrid.storage.hub_access import hub_errors


def hub_corpus(config: RunConfig) -> tuple[dict[str, Iterator[Document]], str]:
    """(streams, revision): the documents of `dataset_split`; else of train and test, if there are both; else of one.

    Raises:
        ConfigError: the dataset or its split is not there, can't be read, or has no text.
    """
    data, revision = _rows(config)
    if config.dataset_split and config.dataset_split not in data:
        raise ConfigError(f"dataset_split = {config.dataset_split!r}: {config.dataset} has {', '.join(data)}")
    if config.dataset_split or "train" not in data or "test" not in data:
        name = config.dataset_split or ("train" if "train" in data else next(iter(data)))
        return {"": _documents(config, name, data[name])}, revision
    return {name: _documents(config, name, data[name]) for name in ("train", "test")}, revision


def _documents(config: RunConfig, split: str, rows: Any) -> Iterator[Document]:
    """Documents of the rows, which come in a seeded order.

    A document has its row's number; further parts of a long text have numbers above all rows'.
    """
    where = f"dataset = {config.dataset!r}: {split}"
    names = content_fields(rows.column_names, config.text_field, where)
    others = itertools.count(len(rows))
    for index in random.Random(config.data_seed).sample(range(len(rows)), len(rows)):
        content = content_of(rows[index], names, f"{where}, row {index + 1}")
        for part in documents([content], len(rows)):
            yield part._replace(index=next(others) if part.index else index)


def _rows(config: RunConfig) -> tuple[Any, str]:
    import datasets

    subset = config.dataset_config or ("main" if config.dataset == "openai/gsm8k" else None)
    datasets.disable_progress_bars()
    try:
        with hub_errors("dataset", config.dataset, config.dataset_revision):
            data = datasets.load_dataset(config.dataset, subset, revision=config.dataset_revision or None)
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).strip().splitlines()[:2])  # the second line lists what there is
        name = "dataset_config" if reason.startswith(("Config name", "BuilderConfig")) else "dataset"
        of = "" if name == "dataset" else f"{config.dataset}: "
        raise ConfigError(f"{name} = {getattr(config, name)!r}: {of}can't be read: {reason}") from None
    finally:
        datasets.enable_progress_bars()
    files = [file["filename"] for rows in data.values() for file in rows.cache_files]
    commits = {part for file in files for part in Path(file).parts if re.fullmatch("[0-9a-f]{40}", part)}
    return data, commits.pop() if len(commits) == 1 else config.dataset_revision
