"""The runs' metrics as one tidy table, one row per run, and the CSV files made from it. Does not import torch."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout

from saegrid.config import settings
from saegrid.config.grid import Grid
from saegrid.config.recipes import YOUNGER
from saegrid.config.run_config import RunConfig
from saegrid.errors import DamagedError, ResultsError
from saegrid.experiment import pca_table
from saegrid.experiment.finished_run import (
    COUNTS,
    METRICS,
    NOTEBOOK,
    OPTIONAL,
    PARAMETERS,
    TEXT,
    TIDY,
    YOUNGER_NUMBERS,
    advising,
    load_prompts,
    load_run,
)
from saegrid.storage.atomic import write_text
from saegrid.storage.checksums import SUMS, check_sums, read_sealed, sum_of, write_sum, write_sums

PUBLISHED = ["arch", "expansion", "k", "threshold", "l0", "val_mse", "nmse", "dead_pct", "delta_loss", "frac_rec_pct"]
"""Columns of the published `results_full.csv`, in its order."""
PROMPT_SUMS = ["run_id", "prompt", "template", "n_tokens", "ce_clean_sum", "ce_spliced_sum", "kl_sum"]
STABILITY_FILE = "stability.csv"
MAKES = "`python -m saegrid tables GRID` makes it"
PAIRS = "stability.json"
"""In a store's folder: one record per pair of runs on it (`saegrid.experiment.stability`)."""
STABILITY_MEASURES = ["stable_pct", "stable_energy_pct", "matched_cosine", "random_cosine", "start_cosine"]
_BETWEEN = STABILITY_MEASURES[:3]  # those with an interval over seeds
_SETTING = ["name", *(name for name in PARAMETERS if name not in {"seed", *settings.MACHINE})]
_BOUNDS = [f"{name}_{end}" for name in _BETWEEN for end in ("low", "high")]
STABILITY = [*_SETTING, "d_sae", "n_train_rows", "seeds", "pairs", *STABILITY_MEASURES, *_BOUNDS]
"""Columns of `stability.csv`: one row per setting."""
TABLES = ["results.csv", "results_full.csv", "results_tidy.csv", "results_prompts.csv", pca_table.FILE, STABILITY_FILE]
_TEXTS = {*(name for name in PARAMETERS if RunConfig.model_fields[name].annotation is str), "arch"}


def tidy(runs: Grid | Iterable[str], runs_dir: str | Path = "runs") -> pd.DataFrame:
    """One row per run, in the order of `runs` (a grid, or run ids), with the columns `TIDY` and `source`.

    Raises `ResultsError` for the first run that has no complete metrics.
    """
    run_ids = [run.run_id for run in runs.runs()] if isinstance(runs, Grid) else list(runs)
    if not run_ids:
        raise ResultsError("results: no run to tabulate")
    rows = []
    for run_id in run_ids:
        rows.append(load_run(Path(runs_dir) / run_id, run_id))
    return typed(pd.DataFrame(rows, columns=TIDY).assign(source="own"))


def make(grid: Grid, root: str | Path = ".", runs_dir: str | Path | None = None) -> Path:
    """Read all runs of a grid and write its CSV files. Returns their folder.

    Also writes the SHA-256 of each executed notebook, which is now final.
    """
    root = Path(root)
    runs_dir = root / (runs_dir or grid.runs_dir)
    results_dir = root / grid.results_dir
    df = tidy(grid, runs_dir)
    write_tables(df, results_dir, load_prompts(df, runs_dir), pca_table.load(grid, root), stability(grid, root))
    for folder in (runs_dir / run_id for run_id in df["run_id"]):
        with contextlib.suppress(Timeout), FileLock(folder / ".lock", timeout=0):  # else it is being executed
            if (folder / NOTEBOOK).exists() and not sum_of(folder / NOTEBOOK).exists():
                write_sum(folder / NOTEBOOK)
    return results_dir


def write_tables(
    df: pd.DataFrame,
    results_dir: str | Path,
    prompts: pd.DataFrame | None = None,
    baseline: pd.DataFrame | None = None,
    stable: pd.DataFrame | None = None,
) -> None:
    """Write `results.csv`, `results_full.csv` (both as published) and `results_tidy.csv` (every column).

    The first has MSE, NMSE and dead latents of BatchTopK and TopK; the second all metrics of all architectures: the
    published columns and the standard measures. Full precision; missing values are empty. `prompts` goes to
    `results_prompts.csv`: each run's losses on each prompt, for the intervals; `baseline` goes to
    `results_baselines.csv` (`saegrid.experiment.pca_table`), `stable` to `stability.csv` (`stability`).
    """
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    by_k = df[df["arch"].isin(["BatchTopK", "TopK"])]
    own = [*(name for name in METRICS if name not in PUBLISHED), "kl"]
    tables = {
        "results.csv": by_k[["arch", "expansion", "k", "val_mse", "nmse", "dead_pct", "recipe", "seed", "run_id"]],
        "results_full.csv": df[[*PUBLISHED, "recipe", "seed", *own, "run_id"]],
        "results_tidy.csv": df[TIDY],
    }
    if prompts is not None:
        tables["results_prompts.csv"] = prompts.reindex(columns=PROMPT_SUMS)
    if baseline is not None:
        tables[pca_table.FILE] = baseline
    if stable is not None:
        tables[STABILITY_FILE] = stable
    for name, table in tables.items():
        write_text(results_dir / name, table.to_csv(index=False, lineterminator="\n"))
    write_sums(results_dir, tables)


def read_tidy(path: str | Path) -> pd.DataFrame:
    """Read `results_tidy.csv` (or the folder that it is in). Raises `ResultsError` if it is missing or incomplete.

    Adds the column `stable_pct`, the value of each run's setting, if there is a `stability.csv` beside it.
    """
    path = Path(path)
    path = path / "results_tidy.csv" if path.is_dir() else path
    texts = {*TEXT, *_TEXTS}
    try:
        df = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; {MAKES}") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table: {error}") from None
    younger = YOUNGER | dict.fromkeys(YOUNGER_NUMBERS, math.nan)
    df = df.assign(**{name: value for name, value in younger.items() if name not in df})
    missing = [name for name in TIDY if name not in df]
    if missing:
        raise ResultsError(f"{path}: lacks the columns {', '.join(missing)}; {MAKES}")
    for name in [*COUNTS, *METRICS]:
        if df[name].isna().any():
            raise ResultsError(f"{path}: {name} is missing for {df.loc[df[name].isna(), 'run_id'].iloc[0]}")
    if (path.parent / SUMS).exists():  # a table that was copied alone has none
        with advising(MAKES):
            check_sums(path.parent, [path.name])
    df[sorted(texts)] = df[sorted(texts)].fillna("")
    df = typed(df.assign(source="own"))
    stable = {settings.key(row): row["stable_pct"] for row in read_stability(path.parent).to_dict("records")}
    return df.assign(stable_pct=[stable.get(settings.key(row)) for row in df.to_dict("records")]) if stable else df


def stability(grid: Grid, root: str | Path = ".") -> pd.DataFrame:
    """One row per setting of which all pairs of seeds were compared: means over pairs, and intervals.

    Raises `ResultsError` for a damaged file.
    """
    root, rows = Path(root), []
    for runs in grid.seeds():
        path = root / runs[0].store_dir / runs[0].store_id / PAIRS
        try:
            records = read_sealed(path)["records"] if path.exists() else []
        except (DamagedError, KeyError) as error:
            raise ResultsError(f"{path}: {error}; delete the file, and it is made again") from None
        facts = {run.run_id: load_run(root / run.runs_dir / run.run_id, run.run_id) for run in runs}
        hashes = [facts[run.run_id]["weights_sha256"] for run in runs]
        by_pair = {tuple(record["weights_sha256"]): record for record in records}
        pairs = {(i, j): by_pair.get((hashes[i], hashes[j])) for i, j in itertools.combinations(range(len(runs)), 2)}
        if None in pairs.values():
            continue
        row = {name: facts[runs[0].run_id][name] for name in [*_SETTING, "d_sae", "n_train_rows"]}
        row |= {"seeds": len(runs), "pairs": len(pairs)}
        for name in STABILITY_MEASURES:
            values = {pair: record[name] for pair, record in pairs.items() if record}
            row[name] = sum(values.values()) / len(values)
            if name in _BETWEEN:
                low, high = over_pairs(values, len(runs))
                ends = (low, high) if name == "matched_cosine" else (max(low, 0.0), min(high, 100.0))
                row |= dict(zip((f"{name}_low", f"{name}_high"), ends, strict=True))
        rows.append(row)
    return pd.DataFrame(rows, columns=STABILITY)


def over_pairs(values: dict[tuple[int, int], float], seeds: int) -> tuple[float, float]:
    """95% interval of a mean over all pairs of seeds: a jackknife over seeds, with t of seeds - 1 degrees of freedom.

    Pairs that share a seed are not independent, so a seed is left out with all its pairs. NaN below 3 seeds, and if
    all pairs are equal (such as 0%), which says nothing about the spread. Simulated coverage for 3 to 5 seeds: 95% if
    the two seeds determine a pair's value, up to 99% if pairs vary independently.
    """
    if seeds < 3:
        return math.nan, math.nan
    from scipy.stats import t

    left = np.array([np.mean([v for pair, v in values.items() if seed not in pair]) for seed in range(seeds)])
    error = math.sqrt((seeds - 1) / seeds * np.square(left - left.mean()).sum())
    if not error:
        return math.nan, math.nan
    mean, half = float(np.mean(list(values.values()))), float(t.ppf(0.975, seeds - 1)) * error
    return mean - half, mean + half


def read_stability(results_dir: str | Path) -> pd.DataFrame:
    """Read `stability.csv`; no rows if it is missing. Raises `ResultsError` if it is damaged."""
    path = Path(results_dir) / STABILITY_FILE
    if not path.exists():
        return pd.DataFrame(columns=STABILITY)
    texts = {name for name in _SETTING if name in RunConfig.model_fields} & _TEXTS | {"name"}
    if (path.parent / SUMS).exists():
        with advising(MAKES):
            check_sums(path.parent, [path.name])
    try:
        df = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
        df = df.assign(**{name: value for name, value in YOUNGER.items() if name not in df})[STABILITY]
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table of stability: {error}") from None
    df[sorted(texts)] = df[sorted(texts)].fillna("")
    return typed(df)


def read_prompts(results_dir: str | Path) -> pd.DataFrame:
    """Read `results_prompts.csv`; an older table has no `kl_sum`. Raises `ResultsError` if it is missing or damaged."""
    path = Path(results_dir) / "results_prompts.csv"
    try:
        with advising(MAKES):
            check_sums(path.parent, [path.name])
        prompts = pd.read_csv(path, dtype={"run_id": str, "template": str})
        return prompts.assign(kl_sum=prompts.get("kl_sum", math.nan))[PROMPT_SUMS]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; {MAKES}") from None
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table of prompts: {error}") from None


def typed(df: pd.DataFrame) -> pd.DataFrame:
    """Set column types: whole numbers are integers, even if some are missing; a `k` or `threshold` of 0 is missing."""
    df = df.copy()
    for name in ["expansion", "seed", "seeds", "pairs", *COUNTS]:
        if name in df:
            df[name] = df[name].astype(int)
    df["k"] = pd.to_numeric(df["k"]).replace(0, pd.NA).astype("Int64")
    for name in ["threshold", *OPTIONAL]:
        if name in df:
            df[name] = pd.to_numeric(df[name]).astype(float)
    df["threshold"] = df["threshold"].replace(0.0, math.nan)
    return df
