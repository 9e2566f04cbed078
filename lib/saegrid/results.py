"""The runs' metrics as one tidy table, a row a run, and the CSV files made of it: free of torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from saegrid import baselines
from saegrid.atomic import write_text
from saegrid.config import RunConfig
from saegrid.errors import ResultsError
from saegrid.grid import Grid
from saegrid.recipes import YOUNGER
from saegrid.records import (
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
from saegrid.sealed import SUMS, check_sums, sum_of, write_sum, write_sums

PUBLISHED = ["arch", "expansion", "k", "threshold", "l0", "val_mse", "nmse", "dead_pct", "delta_loss", "frac_rec_pct"]
"""Columns of the published `results_full.csv`, in its order."""
DENSE_SHARE_PCT = 10.0
"""A run that fires at least this share of its latents is dense: it is no candidate for "best" ("firing 10-45% of its
latents" is what the published card calls not sparse). Fixed before the results."""
PROMPT_SUMS = ["run_id", "prompt", "template", "n_tokens", "ce_clean_sum", "ce_spliced_sum"]
TABLES = ["results.csv", "results_full.csv", "results_tidy.csv", "results_prompts.csv", baselines.FILE]


def tidy(runs: Grid | Iterable[str], runs_dir: str | Path = "runs") -> pd.DataFrame:
    """One row a run, in the order of `runs` (a grid, or run ids), with the columns `TIDY` and `source`.

    Raises `ResultsError` for the first run that has no complete metrics.
    """
    run_ids = [run.run_id for run in runs.runs()] if isinstance(runs, Grid) else list(runs)
    if not run_ids:
        raise ResultsError("results: no run was named")
    rows = []
    for run_id in run_ids:
        rows.append(load_run(Path(runs_dir) / run_id, run_id))
    return typed(pd.DataFrame(rows, columns=TIDY).assign(source="own"))


def make(grid: Grid, root: str | Path = ".", runs_dir: str | Path | None = None) -> Path:
    """Read all runs of a grid and write its CSV files. Returns the folder that they are in.

    The executed notebooks, which nothing writes to any more, get their SHA-256 beside them.
    """
    root = Path(root)
    runs_dir = root / (runs_dir or grid.runs_dir)
    results_dir = root / grid.results_dir
    df = tidy(grid, runs_dir)
    write_tables(df, results_dir, load_prompts(df, runs_dir), baselines.load(grid, root))
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
) -> None:
    """Write `results.csv`, `results_full.csv` (both as published) and `results_tidy.csv` (every column).

    The first has MSE, NMSE and dead latents of BatchTopK and TopK; the second all metrics of all architectures, the
    field's own measures beside the published columns. Full precision; missing values are empty. `prompts` goes to
    `results_prompts.csv`: the losses of each run on each prompt, from which the intervals follow; `baseline` to
    `results_baselines.csv` (`saegrid.baselines`).
    """
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    by_k = df[df["arch"].isin(["BatchTopK", "TopK"])]
    own = [name for name in METRICS if name not in PUBLISHED]
    tables = {
        "results.csv": by_k[["arch", "expansion", "k", "val_mse", "nmse", "dead_pct", "recipe", "seed", "run_id"]],
        "results_full.csv": df[[*PUBLISHED, "recipe", "seed", *own, "run_id"]],
        "results_tidy.csv": df[TIDY],
    }
    if prompts is not None:
        tables["results_prompts.csv"] = prompts[PROMPT_SUMS]
    if baseline is not None:
        tables[baselines.FILE] = baseline
    for name, table in tables.items():
        write_text(results_dir / name, table.to_csv(index=False, lineterminator="\n"))
    write_sums(results_dir, tables)


def read_tidy(path: str | Path) -> pd.DataFrame:
    """Read `results_tidy.csv` (or the folder that it is in). Raises `ResultsError` if it is missing or incomplete."""
    path = Path(path)
    path = path / "results_tidy.csv" if path.is_dir() else path
    texts = {*TEXT, *(name for name in PARAMETERS if RunConfig.model_fields[name].annotation is str), "arch"}
    try:
        df = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; `make report` makes it") from None
    except (ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table: {error}") from None
    younger = YOUNGER | dict.fromkeys(YOUNGER_NUMBERS, math.nan)
    df = df.assign(**{name: value for name, value in younger.items() if name not in df})
    missing = [name for name in TIDY if name not in df]
    if missing:
        raise ResultsError(f"{path}: lacks the columns {', '.join(missing)}; `make report` makes it anew")
    for name in [*COUNTS, *METRICS]:
        if df[name].isna().any():
            raise ResultsError(f"{path}: {name} is missing for {df.loc[df[name].isna(), 'run_id'].iloc[0]}")
    if (path.parent / SUMS).exists():  # a table that was copied alone has none
        with advising("make it again with `python -m saegrid tables`"):
            check_sums(path.parent, [path.name])
    df[sorted(texts)] = df[sorted(texts)].fillna("")
    return typed(df.assign(source="own"))


def read_prompts(results_dir: str | Path) -> pd.DataFrame:
    """Read `results_prompts.csv`. Raises `ResultsError` if it is missing or damaged."""
    path = Path(results_dir) / "results_prompts.csv"
    try:
        with advising("make it again with `python -m saegrid tables`"):
            check_sums(path.parent, [path.name])
        return pd.read_csv(path, dtype={"run_id": str, "template": str})[PROMPT_SUMS]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; `python -m saegrid tables` makes it") from None
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table of prompts: {error}") from None


def candidates(df: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be called best: those that fire less than `DENSE_SHARE_PCT` of their latents.

    One rule for the recommendation, the Pareto sets and the stars in tables. Where no row is that sparse, or d_sae is
    not known, all rows. K stands in where L0 was not printed.
    """
    if "d_sae" not in df:
        return df
    l0 = df["l0"] if "k" not in df else df["l0"].fillna(pd.to_numeric(df["k"]).astype(float))
    sparse = df[100 * l0 / df["d_sae"] < DENSE_SHARE_PCT]
    return sparse if len(sparse) else df


def same_settings(own: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(own and other rows of every setting that both hold, one behind the other; the other rows that stand alone).

    A setting is architecture, expansion, K and threshold; a threshold in another unit than the activations' is another,
    and so is another recipe than the published one.
    """
    keys = ["arch", "expansion", "k", "threshold"]
    if "recipe" in own:
        own = own[own["recipe"] == "published"]
    if "threshold_unit" in own:
        own = own[own["threshold"].isna() | (own["threshold_unit"] == "absolute")]
    own_keys, other_keys = (
        [tuple("" if pd.isna(value) else value for value in row) for row in rows[keys].itertuples(index=False)]
        for rows in (own, other)
    )
    shared = [key for key in dict.fromkeys(other_keys) if key in set(own_keys)]
    both = pd.concat([own.assign(_key=own_keys), other.assign(_key=other_keys)], ignore_index=True)
    both = both[both["_key"].isin(shared)].assign(_order=lambda rows: rows["_key"].map(shared.index))
    both = both.sort_values("_order", kind="stable").drop(columns=["_key", "_order"])
    return both, other[[key not in shared for key in other_keys]]


def typed(df: pd.DataFrame) -> pd.DataFrame:
    """Whole numbers as such even where they may be missing; 0 means "not given" in `k` and `threshold`."""
    df = df.copy()
    for name in ["expansion", "seed", *COUNTS]:
        if name in df:
            df[name] = df[name].astype(int)
    df["k"] = pd.to_numeric(df["k"]).replace(0, pd.NA).astype("Int64")
    for name in ["threshold", *OPTIONAL]:
        if name in df:
            df[name] = pd.to_numeric(df[name]).astype(float)
    df["threshold"] = df["threshold"].replace(0.0, math.nan)
    return df
