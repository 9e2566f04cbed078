"""How loss follows dictionary size, K and tokens: power laws fitted to a grid's runs. Free of torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from saegrid.analysis.intervals import DRAWS, SEED, central

SIZES = {"d_sae": "latents", "k": "K", "n_train_rows": "training tokens"}
MEASURES = {"fvu_no_sink": "FVU without sinks", "delta_loss": "delta loss"}


def exponents(df: pd.DataFrame) -> pd.DataFrame:
    """One row per measure and varying size: the slope of log(measure) over log(size), all sizes fitted together.

    Least squares over the runs; `low` and `high` are the central 95% interval of a bootstrap over runs, `spread` is the
    typical factor between a run and the fit.

    Raises:
        ValueError: fewer than two runs per fitted parameter, or a measure that is not above 0.
    """
    sizes = [name for name in SIZES if df[name].nunique() > 1]
    if len(df) < 2 * (len(sizes) + 1) or not (df[[*MEASURES]] > 0).all(axis=None):
        raise ValueError("scaling: too few runs, or a measure that is not above 0")
    x = np.column_stack([np.ones(len(df)), *(np.log(df[name].astype(float)) for name in sizes)])
    picks = np.random.default_rng(SEED).integers(len(df), size=(DRAWS, len(df)))
    rows = []
    for measure in MEASURES:
        y = np.log(df[measure].to_numpy(float))
        slopes = _fit(x, y)
        drawn = np.array([_fit(x[pick], y[pick]) for pick in picks])
        spread = float(np.exp(np.std(y - x @ slopes)))
        for n, size in enumerate(sizes, start=1):
            low, high = central(drawn[:, n])
            rows.append([measure, size, slopes[n], low, high, spread])
    return pd.DataFrame(rows, columns=["measure", "size", "slope", "low", "high", "spread"])


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slopes: np.ndarray = np.linalg.lstsq(x, y, rcond=None)[0]
    return slopes
