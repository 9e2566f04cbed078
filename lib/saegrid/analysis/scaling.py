"""How measures follow sizes: power laws of the loss, each step, decoder coherence over K. Free of torch."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from saegrid.analysis.intervals import t_interval
from saegrid.analysis.selection import matched, without_controls
from saegrid.config import settings

SIZES = {"d_sae": "latents", "k": "K", "n_train_rows": "training tokens"}
MEASURES = {"fvu_no_sink": "FVU without sinks", "kl": "KL", "delta_loss": "delta loss"}
"""Measures and their names; those that all runs have, and that are above 0 in each."""
AXES = {"d_sae": "expansion", "k": "k", "n_train_rows": "train_tokens"}
"""The parameter that sets each size."""


def exponents(df: pd.DataFrame) -> pd.DataFrame:
    """One row per measure and varying size: the slope of log(measure) over log(size), all sizes fitted together.

    Least squares over the runs. `low` and `high` bound the 95% t interval of a slope, which assumes independent
    deviations from the power law with equal variance. `spread` is the typical factor between a run and the fit. No
    rows for fewer than two runs per fitted parameter.
    """
    columns = ["measure", "size", "slope", "low", "high", "spread"]
    sizes = [name for name in SIZES if df[name].nunique() > 1]
    if len(df) < 2 * (len(sizes) + 1):
        return pd.DataFrame(columns=columns)
    x = np.column_stack([np.ones(len(df)), *(np.log(df[name].astype(float)) for name in sizes)])
    unscaled, df_left = np.linalg.inv(x.T @ x), len(df) - x.shape[1]
    rows = []
    for measure in _measures(df):
        y = np.log(df[measure].to_numpy(float))
        slopes = unscaled @ x.T @ y
        residuals = y - x @ slopes
        errors = np.sqrt(np.diag(unscaled) * (residuals @ residuals / df_left))
        for n, size in enumerate(sizes, start=1):
            slope, low, high, _ = t_interval(slopes[n], errors[n], df_left)
            rows.append([measure, size, slope, low, high, float(np.exp(np.std(residuals)))])
    return pd.DataFrame(rows, columns=columns)


def steps(df: pd.DataFrame) -> pd.DataFrame:
    """What each step of a size does, which a power law averages: one row per measure and two adjacent sizes.

    `factor` is the geometric mean, over `pairs` of runs that differ in nothing else, of the measure at size `large`
    divided by that at `small`; `low` and `high` bound its 95% t interval over the pairs (NaN for one pair).
    """
    rows = []
    for size in (name for name in SIZES if df[name].nunique() > 1):
        for small, large in itertools.pairwise(sorted(df[size].unique())):
            pairs = matched(df[df[size] == large], df[df[size] == small], AXES[size])
            for measure in _measures(df):
                logs = np.log(pairs[0][measure].to_numpy(float) / pairs[1][measure].to_numpy(float))
                if len(logs):
                    error = float(logs.std(ddof=1) / np.sqrt(len(logs))) if len(logs) > 1 else 0.0
                    bounds = np.exp(t_interval(float(logs.mean()), error, len(logs) - 1)[:3])
                    rows.append([measure, size, small, large, *bounds, len(logs)])
    return pd.DataFrame(rows, columns=["measure", "size", "small", "large", "factor", "low", "high", "pairs"])


def coherence_over_k(df: pd.DataFrame) -> pd.DataFrame:
    """Decoder coherence by K (means over seeds) of each setting that was run at three K or more, controls left out.

    Columns: `arch`, `label` (the setting without its K), `k`, `decoder_coherence`. No rows where it was not measured.
    """
    columns = ["arch", "label", "k", "decoder_coherence"]
    if "decoder_coherence" not in df:
        return pd.DataFrame(columns=columns)
    rows = without_controls(df).dropna(subset=["decoder_coherence", "k"])
    records = rows.to_dict("records")
    rows, also = rows.assign(rest=[settings.key(row, "k") for row in records]), settings.unusual(records)
    found = []
    for _, group in rows.groupby("rest", sort=False):
        if group["k"].nunique() > 2:
            values = settings.axes(group.iloc[0].to_dict())
            more = [f"{name.replace('_', ' ')} {values[name]}" for name in also]
            label = ", ".join([f"{values['arch']} {values['expansion']}x", str(values["recipe"]), *more])
            means = group.astype({"k": int}).groupby("k")["decoder_coherence"].mean()
            found += [(values["arch"], label, k, value) for k, value in means.items()]
    return pd.DataFrame(found, columns=columns)


def _measures(df: pd.DataFrame) -> list[str]:
    return [name for name in MEASURES if name in df and (df[name] > 0).all()]
