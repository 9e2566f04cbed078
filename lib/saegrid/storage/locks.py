"""Folders that are made whole or not at all, and locks that processes wait for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from saegrid.storage.atomic import disk_errors


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that is removed when the block ends; what a killed process left there goes first.

    The caller holds a lock, as the folder's name is fixed.
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
    """A fresh temporary folder beside `folder` that takes its place when the block ends well. Needs a lock, too."""
    with fresh_folder(folder.with_name(f".{folder.name}.part")) as temporary:
        yield temporary
        with disk_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """An exclusive lock that dies with its process; says so where it has to wait for another one.

    Raises `DiskError` where its file can't be made.
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
