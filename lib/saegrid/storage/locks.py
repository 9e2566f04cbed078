"""Folders that are created completely or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from saegrid.storage.atomic import disk_errors


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed when the block ends; leftovers of a killed process are removed first.

    The caller must hold a lock, as the folder's name is fixed.
    """
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A fresh temporary folder that replaces `folder` when the block ends without an error. Needs a lock too."""
    with fresh_folder(folder.with_name(f".{folder.name}.part")) as temporary:
        yield temporary
        with disk_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """An exclusive lock that ends with its process; prints a line if it has to wait for another process.

    Raises `DiskError` if its file can't be created.
    """
    lock = FileLock(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that holds {path}", flush=True)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
