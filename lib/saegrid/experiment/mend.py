"""Find damaged or outdated stores, runs and tables of a grid, and delete their commit markers: the next run makes them
again.

The commit marker of a store is `manifest.json`, of its reference passes `baseline.json`, of a run `metrics.json`, of
the tables `SHA256SUMS`; each states the SHA-256 of its files. A store is outdated when its sources have changed, a run
when its store has. Does not import torch, because every workflow begins with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from saegrid.config.grid import Grid
from saegrid.config.run_config import RunConfig
from saegrid.data.manifest import read_manifest
from saegrid.data.sources import check_made_from, check_sources
from saegrid.errors import DamagedError, SaegridError, StoreError
from saegrid.experiment import finished_run, results
from saegrid.storage.atomic import disk_errors
from saegrid.storage.checksums import SUMS, check_sum, check_sums, file_sha256, read_sealed, sum_of


def mend(grid: Grid, root: str | Path = ".") -> list[str]:
    """Drop what is damaged or outdated and not in use. Returns one line per finding, in order.

    The metrics of runs whose store is made again are set aside: a run restores them if the new store is the same.
    """
    root = Path(root)
    runs = {root / run.runs_dir / run.run_id: run for run in grid.runs()}
    stores = {root / run.store_dir / run.store_id: run for run in runs.values()}
    found: list[str] = []
    outdated: set[Path] = set()
    for folder, run in sorted(stores.items()):
        lock = folder.with_name(f".{folder.name}.lock")
        found += _dropped(folder, lock, _store_faults(folder))
        if changes := _dropped(folder, lock, _changes(folder, run)):
            found += changes
            outdated.add(folder)
    again = False
    for folder, run in runs.items():
        store = root / run.store_dir / run.store_id
        faults = _dropped(folder, folder / ".lock", _run_faults(folder, run.run_id))
        aside = _dropped(folder, folder / ".lock", _of_another_store(folder, store, store in outdated))
        found += faults if store in outdated else faults + aside
        again |= bool(faults or aside)
    found += _dropped(root / grid.results_dir, None, _table_faults(root / grid.results_dir, again))
    return found


def _dropped(folder: Path, lock: Path | None, faults: Iterator[tuple[str, list[str]]]) -> list[str]:
    """Delete the markers of all faults, unless another process holds the folder's lock. Returns one line per fault."""
    if not folder.is_dir():
        return []
    lines = []
    try:
        with FileLock(lock, timeout=0) if lock else disk_errors(folder):
            for line, markers in faults:
                for marker in markers:
                    with disk_errors(folder / marker):
                        (folder / marker).unlink(missing_ok=True)
                lines.append(f"{line}; it is made again")
    except Timeout:  # in use, by a process that checks what it reads
        pass
    return lines


def _store_faults(folder: Path) -> Iterator[tuple[str, list[str]]]:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return
    try:
        data = _check_manifest(folder)
    except SaegridError as error:
        yield error.fact, ["manifest.json", "baseline.json"]
        return
    for name in ("baseline.json", "pca.json", results.PAIRS):
        if (folder / name).exists():
            try:
                _check_made_of(folder / name, data)
            except DamagedError as error:
                yield str(error), [name]


def _changes(folder: Path, run: RunConfig) -> Iterator[tuple[str, list[str]]]:
    """Whether the sources of a complete store have changed."""
    try:
        if (folder / "manifest.json").exists():
            check_sources(run, folder, read_sealed(folder / "manifest.json"))
    except SaegridError as error:
        yield error.fact, ["manifest.json", "baseline.json", "pca.json", results.PAIRS]


def _check_manifest(folder: Path) -> str:
    """Check a store's files against its manifest. Returns the hash of its rows."""
    content = read_manifest(folder)
    for entry in [*content["shards"]["train"], *content["shards"]["val"], content["mean"]]:
        path = folder / entry["file"]
        if file_sha256(path) != entry["sha256"]:
            raise DamagedError(f"{path}: damaged (not the SHA-256 in manifest.json)")
    return content["data_sha256"]


def _check_made_of(path: Path, data_sha256: str) -> None:
    """Check the hashes of a file made from a store's rows and, for the reference passes, of their tensors."""
    content = read_sealed(path)
    if content.get("data_sha256") != data_sha256:
        raise DamagedError(f"{path}: damaged (another store's)")
    tensors = path.with_suffix(".safetensors")
    if path.name == "baseline.json" and file_sha256(tensors) != content.get("x_sha256"):
        raise DamagedError(f"{tensors}: damaged (not the SHA-256 in {path.name})")


def _run_faults(folder: Path, run_id: str) -> Iterator[tuple[str, list[str]]]:
    if (folder / "metrics.json").exists():
        try:
            finished_run.check_run(folder, run_id)
        except SaegridError as error:
            yield error.fact, ["metrics.json"]
            return
        try:
            check_sum(folder / finished_run.NOTEBOOK)
        except DamagedError as error:
            _set_aside(folder)
            yield str(error), [sum_of(folder / finished_run.NOTEBOOK).name]


def _set_aside(folder: Path) -> None:
    """Set a run's metrics aside, until it is run again."""
    with disk_errors(folder):
        (folder / "metrics.json").rename(folder / finished_run.SET_ASIDE)


def _of_another_store(folder: Path, store: Path, outdated: bool) -> Iterator[tuple[str, list[str]]]:
    """Set a finished run's metrics aside if its store is made again, or is not the one that the run used."""
    if (folder / "metrics.json").exists():
        try:
            if outdated:
                raise StoreError(f"{folder}: its store is made again")
            check_made_from(folder, store)
        except StoreError as error:
            _set_aside(folder)
            yield str(error), []


def _table_faults(folder: Path, again: bool) -> Iterator[tuple[str, list[str]]]:
    """Tables that are damaged, or whose runs are made again."""
    if (folder / SUMS).exists():
        try:
            if again:
                raise DamagedError(f"{folder / SUMS}: the tables of runs that are made again")
            check_sums(folder)
        except DamagedError as error:
            yield str(error), [*results.TABLES, SUMS]
