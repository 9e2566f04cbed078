"""Seed stability: compares each pair of a grid's runs that differ in their seed alone (`core.stability`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saegrid.config.grid import Grid
from saegrid.config.run_config import RunConfig
from saegrid.core.metrics import is_sink, sink_norm
from saegrid.core.sae import SAE, initial_sae
from saegrid.core.stability import activity, matched, movement
from saegrid.data.collect import open_store
from saegrid.data.store import Store
from saegrid.errors import ConfigError, DamagedError
from saegrid.experiment.finished_run import load_run
from saegrid.experiment.results import PAIRS, STABILITY_MEASURES
from saegrid.formats.run_folder import load_folder
from saegrid.storage.checksums import read_sealed, write_sealed

BATCH_ROWS = 2048


def make(grid: Grid, store_id: str, root: str | Path = ".") -> None:
    """Compare all pairs of runs on a store that are new; writes `stability.json` into the store's folder."""
    root = Path(root)
    groups = [runs for runs in grid.seeds() if runs[0].store_id == store_id]
    first = next(run for run in grid.runs() if run.store_id == store_id)
    store = open_store(first.model_copy(update={"store_dir": str(root / first.store_dir)}))
    path = store.folder / PAIRS
    known = _known(path, store.data_sha256)
    for runs in groups:
        known |= _compared(runs, store, root, known)
    write_sealed(path, {"data_sha256": store.data_sha256, "records": list(known.values())})


def _known(path: Path, data_sha256: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Records of an earlier call, by the hashes of the two runs' weights; none if they are damaged or older."""
    try:
        made: dict[str, Any] = read_sealed(path) if path.exists() else {"records": [], "data_sha256": data_sha256}
        whole = (record for record in made["records"] if set(STABILITY_MEASURES) <= set(record))
        records: dict[Any, Any] = {tuple(record["weights_sha256"]): record for record in whole}
        return records if made["data_sha256"] == data_sha256 else {}
    except (DamagedError, KeyError) as error:
        print(f"{error}; it is made again", flush=True)
        return {}


def _compared(runs: list[RunConfig], store: Store, root: Path, known: dict) -> dict[tuple[str, str], dict[str, Any]]:
    """Records of the pairs of one setting's runs that are not in `known`."""
    folders = [root / run.runs_dir / run.run_id for run in runs]
    hashes = [load_run(folder, run.run_id)["weights_sha256"] for run, folder in zip(runs, folders, strict=True)]
    pairs = [(i, j) for i, j in itertools.combinations(range(len(runs)), 2) if (hashes[i], hashes[j]) not in known]
    used = {n for pair in pairs for n in pair}
    saes = {n: load_folder(folders[n]) for n in used}
    acts = {n: activity(sae, ordinary_rows(store)) for n, sae in saes.items()}
    records = {}
    for i, j in pairs:
        try:
            found = matched(saes[i], saes[j], acts[i], acts[j], given(runs[i], saes[i]))
        except ConfigError as error:  # all latents are dead: the setting has no row then
            print(f"{runs[i].run_id}, {runs[j].run_id}: {error}", flush=True)
            continue
        start = [
            movement(saes[n], _start(runs[n], saes[n]))[found.latents[:, side]].double().mean().item()
            for side, n in enumerate((i, j))
        ]
        records[hashes[i], hashes[j]] = {
            "run_ids": [runs[i].run_id, runs[j].run_id],
            "weights_sha256": [hashes[i], hashes[j]],
            **{name: getattr(found, name) for name in STABILITY_MEASURES if name != "start_cosine"},
            "start_cosine": sum(start) / 2,
        }
    return records


def ordinary_rows(store: Store) -> Iterator[Tensor]:
    """Batches of a store's validation rows without attention sinks."""
    limit = sink_norm(store.batches("val", BATCH_ROWS))
    for x in store.batches("val", BATCH_ROWS):
        yield x[~is_sink(x, limit)]


def given(run: RunConfig, sae: SAE) -> tuple[int, ...]:
    """Latents that are set, not trained: with sinks apart, 0 and 1 have the sinks' direction under every seed."""
    return (0, 1) if run.sinks == "apart" and bool((sae.W_dec[0] == -sae.W_dec[1]).all()) else ()


def _start(run: RunConfig, sae: SAE) -> SAE:
    return initial_sae(run, sae.d_in, torch.zeros(sae.d_in))


def again(run_dir: Path, other_dirs: list[Path], store: Store, config: RunConfig) -> dict[int, tuple[int, float]]:
    """{matched latent of a run: (number of other seeds with which it is stable, mean cosine of its matches)}."""
    sae = load_folder(run_dir)
    acts = activity(sae, ordinary_rows(store))
    counts: dict[int, tuple[int, float]] = {}
    for other in map(load_folder, other_dirs):
        found = matched(sae, other, acts, activity(other, ordinary_rows(store)), given(config, sae))
        for latent, stable, cosine in zip(
            found.latents[:, 0].tolist(), found.stable.tolist(), found.decoder.tolist(), strict=True
        ):
            count, total = counts.get(latent, (0, 0.0))
            counts[latent] = (count + stable, total + cosine / len(other_dirs))
    return counts
