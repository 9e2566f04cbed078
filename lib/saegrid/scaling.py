"""How loss follows dictionary size, K and tokens: power laws fitted to a grid's runs. Free of torch."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from saegrid.intervals import DRAWS, SEED, central
from saegrid.style import ABOVE, INK, log_axes, styled
from saegrid.tables import Markdown, header, html_table, number

SIZES = {"d_sae": "dictionary size", "k": "K", "n_train_rows": "training tokens"}
MEASURES = ["fvu_no_sink", "delta_loss"]


def exponents(df: pd.DataFrame) -> pd.DataFrame:
    """One row a measure: the slopes of log(measure) over the logs of all sizes that vary, fitted together.

    Least squares over the runs; the 95% intervals by a bootstrap over them. Columns: `measure`, the sizes that vary,
    each as `slope [low, high]`, and `spread`, the typical factor by which a run misses the fit.

    Raises:
        ValueError: fewer runs than two for each number that is fitted, or a measure that is not above 0.
    """
    sizes = [name for name in SIZES if df[name].nunique() > 1]
    if len(df) < 2 * (len(sizes) + 1) or not (df[MEASURES] > 0).all(axis=None):
        raise ValueError("scaling: too few runs, or a measure that is not above 0")
    x = np.column_stack([np.ones(len(df)), *(np.log(df[name].astype(float)) for name in sizes)])
    picks = np.random.default_rng(SEED).integers(len(df), size=(DRAWS, len(df)))
    rows = []
    for measure in MEASURES:
        y = np.log(df[measure].to_numpy(float))
        slopes = _fit(x, y)
        drawn = np.array([_fit(x[pick], y[pick]) for pick in picks])
        spread = float(np.exp(np.std(y - x @ slopes)))
        row = {"measure": header(measure)}
        for n, name in enumerate(sizes, start=1):
            low, high = central(drawn[:, n])
            row[name] = f"{_signed(slopes[n])} [{_signed(low)}, {_signed(high)}]"
        rows.append(row | {"spread": f"{spread:.2f}x"})
    return pd.DataFrame(rows)


def exponent_table(df: pd.DataFrame) -> Markdown:
    """The slopes as a table of a page."""
    table = exponents(df).rename(columns={name: f"over {title}" for name, title in SIZES.items()})
    table = table.rename(columns={"measure": "Measure", "spread": "A run misses the fit by"})
    caption = (
        f"Exponents fitted to {len(df)} runs, all sizes at once, with 95% intervals by a bootstrap over the runs: "
        "−0.5 means that four times the size halves the measure."
    )
    return html_table(table, list(table.columns), caption=caption, mark_best=False)


@styled
def curves(df: pd.DataFrame, *, y: str, x: str, by: str, ax: Axes | None = None) -> Axes:
    """A measure over one size, one line for each value of another (means over all else), both axes logarithmic."""
    groups = list(df.groupby(by))
    for n, (value, group) in enumerate(groups):
        line = group.groupby(x)[y].mean()
        shade = 0.35 + 0.65 * (n + 1) / len(groups)
        ax.plot(line.index, line, color=INK, alpha=shade, marker="osD^vP"[n % 6], label=f"{number(value, by)}")
    log_axes(ax, sorted(df[x].unique()))
    ax.set_xlabel(header(x))
    ax.set_ylabel(header(y))
    ax.legend(title=header(by), ncols=4, **ABOVE)
    return ax


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(x, y, rcond=None)[0]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
