"""How loss follows dictionary size, K and tokens, as sentences, figures and a table."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.numbers import change, header, number
from saegrid.analysis.scaling import MEASURES, SIZES
from saegrid.report.figures.style import ABOVE, INK, log_axes, styled
from saegrid.report.tables import Markdown, html_table


def exponent_table(found: pd.DataFrame, runs: int) -> Markdown:
    """The slopes (`exponents`) of `runs` runs as a table."""
    rows = []
    for measure, those in found.groupby("measure", sort=False):
        slopes = {f"over {SIZES[row.size]}": change(row.slope, row.low, row.high, 2) for row in those.itertuples()}
        rows.append(
            {"Measure": header(measure), **slopes, "A run misses the fit by": f"{those['spread'].iloc[0]:.2f}x"}
        )
    table = pd.DataFrame(rows)
    caption = (
        f"Exponents fitted to {runs} runs, all sizes at once, with 95% t intervals over the runs: "
        "−0.5 means that four times the size halves the measure. More tokens are more steps, too: epochs and batch are "
        "the same."
    )
    return html_table(table, list(table.columns), caption=caption, mark_best=False)


def step_table(found: pd.DataFrame) -> Markdown:
    """Each step from one size to the next (`steps`) as a table: the factor on each measure."""
    rows = []
    for (size, small, large), those in found.groupby(["size", "small", "large"], sort=False):
        factors = {header(row.measure): _factor(row) for row in those.itertuples()}
        step = f"{SIZES[size]} {number(small, size)} → {number(large, size)}"
        rows.append({"Step": step, **factors, "Pairs": those["pairs"].iloc[0]})
    table = pd.DataFrame(rows)
    caption = (
        "Step by step: the factor on each measure from one size to the next, all else equal, with 95% t intervals "
    )
    caption += "over the pairs of runs. Below 1 is a gain."
    return html_table(table, list(table.columns), caption=caption, mark_best=False)


def _factor(row: Any) -> str:
    return f"{row.factor:.2f}" if pd.isna(row.low) else f"{row.factor:.2f} [{row.low:.2f}, {row.high:.2f}]"


def verdict(found: pd.DataFrame, steps: pd.DataFrame) -> str:
    """How doubling each size changes the measures (`exponents`), and which steps (`steps`) go the other way."""
    lines = []
    for size, rows in found.groupby("size", sort=False):
        told = [
            f"{MEASURES[row.measure]} by {2**row.slope:.2f} [{2**row.low:.2f}, {2**row.high:.2f}]"
            for row in rows.itertuples()
        ]
        gains = dict(zip(rows["measure"], rows["slope"] < 0, strict=True))
        turns = [
            f"{number(row.small, size)} to {number(row.large, size)}: {MEASURES[row.measure]} times {_factor(row)}"
            for row in steps[steps["size"] == size].itertuples()
            if (row.factor < 1) != gains[row.measure]
        ]
        turned = f" **Not at each step**: {'; '.join(turns)}." if turns else ""
        lines.append(f"- Twice the {SIZES[size]} multiplies {' and '.join(told)}.{turned}")
    return "\n".join(lines)


@styled
def curves(df: pd.DataFrame, *, y: str, x: str, by: str, ax: Axes | None = None) -> Axes:
    """A measure over size `x`, one line per value of `by` (means over the rest), both axes logarithmic.

    A measure that can be 0, such as dead latents, has a linear axis.
    """
    groups = list(df.groupby(by))
    for n, (value, group) in enumerate(groups):
        line = group.groupby(x)[y].mean()
        shade = 0.35 + 0.65 * (n + 1) / len(groups)
        ax.plot(line.index, line, color=INK, alpha=shade, marker="osD^vP"[n % 6], label=f"{number(value, by)}")
    log_axes(ax, sorted(df[x].unique()))
    if (df[y] <= 0).any():
        ax.set_yscale("linear")
    ax.set_xlabel(header(x))
    ax.set_ylabel(header(y))
    ax.legend(title=header(by), ncols=4, **ABOVE)
    return ax
