"""Read a finished run's folder, each file checked against its recorded hash. Does not import torch.

Every number of a run comes from its `metrics.json`, none from a file name or a log.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from saegrid.config.recipes import YOUNGER
from saegrid.config.run_config import PLACES, RunConfig, make_config
from saegrid.errors import DamagedError, ResultsError
from saegrid.storage.checksums import check_sums, checked_bytes, numbered_json_lines, read_json, read_sealed

PARAMETERS = [name for name in RunConfig.model_fields if name not in PLACES]
COUNTS = ["d_in", "d_sae", "n_train_rows", "n_val_rows", "n_eval_prompts", "n_eval_tokens", "steps", "best_epoch"]
METRICS = [
    *("val_mse", "val_mse_batch", "nmse", "fvu", "fvu_no_sink", "sink_pct", "l0", "l0_eval", "dead_pct"),
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "delta_loss", "frac_rec_pct"),
    *("loss_recovered_zero", "loss_recovered_mean"),
]
"""Numbers that every run must have; a row without one stops the tables."""
YOUNGER_NUMBERS = ["l0_no_sink", "dead_pct_no_sink", "fvu_eval", "kl", "decoder_coherence"]
OPTIONAL = ["inference_threshold", "theta_over_rms", *YOUNGER_NUMBERS]
"""Numbers that only some architectures, or only newer tables, have."""
HASHES = ["data_sha256", "model_sha256", "weights_sha256"]
TEXT = ["run_id", "name", "store_id", *HASHES, "code_version", "torch_version"]
TIDY = ["run_id", "name", *PARAMETERS, *COUNTS, *OPTIONAL, *METRICS, *TEXT[2:]]
RUN_FILES = ["metrics.jsonl", "latents.csv", "positions.csv", "prompts.csv"]
"""Files of a run, besides `metrics.json`, that the report reads."""
NOTEBOOK = "train.ipynb"
"""A run's executed notebook, which the workflow puts into its folder."""
SET_ASIDE = "metrics.json.aside"
"""Metrics of a complete run, set aside until its notebook is executed again, which restores them."""
MEND = "`python -m saegrid mend GRID` drops it, and the next run makes it again"
_HEX = re.compile(r"[0-9a-f]{8,64}")


def metrics_of(row: Mapping[str, Any]) -> list[str]:
    """The metrics that a run has: `METRICS`, and `kl` unless an older version made the run."""
    return [*METRICS, "kl"] if _is_finite(row["kl"]) else METRICS


@contextlib.contextmanager
def advising(advice: str = MEND) -> Iterator[None]:
    """Turn a `DamagedError` inside this block into a `ResultsError` that says what to do."""
    try:
        yield
    except DamagedError as error:
        raise ResultsError(str(error), advice) from None


def load_run(run_dir: str | Path, run_id: str = "") -> dict[str, Any]:
    """The tidy row of one run, from its `metrics.json`; all of the run's files are checked against `SHA256SUMS`.

    Args:
        run_id: the run that the results must belong to.

    Raises:
        ResultsError: the file is missing or not a JSON object, a column is missing, a metric is not a finite number,
            a hash is invalid, the results are another run's, or a file has changed since the run.
    """
    path = Path(run_dir) / "metrics.json"
    row: dict[str, Any] = YOUNGER | dict.fromkeys(YOUNGER_NUMBERS) | _read_json(path)
    missing = [name for name in TIDY if name not in row]
    if missing:
        raise ResultsError(f"{path}: lacks {', '.join(missing)}; delete the folder and run it again")
    for name in [*COUNTS, *METRICS]:
        if not _is_finite(row[name]):
            raise ResultsError(f"{path}: {name} = {row[name]!r}: must be a finite number")
    for name in HASHES:
        if not isinstance(row[name], str) or not _HEX.fullmatch(row[name]):
            raise ResultsError(f"{path}: {name} = {row[name]!r}: must be a SHA-256 in hexadecimal")
    if run_id and row["run_id"] != run_id:
        raise ResultsError(f"{path}: belongs to the run {row['run_id']!r}")
    with advising():
        check_sums(path.parent, [path.name, *RUN_FILES])
    return {name: row[name] for name in TIDY}


def check_run(run_dir: str | Path, run_id: str) -> None:
    """Check all of a finished run's files, its times too, against what it recorded. Raises `ResultsError`."""
    load_run(run_dir, run_id)
    _timing(Path(run_dir) / "timing.json", run_id)


def load_config(run_dir: str | Path, run_id: str, **places: str) -> RunConfig:
    """The config that a run started with, with its chosen kernel, precision and threads; `places`: its current folders.

    Raises:
        DamagedError: the file is missing, has changed, or belongs to another run.
    """
    path = Path(run_dir) / "config.json"
    recorded = read_sealed(path)
    if recorded.pop("run_id", None) != run_id:
        raise DamagedError(f"{path}: damaged (another run's)")
    return make_config(**YOUNGER | recorded | places)


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
    """Learning curves of all runs of `df`, long-form: one row per epoch."""
    frames = []
    for run_id, path in _files(df, runs_dir, "metrics.jsonl"):
        with advising():
            lines = [line for _, line in numbered_json_lines(path, checked_bytes(path))]
        frames.append(pd.DataFrame(lines).assign(run_id=run_id))
    return _with_axes(pd.concat(frames, ignore_index=True), df)


def load_timing(df: pd.DataFrame, runs_dir: str | Path) -> pd.DataFrame:
    """Seconds, rows/s and machine of all runs of `df`: one row per run."""
    rows = [_timing(path, run_id) for run_id, path in _files(df, runs_dir, "timing.json")]
    return _with_axes(pd.DataFrame(rows), df)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ResultsError(f"{path}: no such file: the run has not finished; run `snakemake` with its grid file")
    with advising():
        return read_json(path)


def _timing(path: Path, run_id: str) -> dict[str, Any]:
    with advising():
        times = read_sealed(path)
        if times.get("run_id") != run_id:
            raise DamagedError(f"{path}: belongs to the run {times.get('run_id')!r}")
    return times


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _files(df: pd.DataFrame, runs_dir: str | Path, name: str) -> list[tuple[str, Path]]:
    files = [(run_id, Path(runs_dir) / run_id / name) for run_id in df["run_id"]]
    for _, path in files:
        if not path.is_file():
            raise ResultsError(f"{path}: no such file", MEND)
    return files


def _load_csvs(df: pd.DataFrame, runs_dir: str | Path, name: str) -> pd.DataFrame:
    frames = []
    for run_id, path in _files(df, runs_dir, name):
        with advising():
            content = checked_bytes(path)
        try:
            frames.append(pd.read_csv(io.BytesIO(content)).assign(run_id=run_id))
        except (ValueError, pd.errors.ParserError) as error:
            raise ResultsError(f"{path}: not a table: {error}", MEND) from None
    return _with_axes(pd.concat(frames, ignore_index=True), df)


def _with_axes(long: pd.DataFrame, df: pd.DataFrame) -> pd.DataFrame:
    axes = ["run_id", "name", "arch", "expansion", "k", "threshold", "recipe", "seed"]
    return df[axes].merge(long.drop(columns=[c for c in axes[1:] if c in long]), on="run_id")
