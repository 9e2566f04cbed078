"""Atomic writes: a temporary file is renamed into place, so a crash leaves the old or the new file, never half."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saegrid.errors import DiskError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PART = ".part"


@contextlib.contextmanager
def replacing(path: str | Path, needs: int = 0) -> Iterator[Path]:
    """A temporary path in the folder of `path`; it replaces `path` when the block ends without an error.

    Args:
        needs: bytes that will be written, if known; only for the message.

    Raises:
        DiskError: the disk is full, a file-size limit is hit, or the folder can't be written to.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except Exception as error:
        code = _error_number(error)
        if code not in _DISK:
            raise
        raise DiskError(disk_message(path, code, needs)) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # a folder that became read-only keeps the file
                temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def sweep(folder: Path) -> None:
    """Remove temporary files of killed writers. The caller holds the lock that all writers of the folder take."""
    for left in folder.glob(f".*{PART}"):
        if left.is_file():
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Make, open or lock `path` inside this block: a full or read-only disk becomes one line. Raises `DiskError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise DiskError(disk_message(Path(path), error.errno)) from None


def disk_message(path: Path, code: int, needs: int = 0) -> str:
    """Why `path` can't be written, with the bytes needed and free."""
    facts = [f"needs {needs:,} bytes"] if needs else []
    with contextlib.suppress(OSError):
        existing = next(folder for folder in path.absolute().parents if folder.is_dir())
        facts.append(f"{shutil.disk_usage(existing).free:,} bytes are free")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0] if resource and code == errno.EFBIG else -1  # type: ignore[truthy-bool]
    if limit >= 0:
        facts.append(f"the file-size limit is {limit:,}")
    return f"{path}: can't be written: {os.strerror(code)} ({', '.join(facts)}); what was there is unchanged"


_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


def _error_number(error: Exception) -> int | None:
    """The errno of a failed write, whichever library raised it."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\bos error (\d+)\b", str(error))  # safetensors
    return int(told[1]) if told else None


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
