"""Strips: a figure of rows, each with a label, marks on one common axis, and the numbers as text.

It is HTML, so that its text keeps its size on a phone; the marks are inline SVG in the page's colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.ticker import MaxNLocator

from saegrid.report.figures.style import Look
from saegrid.report.tables import Markdown, from_template

MARGIN = 0.04
"""Room beyond the first and the last mark, as a share of the axis."""


@dataclass(frozen=True)
class Mark:
    """A value on the axis, with its interval if it has one."""

    look: Look
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A row: label, a note in small type below it, marks, and the numbers as text."""

    label: str
    marks: Sequence[Mark]
    text: str = ""
    note: str = ""
    beside: str = ""
    """A second number, in small type below the first."""
    href: str = ""
    verdict: dict[str, str] = field(default_factory=dict)
    """Sign, mark and word of a verdict, shown before the label."""


def strips(
    rows: Sequence[Row], *, axis: str, caption: str, log: bool = False, origin: float | None = None, name: str = ""
) -> Markdown:
    """The figure. `axis` names the axis; `origin` is a value with a line of its own; `log`: a logarithmic axis.

    A link `[the figure](#name){.ref}` shows its number, and without scripts its own words.
    """
    marks = [mark for row in rows for mark in row.marks]
    ends = [end for mark in marks for end in (mark.value, *(mark.interval or ()))]
    ends += [] if origin is None else [origin]
    low, high = _limits(ends, log)

    def place(value: float) -> str:
        low_, high_, value = np.log([low, high, value]) if log else (low, high, value)
        return f"{100 * (value - low_) / (high_ - low_):.2f}"

    return from_template(
        "strips.html",
        rows=rows,
        looks=list(dict.fromkeys(mark.look for mark in marks)),
        ticks=[(place(tick), f"{tick:g}".replace("-", "−")) for tick in _ticks(low, high, log)],
        origin=None if origin is None else place(origin),
        place=place,
        name=name,
        axis=axis,
        caption=caption,
    )


def _limits(values: Iterable[float], log: bool) -> tuple[float, float]:
    values = np.log(list(values)) if log else np.array(list(values))
    room = MARGIN * (float(np.ptp(values)) or 1.0)
    low, high = values.min() - room, values.max() + room
    return (float(np.exp(low)), float(np.exp(high))) if log else (float(low), float(high))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if not log:
        found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [float(tick) for tick in found if low <= tick <= high]
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 4:
            break
    return found
