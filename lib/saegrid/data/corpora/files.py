"""Corpora in local files: `.jsonl`, `.parquet`, `.txt` and `.md`, one file or a folder of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saegrid.config.run_config import RunConfig
from saegrid.data.corpora.documents import Content, Document, content_fields, content_of, documents, plain
from saegrid.errors import ConfigError, DamagedError, first_line
from saegrid.storage.checksums import numbered_json_lines, read_bytes
from saegrid.storage.hub_access import expanded, local_folder

KINDS = ((".jsonl",), (".parquet",), (".txt", ".md"))
"""A folder is read as the first of these kinds that it has, so a `README.md` beside `.jsonl` is not read."""
SUFFIXES = [suffix for kind in KINDS for suffix in kind]
LIST = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def local_corpus(config: RunConfig) -> Path | None:
    """The file or folder that `dataset` names; None for a Hub id. Raises `ConfigError` for anything else."""
    try:
        path = expanded(config.dataset)
        if path.is_dir() or (path.suffix.lower() not in SUFFIXES and not path.exists()):
            return local_folder("dataset", config.dataset)
        if not path.exists():
            raise ConfigError(f"{_where(config)}: no such file")
    except OSError as error:
        raise ConfigError(f"{_where(config)}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{_where(config)}: {error}") from None
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{_where(config)}: a file; must be a folder, a {LIST} file, or a Hub id")
    return path


def corpus_files(config: RunConfig, path: Path) -> dict[str, list[Path]]:
    """{"train": files, "test": files} if files or their folders have these names, else {"": all files}; sorted.

    A file belongs to a split if a folder above it has the split's name, or if its own name has it, up to a hyphen
    (`train-00000-of-00003.parquet`).

    Raises:
        ConfigError: there is no file to read, or none of `dataset_split`.
    """
    found = [path] if path.is_file() else _walk(config, path)
    of_kind = [[file for file in found if file.suffix.lower() in kind] for kind in KINDS]
    files = next((some for some in of_kind if some), [])
    if not files:
        raise ConfigError(f"{_where(config)}: no {LIST} file in this folder")

    def of_split(name: str) -> list[Path]:
        parts = {file: (*file.relative_to(path).parts[:-1], file.stem.split("-")[0]) for file in files}
        return [file for file in files if name in parts[file]]

    if config.dataset_split:
        if path.is_dir() and (chosen := of_split(config.dataset_split)):
            return {"": chosen}
        raise ConfigError(f"dataset_split = {config.dataset_split!r}: no such split in {config.dataset}")
    if path.is_dir() and of_split("train") and of_split("test"):
        return {name: of_split(name) for name in ("train", "test")}
    return {"": files}


def file_documents(config: RunConfig, files: list[Path]) -> Iterator[Document]:
    """The documents of some files. The files, and the documents of each, come in a seeded order.

    One file is in memory at a time; it is read when its first document is asked for.
    """
    start = 0
    for path in random.Random(config.data_seed).sample(files, len(files)):
        where = f"{_where(config)}: {path.name}"
        try:
            contents = _READERS[path.suffix.lower()](path, config, where)
        except DamagedError as error:
            raise ConfigError(f"{_where(config)}: can't be read: {error}") from None
        of_file = list(documents(contents, len(contents) * len(files), start))
        yield from random.Random(config.data_seed).sample(of_file, len(of_file))
        start += len(of_file)


def _walk(config: RunConfig, folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{_where(config)}: can't be read: {error.filename}: {error.strerror}")

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _text_file(path: Path, config: RunConfig, where: str) -> list[Content]:
    if config.text_field:
        raise ConfigError(f"text_field = {config.text_field!r}: {path} is a text file and has no fields")
    try:
        return [plain(read_bytes(path).decode("utf-8-sig"), where)]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start}") from None


def _json_lines(path: Path, config: RunConfig, where: str) -> list[Content]:
    rows = numbered_json_lines(path, read_bytes(path))
    names = content_fields(rows[0][1], config.text_field, where) if rows else ()
    return [content_of(row, names, f"{where}, line {number}") for number, row in rows]


def _parquet(path: Path, config: RunConfig, where: str) -> list[Content]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = content_fields(file.schema_arrow.names, config.text_field, where)
            rows = file.read(columns=list(names)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{where}: not a Parquet file that can be read: {first_line(error)}") from None
    return [content_of(row, names, f"{where}, row {number}") for number, row in enumerate(rows, 1)]


_READERS: dict[str, Callable[[Path, RunConfig, str], list[Any]]] = {
    **{".jsonl": _json_lines, ".parquet": _parquet, ".txt": _text_file, ".md": _text_file}
}


def _where(config: RunConfig) -> str:
    return f"dataset = {config.dataset!r}"
