"""Plots of the benchmark's page: step times of all contenders, and learning curves of both kernels."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from saegrid.report.figures.plots import figure
from saegrid.report.figures.style import ABOVE, INK, PALETTE, STYLE
from saegrid.report.tables import Markdown

MARKS = {  # contender: colour, shape, name; told apart by shape as well as by colour
    "saegrid": ("#d55e00", "o", "this project"),
    "torch": ("#3a86c8", "s", "plain torch loop"),
    "sae-lens": ("#009e73", "^", "sae-lens"),
    "sparsify": ("#b07aa1", "D", "sparsify"),
    "dictionary_learning": ("#a08000", "v", "dictionary_learning"),
    "floor": (INK, "|", "floor"),
}
NAMES = {name: title for name, (_, _, title) in MARKS.items()}


def step_plot(results: dict[str, Any]) -> Markdown:
    """Step times at the smallest batch: one line per shape and architecture, one marker per contender's fastest."""
    batch = min(race["batch"] for race in results["races"])
    lines: dict[str, dict[str, float]] = {}
    for race in results["races"]:
        if race["batch"] == batch and "ratio" in race:
            times = lines.setdefault(label_of(race), {})
            times |= {"saegrid": race["saegrid_ms"], race["peer"]: race["fastest_ms"]}
    for record in results["floors"]:
        if record["batch"] == batch and record.get("floor_ms") and label_of(record) in lines:
            lines[label_of(record)]["floor"] = record["floor_ms"]
    with plt.rc_context(STYLE):
        _, ax = plt.subplots(figsize=(8.0, 1.2 + 0.34 * max(1, len(lines))), layout="constrained")
        for contender, (color, shape, title) in MARKS.items():
            points = [(times[contender], n) for n, times in enumerate(lines.values()) if contender in times]
            if points:
                ax.scatter(*zip(*points, strict=True), color=color, marker=shape, s=60, label=title, zorder=2)
        ax.set_yticks(range(len(lines)), list(lines))
        ax.invert_yaxis()
        ax.set_xscale("log")
        plain_numbers(ax.xaxis)
        ax.set_xlabel("One training step (ms, log scale)")
        ax.figure.legend(loc="outside upper left", ncols=3)  # long labels make the plot narrow
    caption = f"Median time of a step of {batch} rows; each peer in its fastest setting. Left is faster."
    return figure(ax, alt="Step time of each contender at each shape and architecture", caption=caption)


def curve_plot(results: dict[str, Any]) -> Markdown:
    """Validation MSE over the steps, with both kernels of each architecture."""
    with plt.rc_context(STYLE):
        _, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
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


def label_of(record: dict[str, Any]) -> str:
    shape = f"{record['d_in']}, {record['expansion']}x, K {record['k']}, {record['arch']}"
    return f"{shape} ({record['machine']})"
