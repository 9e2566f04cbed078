"""The runs' metrics as one tidy table, one row per run, and the CSV files made from it. Does not import torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from saegrid.config.grid import Grid
from saegrid.config.recipes import YOUNGER
from saegrid.config.run_config import RunConfig
from saegrid.errors import ResultsError
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
from saegrid.storage.checksums import SUMS, check_sums, sum_of, write_sum, write_sums

PUBLISHED = ["arch", "expansion", "k", "threshold", "l0", "val_mse", "nmse", "dead_pct", "delta_loss", "frac_rec_pct"]
"""Columns of the published `results_full.csv`, in its order."""
PROMPT_SUMS = ["run_id", "prompt", "template", "n_tokens", "ce_clean_sum", "ce_spliced_sum", "kl_sum"]
TABLES = ["results.csv", "results_full.csv", "results_tidy.csv", "results_prompts.csv", pca_table.FILE]


def tidy(runs: Grid | Iterable[str], runs_dir: str | Path = "runs") -> pd.DataFrame:
    """One row per run, in the order of `runs` (a grid, or run ids), with the columns `TIDY` and `source`.

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
    """Read all runs of a grid and write its CSV files. Returns their folder.

    Also writes the SHA-256 of each executed notebook, which is now final.
    """
    root = Path(root)
    runs_dir = root / (runs_dir or grid.runs_dir)
    results_dir = root / grid.results_dir
    df = tidy(grid, runs_dir)
    write_tables(df, results_dir, load_prompts(df, runs_dir), pca_table.load(grid, root))
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

    The first has MSE, NMSE and dead latents of BatchTopK and TopK; the second all metrics of all architectures: the
    published columns and the standard measures. Full precision; missing values are empty. `prompts` goes to
    `results_prompts.csv`: each run's losses on each prompt, for the intervals; `baseline` goes to
    `results_baselines.csv` (`saegrid.experiment.pca_table`).
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
    """Read `results_prompts.csv`; an older table has no `kl_sum`. Raises `ResultsError` if it is missing or damaged."""
    path = Path(results_dir) / "results_prompts.csv"
    try:
        with advising("make it again with `python -m saegrid tables`"):
            check_sums(path.parent, [path.name])
        prompts = pd.read_csv(path, dtype={"run_id": str, "template": str})
        return prompts.assign(kl_sum=prompts.get("kl_sum", math.nan))[PROMPT_SUMS]
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; `python -m saegrid tables` makes it") from None
    except (KeyError, ValueError, pd.errors.ParserError) as error:
        raise ResultsError(f"{path}: not a table of prompts: {error}") from None


def typed(df: pd.DataFrame) -> pd.DataFrame:
    """Set column types: whole numbers are integers, even if some are missing; a `k` or `threshold` of 0 is missing."""
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
