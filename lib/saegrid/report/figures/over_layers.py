"""Each measure over layers: a panel per text, a line per architecture and recipe."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.numbers import COLUMNS, between, header, number
from saegrid.analysis.origins.layers import over_layers
from saegrid.report.figures import plots
from saegrid.report.figures.style import ABOVE, INK, MARKERS, PALETTE, WIDE, styled
from saegrid.report.tables import Markdown


def figures(df: pd.DataFrame) -> Markdown:
    """A panel per measure and text, a line per architecture and recipe."""
    table, panels = over_layers(df), []
    seeds = table["seeds"].max()
    for measure, rows in table.groupby("measure", sort=False):
        limits = _limits(rows, COLUMNS[measure].best == "min")
        for text, those in rows.groupby("text", sort=False):
            caption = f"{header(measure)} over layers{f' on {text}' if text else ''}."
            if seeds > 1:
                caption += f" Means over {between(table['seeds'], 'd')} seeds"
                caption += "; bars: 95% t intervals over seeds." if seeds > 2 else "."
            panels.append((curves(those, y=measure, limits=limits), caption, _alt(those, measure)))
    return plots.side_by_side(panels)


def _alt(rows: pd.DataFrame, measure: str) -> str:
    ends = []
    for line, those in rows.groupby("line", sort=False):
        values = ", ".join(f"{number(row.mean, measure)} at {row.layer}" for row in those.itertuples())
        ends.append(f"{line}: {values}")
    return f"{header(measure)} by layer. {'; '.join(ends)}."


def _limits(rows: pd.DataFrame, near_0: bool) -> tuple[bool, float, float]:
    """Whether the axis is logarithmic, and its ends, the same for all panels of a measure.

    `near_0`: whether lower is better: a logarithmic axis then separates the best values.
    """
    low, high = rows["mean"].min(), rows["mean"].max()
    if near_0 and low > 0 and high / low > WIDE / 5:
        return True, low / 1.6, high * 1.6
    ends = pd.concat([rows["low"], rows["high"], rows["mean"]])
    room = 0.06 * (ends.max() - ends.min() or 1.0)
    return False, min(ends.min() - room, 0.0 if low >= 0 else ends.min() - room), ends.max() + room


@styled
def curves(df: pd.DataFrame, *, y: str, limits: tuple[bool, float, float], ax: Axes | None = None) -> Axes:
    """A measure over layers (`over_layers`, one measure and text), a line per setting with its intervals over seeds.

    The published recipe has open markers and dashes.
    """
    logarithmic, bottom, top = limits
    for n, (line, rows) in enumerate(df.groupby("line", sort=False)):
        rows, first = rows.sort_values("layer"), rows.iloc[0]
        color, published = PALETTE.get(first["arch"], INK), first["recipe"] == "published"
        ax.errorbar(
            rows["layer"], rows["mean"],
            yerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
            color=color, marker=MARKERS.get(first["arch"], "o"), markerfacecolor="none" if published else color,
            linestyle="--" if published else "-", capsize=3, elinewidth=1, label=line, zorder=2 + n,
        )  # fmt: skip
    ax.set_yscale("log" if logarithmic else "linear")
    ax.set_ylim(bottom, top)
    if logarithmic:
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(sorted(df["layer"].unique()))
    ax.set_xlabel("Layer")
    ax.set_ylabel(f"{header(y)}, log scale" if logarithmic else header(y))
    ax.legend(ncols=2, **ABOVE)
    return ax
