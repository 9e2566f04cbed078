"""Figures of the benchmark's page: step times of all contenders, and learning curves of both kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from saegrid.report.figures.plots import figure
from saegrid.report.figures.strips import Look, Mark, Row, strips
from saegrid.report.figures.style import ABOVE, FULL, LIBRARIES, PALETTE, STYLE
from saegrid.report.tables import Markdown

LOOKS = {
    "floor": Look("floor", shape="|"),
    "sae-lens": Look("sae-lens", LIBRARIES["sae-lens"], "s"),
    "sparsify": Look("sparsify", LIBRARIES["sparsify"], "^"),
    "dictionary_learning": Look("dictionary_learning", LIBRARIES["dictionary_learning"], "D"),
    "torch": Look("plain torch loop", LIBRARIES["torch"], "v"),
    "saegrid": Look("this project", LIBRARIES["saegrid"]),
}
"""How the charts draw each contender: every one has its own colour and its own marker."""
NAMES = {name: look.name for name, look in LOOKS.items()}


def step_chart(steps: Sequence[tuple[str, str, dict[str, float]]], caption: str) -> Markdown:
    """Step times in units of this project's own: one row per (label, note, times by contender)."""
    rows = []
    for label, note, times in steps:
        peers = {name: time for name, time in times.items() if name != "floor"}
        closest = min(peers, key=peers.__getitem__, default="")
        told = f"{NAMES[closest]} {peers[closest]:.1f}x" if closest else f"{1 / times['floor']:.1f}x the floor"
        marks = [Mark(look, times[name]) for name, look in LOOKS.items() if name in times]
        rows.append(Row(label, [Mark(LOOKS["saegrid"], 1.0), *marks], told, note))
    caption += " The number is that of the fastest peer." if any(len(times) > 1 for _, _, times in steps) else ""
    axis = "Time of a step / this project's step (log scale)"
    return strips(rows, axis=axis, caption=caption, log=True, origin=1.0)


def curve_plot(results: dict[str, Any]) -> Markdown:
    """Validation MSE over the steps, with both kernels of each architecture."""
    with plt.rc_context(STYLE):
        _, ax = plt.subplots(figsize=FULL, layout="constrained")
        for record in results["quality"]:
            draw_curves(ax, record)
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
        ax.set_xlabel("Step")
        ax.set_ylabel("Validation MSE (act², log scale)")
        ax.legend(**ABOVE, ncols=3)
    caption = (
        "Learning curves: the reference kernel in fp32 (wide, pale) and this machine's own, with an fp32 product "
        "(dashed) and a bf16 one (dotted)."
    )
    return figure(ax, alt="Validation MSE over the steps, by architecture and kernel", caption=caption)


def draw_curves(ax: Axes, record: dict[str, Any]) -> None:
    color = PALETTE[record["arch"]]
    styles = ({"linewidth": 6, "alpha": 0.3}, {"linestyle": "--", "marker": "o"}, {"linestyle": ":", "marker": "x"})
    for training, style in zip((record["reference"], *record["own"]), styles, strict=True):
        curve = training["curve"]
        label = f"{record['arch']}, {training['kernel']} {training['matmul']}"
        ax.plot([p["step"] for p in curve], [p["val_mse"] for p in curve], color=color, label=label, **style)


def plain_numbers(axis: Axis) -> None:
    """Label ticks 20 and 50 instead of with matplotlib's powers of ten, which need a formula renderer."""
    low, high = axis.get_view_interval()
    between = "25" if axis.axis_name == "y" or high < 50 * low else ""  # a long x axis has no room for them
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in between else "")
