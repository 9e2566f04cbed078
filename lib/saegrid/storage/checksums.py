"""Detect damaged files: JSON files that carry their own SHA-256, and a folder's `SHA256SUMS`.

Free of torch. `SHA256SUMS` has the format of `sha256sum`: `sha256sum -c SHA256SUMS` checks a folder too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saegrid.errors import DamagedError
from saegrid.storage.atomic import write_json, write_text

SUMS = "SHA256SUMS"
SEAL = "sha256"
MAX_JSON_BYTES = 1 << 28
"""No file of this project is larger; a larger one is not parsed."""
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[^/\s][^/]*)")


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write an object as JSON, with the SHA-256 of the rest under `sha256`."""
    write_json(path, {**content, SEAL: _digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote, without its seal.

    Raises:
        DamagedError: it can't be read, or has changed since it was written.
    """
    content = read_json(path)
    stated = content.pop(SEAL, None)
    try:
        intact = stated == _digest(content)
    except (ValueError, RecursionError):  # a number or a depth that this project never writes
        intact = False
    if not intact:
        raise DamagedError(f"{path}: damaged (not the SHA-256 that it was written with)")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises `DamagedError`."""
    content = _parsed(path, read_bytes(path, limit))
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: not a JSON object")
    return content


def numbered_json_lines(path: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, object) of each line that is not blank. Raises `DamagedError`, which names the line."""
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    rows = [(number, _parsed(f"{path}: line {number}", line)) for number, line in lines]
    for number, row in rows:
        if not isinstance(row, dict):
            raise DamagedError(f"{path}: line {number}: not a JSON object")
    return rows


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """A plain file's content. Raises `DamagedError` if it is missing, not a plain file, or larger than `limit`."""
    try:
        if not path.is_file() and path.exists():
            raise DamagedError(f"{path}: not a plain file")
        size = path.stat().st_size
        if limit is not None and size > limit:
            raise DamagedError(f"{path}: damaged ({size:,} bytes, where at most {limit:,} are expected)")
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}") from None


def write_sums(folder: Path, names: Iterable[str], coming: dict[str, bytes] | None = None) -> None:
    """Record the SHA-256 of files in a folder, and of those in `coming`, which are written next."""
    digests = {name: file_sha256(folder / name) for name in names}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in (coming or {}).items()}
    write_text(folder / SUMS, "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


def read_sums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a folder. Raises `DamagedError`."""
    lines = read_bytes(folder / SUMS, 1 << 20).decode("utf-8", "replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or None in found:
        raise DamagedError(f"{folder / SUMS}: damaged (not lines of SHA-256 and file)")
    return {line["name"]: line["digest"] for line in found if line}


def check_sums(folder: Path, names: Iterable[str] = ()) -> None:
    """Check all files listed in a folder's `SHA256SUMS`, which must list `names`. Raises `DamagedError`."""
    sums = read_sums(folder)
    for name in [*names, *sums]:
        if name not in sums:
            raise DamagedError(f"{folder / SUMS}: damaged (lacks {name})")
        if file_sha256(folder / name) != sums[name]:
            raise DamagedError(f"{folder / name}: damaged (not the SHA-256 in {SUMS})")


def checked_bytes(path: Path) -> bytes:
    """A file's content, checked against its folder's `SHA256SUMS`. Raises `DamagedError`."""
    sums, content = read_sums(path.parent), read_bytes(path)
    if sums.get(path.name) != hashlib.sha256(content).hexdigest():
        raise DamagedError(f"{path}: damaged (not the SHA-256 in {SUMS})")
    return content


def write_sum(path: Path) -> None:
    """Record a file's SHA-256 in `NAME.sha256` next to it, for files made after their folder's `SHA256SUMS`."""
    write_text(sum_of(path), f"{file_sha256(path)}  {path.name}\n")


def check_sum(path: Path) -> None:
    """Check that a file exists, and fits the `NAME.sha256` next to it if there is one. Raises `DamagedError`."""
    stated, digest = sum_of(path), file_sha256(path)
    if stated.exists() and read_bytes(stated, 1 << 12) != f"{digest}  {path.name}\n".encode():
        raise DamagedError(f"{path}: damaged (not the SHA-256 in {stated.name})")


def sum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file. Raises `DamagedError` if it can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}") from None


def _parsed(path: Path | str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedError(f"{path}: not JSON: {reason}") from None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
