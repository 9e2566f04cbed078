"""The runs' metrics as one tidy table, the CSV files made of it, and the published table: free of torch.

A row is one run. Nothing is parsed back from a file name or a log: every value comes from `metrics.json`.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from saegrid.atomic import write_text
from saegrid.config import PLACES, RunConfig
from saegrid.errors import SaegridError
from saegrid.grid import Grid
from saegrid.recipes import YOUNGER

PARAMETERS = [name for name in RunConfig.model_fields if name not in PLACES]
COUNTS = ["d_in", "d_sae", "n_train_rows", "n_val_rows", "n_eval_prompts", "n_eval_tokens", "steps", "best_epoch"]
METRICS = [
    *("val_mse", "val_mse_batch", "nmse", "fvu", "fvu_no_sink", "sink_pct", "l0", "l0_eval", "dead_pct"),
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_loss", "frac_rec_pct"),
    *("loss_recovered_zero", "loss_recovered_mean"),
]
"""Numbers that every run must have; a row without one stops the tables."""
NO_SINK = ["l0_no_sink", "dead_pct_no_sink"]
OPTIONAL = ["inference_threshold", "theta_over_rms", *NO_SINK]
"""Numbers that only some architectures, or only younger tables, have."""
HASHES = ["data_sha256", "model_sha256", "weights_sha256"]
TEXT = ["run_id", "name", "store_id", *HASHES, "code_version", "torch_version"]
TIDY = ["run_id", "name", *PARAMETERS, *COUNTS, *OPTIONAL, *METRICS, *TEXT[2:]]
PUBLISHED = ["arch", "expansion", "k", "threshold", "l0", "val_mse", "nmse", "dead_pct", "delta_loss", "frac_rec_pct"]
"""Columns of the published `results_full.csv`, in its order."""
_HEX = re.compile(r"[0-9a-f]{8,64}")


class ResultsError(SaegridError):
    """A run's results or a table that is missing, incomplete or damaged."""


def load_run(run_dir: str | Path) -> dict[str, Any]:
    """The tidy row of one run: its `metrics.json`, checked.

    Raises:
        ResultsError: the file is missing or no JSON object, a column is missing, a metric is no finite number, or a
            hash is none.
    """
    path = Path(run_dir) / "metrics.json"
    row = YOUNGER | dict.fromkeys(NO_SINK) | _read_json(path)
    missing = [name for name in TIDY if name not in row]
    if missing:
        raise ResultsError(f"{path}: lacks {', '.join(missing)}; delete the folder and run it again")
    for name in [*COUNTS, *METRICS]:
        if not isinstance(row[name], (int, float)) or isinstance(row[name], bool) or not math.isfinite(row[name]):
            raise ResultsError(f"{path}: {name} = {row[name]!r}, needs a finite number")
    for name in HASHES:
        if not isinstance(row[name], str) or not _HEX.fullmatch(row[name]):
            raise ResultsError(f"{path}: {name} = {row[name]!r}, needs a SHA-256 in hexadecimal")
    return {name: row[name] for name in TIDY}


def tidy(runs: Grid | Iterable[str], runs_dir: str | Path = "runs") -> pd.DataFrame:
    """One row a run, in the order of `runs` (a grid, or run ids), with the columns `TIDY` and `source`.

    Raises `ResultsError` for the first run that has no complete metrics.
    """
    run_ids = [run.run_id for run in runs.runs()] if isinstance(runs, Grid) else list(runs)
    if not run_ids:
        raise ResultsError("results: no run was named")
    rows = []
    for run_id in run_ids:
        row = load_run(Path(runs_dir) / run_id)
        if row["run_id"] != run_id:
            raise ResultsError(f"{runs_dir}/{run_id}/metrics.json: belongs to the run {row['run_id']!r}")
        rows.append(row)
    return _typed(pd.DataFrame(rows, columns=TIDY).assign(source="own"))


def make(grid: Grid, root: str | Path = ".", runs_dir: str | Path | None = None) -> Path:
    """Read all runs of a grid and write its three CSV files. Returns the folder that they are in."""
    root = Path(root)
    runs_dir = root / (runs_dir or grid.constants.get("runs_dir", "runs"))
    results_dir = root / grid.results_dir
    write_tables(tidy(grid, runs_dir), results_dir)
    return results_dir


def write_tables(df: pd.DataFrame, results_dir: str | Path) -> None:
    """Write `results.csv`, `results_full.csv` (both as published) and `results_tidy.csv` (every column).

    The first has MSE, NMSE and dead latents of BatchTopK and TopK; the second all metrics of all architectures, the
    field's own measures beside the published columns. Full precision; missing values are empty.
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
    for name, table in tables.items():
        write_text(results_dir / name, table.to_csv(index=False, lineterminator="\n"))


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
    younger = YOUNGER | dict.fromkeys(NO_SINK, math.nan)
    df = df.assign(**{name: value for name, value in younger.items() if name not in df})
    missing = [name for name in TIDY if name not in df]
    if missing:
        raise ResultsError(f"{path}: lacks the columns {', '.join(missing)}; `make report` makes it anew")
    for name in [*COUNTS, *METRICS]:
        if df[name].isna().any():
            raise ResultsError(f"{path}: {name} is missing for {df.loc[df[name].isna(), 'run_id'].iloc[0]}")
    df[sorted(texts)] = df[sorted(texts)].fillna("")
    return _typed(df.assign(source="own"))


def load_prompts(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """The per-prompt splice sums of all runs of `df`, long-form: `run_id` and the columns of `prompts.csv`."""
    return _load_csvs(df, runs_dir, "prompts.csv")


def load_latents(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """Firing counts and activations of all latents of all runs of `df`, long-form, with the run's `n_val_rows`."""
    return _load_csvs(df, runs_dir, "latents.csv").merge(df[["run_id", "n_val_rows"]], on="run_id")


def load_positions(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """Squared reconstruction error by token position of all runs of `df`, long-form."""
    return _load_csvs(df, runs_dir, "positions.csv")


def load_curves(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """Learning curves of all runs of `df`, long-form: one row an epoch."""
    frames = []
    for run_id, path in _files(df, runs_dir, "metrics.jsonl"):
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except ValueError as error:
            raise ResultsError(f"{path}: not JSON: {error}") from None
        frames.append(pd.DataFrame(lines).assign(run_id=run_id))
    return _with_axes(pd.concat(frames, ignore_index=True), df)


def load_timing(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """Seconds, rows/s and machine of all runs of `df`: one row a run."""
    rows = [_read_json(path) | {"run_id": run_id} for run_id, path in _files(df, runs_dir, "timing.json")]
    return _with_axes(pd.DataFrame(rows), df)


def published() -> pd.DataFrame:
    """The nine rows that the published model card prints, with `source="published"` and the derived `d_sae`.

    The published residual stream has `d_in` = 896.
    """
    df = pd.DataFrame(_published_text())
    numbers = df.columns.drop("arch")
    df[numbers] = df[numbers].apply(pd.to_numeric)
    names = [run_name(row) for row in df.to_dict("records")]
    return _typed(df.assign(source="published", name=names, d_in=896, d_sae=df["expansion"].astype(int) * 896))


def run_name(row: Mapping[str, Any]) -> str:
    """The published file name of a row, without its ending: `BatchTopK_exp8x_k220`, `JumpReLU_exp8x_t0.5`."""
    sparsity = f"t{row['threshold']:g}" if row["arch"] == "JumpReLU" else f"k{row['k']:g}"
    return f"{row['arch']}_exp{row['expansion']:g}x_{sparsity}"


def published_intervals() -> pd.DataFrame:
    """What each published row tells about its setting, by the rounding of its printed numbers.

    Columns, as `_low` and `_high`: `var` is MSE / NMSE, the pooled variance; `ce` is f * delta / (1 - f), the clean
    cross-entropy in nats if f = frac_rec is CE_clean / CE_spliced; `usual` is delta / (1 - f), the loss between clean
    and ablated in nats if f were the field's fraction of loss recovered.
    """
    rows = []
    for row in _published_text():
        mse, nmse, delta = (_rounding(row[name]) for name in ("val_mse", "nmse", "delta_loss"))
        frac = tuple(bound / 100 for bound in _rounding(row["frac_rec_pct"]))
        corners = [(f, d) for f in frac for d in delta]
        usual = [d / (1 - f) for f, d in corners]
        clean = [f * d / (1 - f) for f, d in corners]
        rows.append(
            {"arch": row["arch"], "expansion": row["expansion"], "k": row["k"], "threshold": row["threshold"]}
            | {"var_low": mse[0] / nmse[1], "var_high": mse[1] / nmse[0]}
            | {"ce_low": min(clean), "ce_high": max(clean), "usual_low": min(usual), "usual_high": max(usual)}
        )
    df = pd.DataFrame(rows)
    numbers = df.columns.drop("arch")
    df[numbers] = df[numbers].apply(pd.to_numeric)
    return _typed(df)


def meet(intervals: pd.DataFrame, name: str) -> tuple[float, float]:
    """The intersection of the rows' bounds `{name}_low` and `{name}_high`; they don't meet if low is above high."""
    return float(intervals[f"{name}_low"].max()), float(intervals[f"{name}_high"].min())


def _published_text() -> list[dict[str, str]]:
    text = resources.files("saegrid").joinpath("published_results.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _rounding(printed: str) -> tuple[float, float]:
    """The smallest and largest number that rounds to `printed`."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return float(printed) - half, float(printed) + half


def _typed(df: pd.DataFrame) -> pd.DataFrame:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; the run is not finished, `make report` finishes it") from None
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ResultsError(f"{path}: not a JSON object")
    return row


def _files(df: pd.DataFrame, runs_dir: str | Path, name: str) -> list[tuple[str, Path]]:
    files = [(run_id, Path(runs_dir) / run_id / name) for run_id in df["run_id"]]
    for _, path in files:
        if not path.is_file():
            raise ResultsError(f"{path}: no such file; delete the folder and run it again")
    return files


def _load_csvs(df: pd.DataFrame, runs_dir: str | Path, name: str) -> pd.DataFrame:
    frames = [pd.read_csv(path).assign(run_id=run_id) for run_id, path in _files(df, runs_dir, name)]
    return _with_axes(pd.concat(frames, ignore_index=True), df)


def _with_axes(long: pd.DataFrame, df: pd.DataFrame) -> pd.DataFrame:
    axes = ["run_id", "name", "arch", "expansion", "k", "threshold", "seed"]
    return df[axes].merge(long.drop(columns=[c for c in axes[1:] if c in long]), on="run_id")
