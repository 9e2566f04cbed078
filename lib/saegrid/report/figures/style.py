"""The style of the report's plots: colours, markers, and matplotlib's settings.

Colours are distinct for any colour vision, on light and dark pages, and never the only cue: shape, size or a label says
the same. Ink is a placeholder that `plots.figure` replaces with the page's text colour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from saegrid.config.architectures import ARCHITECTURES

INK = "#0a0b0c"
PALETTE = {name: arch.color for name, arch in ARCHITECTURES.items()}
MARKERS = {name: arch.marker for name, arch in ARCHITECTURES.items()}
LIBRARIES = {
    "saegrid": "#d55e00",
    "sae-lens": "#3a86c8",
    "dictionary_learning": "#b5609a",
    "sparsify": "#7b7f87",
    "torch": "#9a7d00",
}
"""Colour of each library in every comparison; torch is the published class in a plain loop."""
SHAPES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "s": "M-4-4h8v8h-8z",
    "^": "M0-5 5 4-5 4z",
    "v": "M0 5 5-4-5-4z",
    "D": "M0-5.2 5.2 0 0 5.2-5.2 0z",
    "P": "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "|": "M-1-6h2v12h-2z",
}
"""Outlines of matplotlib's markers around (0, 0)."""
ABOVE = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "columnspacing": 1.4, "handletextpad": 0.3}
"""A legend above the plot: it hides nothing, and the plot keeps a phone's whole width."""
FULL, PANEL = (9.6, 4.6), (5.6, 3.7)
"""Figure sizes in inches: the page's width, and half of it. Text has the same size on the page in both."""
PALE = 0.55
"""Opacity of de-emphasised markers."""
WIDE = 50.0
"""Values that span more than this factor get a logarithmic axis."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "saegrid",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Look:
    """A kind of mark in a legend or a figure of HTML: name, colour, marker, and its line's dashes if it has one."""

    name: str
    color: str = INK
    shape: str = "o"
    hollow: bool = False
    line: str = ""
    opacity: float = 1.0

    @property
    def path(self) -> str:
        """Its outline."""
        return SHAPES[self.shape]

    @property
    def ink(self) -> str:
        """Its colour in a page."""
        return "currentColor" if self.color == INK else self.color


def styled(plot: Callable[..., Axes]) -> Callable[..., Axes]:
    """Run a plot in the report's style; without `ax` it draws on a new figure."""

    @functools.wraps(plot)
    def drawn(df: pd.DataFrame, *, ax: Axes | None = None, **options) -> Axes:
        with plt.rc_context(STYLE):
            if ax is None:
                _, ax = plt.subplots(figsize=FULL, layout="constrained")
            return plot(df, ax=ax, **options)

    return drawn


def log_axes(ax: Axes, ticks: list) -> None:
    """Both axes logarithmic with plain numbers; the x axis to base 2 with these ticks."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ticks)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
