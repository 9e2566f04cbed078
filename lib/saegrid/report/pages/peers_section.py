"""This project's SAEs and other libraries', as sentences, figures and a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.intervals import LEVEL
from saegrid.analysis.numbers import between, change, counted, header, number, signed
from saegrid.analysis.peers import COMPARED, against_best
from saegrid.analysis.scaling import MEASURES
from saegrid.report.figures.style import ABOVE, LIBRARIES, MARKERS, log_axes, styled
from saegrid.report.tables import Markdown, html_table

LINES = {"BatchTopK": "--", "TopK": ":", "Matryoshka": "-."}
CONTENDERS = [
    *(("saegrid", arch) for arch in ("BatchTopK", "JumpReLU", "Matryoshka")),
    *((peer, arch) for peer in ("sae-lens", "dictionary_learning") for arch in LINES),
    ("sparsify", "TopK"),
]
"""Colour is the library, marker the architecture; this project has solid lines."""


def rules(found: pd.DataFrame) -> str:
    """How the contenders were trained and measured."""
    tried, seeds = between(found["tried"], "d"), counted(found["seeds"].min(), "seed")
    return (
        "Trained by each library's released code (sparsify by the step inside its trainer) with its recommended "
        "settings, those in steps or tokens scaled to the run's length, at the same width, epochs and batch: the best "
        f"of {tried} learning rates by FVU on the validation rows, tried three times apart and at last between the "
        f"best and its better neighbour. Means over {seeds}, of which the first chose the learning rate. "
        "Attention sinks are left out of everybody's training rows (this project's recipe does so itself), out of "
        "every measure and out of the splice, and thresholds are calibrated to K without them. This project keeps the "
        "epoch of the lowest validation MSE, as it always does, the others the last. Intervals are t "
        "intervals over problem templates and seeds, paired. All take as many rows to as many latents; the speed page "
        "has what a step takes in seconds."
    )


def table(found: pd.DataFrame) -> Markdown:
    """All contenders at each K, as a table."""
    own = {"Contender": found["peer"] + " " + found["arch"], "K": found["k"].astype(str)}
    more = {
        f"More {MEASURES[name]}": found[f"{on}_more"].map(_bounds).mask(found["is_base"], "")
        for name, on in COMPARED.items()
        if f"{on}_more" in found
    }
    columns = [
        *own,
        "fvu_no_sink",
        "dead_pct_no_sink",
        "kl",
        "delta_loss",
        *more,
        "stable_pct",
        "matched_cosine",
        "Rate",
    ]
    own |= more | {"Rate": found["rates"]}
    caption = (
        "More: than this project's SAE of the lowest FVU at that K, on the prompts, 95% intervals of each. "
        "Rate: the best learning rate by the library's default."
    )
    return html_table(found.assign(**own), columns, caption=caption, mark_best=False)


def verdict(found: pd.DataFrame) -> str:
    """At each K, this project's SAE against the best of the others in each measure, and which differences stand."""
    table, lines = against_best(found), []
    for k, rows in table.groupby("k"):
        told = [
            f"{MEASURES[row.measure]} {number(row.own, row.measure)} against {number(row.theirs, row.measure)} of the "
            f"best other one ({row.peer} {row.their_arch}; {change(row.more, row.low, row.high)} on the prompts)"
            for row in rows.itertuples()
        ]
        lines.append(f"- K = {k}, {rows['arch'].iloc[0]}: {'; '.join(told)}.")
        group = found[found["k"] == k]
        absent = [
            " ".join(name) for name in CONTENDERS if name not in set(zip(group["peer"], group["arch"], strict=True))
        ]
        if absent:
            lines[-1] += f" Not run: {', '.join(absent)}."
    return "\n".join([*lines, "", _stand(table)]) if lines else ""


def _stand(table: pd.DataFrame) -> str:
    """Which of the comparisons with the best other SAE (`against_best`) stand together."""
    shown = table[table["p"] < LEVEL].assign(way=lambda rows: rows["more"].gt(0).map({True: "lower", False: "higher"}))
    parts = [
        f"a {way} {MEASURES[measure]} than the best other one at K = {', '.join(map(str, rows['k']))}"
        for (measure, way), rows in shown.groupby(["measure", "way"], sort=False)
    ]
    return (
        f"Corrected for all {len(table)} comparisons (Holm, {LEVEL:.0%} for the family), this project's SAE is shown "
        f"to have {' and '.join(parts) or 'no measure lower or higher'}; elsewhere the interval says how large a "
        "difference may be."
    )


def _bounds(more: tuple[float, float, float, float]) -> str:
    return " to ".join(map(signed, more[1:3]))


@styled
def curves(found: pd.DataFrame, *, y: str, ax: Axes | None = None) -> Axes:
    """A measure over the measured L0, one line per contender, both axes logarithmic."""
    for peer, arch in CONTENDERS:
        rows = found[(found["peer"] == peer) & (found["arch"] == arch)].sort_values("l0_no_sink")
        look = {"color": LIBRARIES[peer], "marker": MARKERS[arch], "label": f"{peer} {arch}"}
        look |= {"linestyle": "-" if peer == "saegrid" else LINES[arch]}
        if len(rows):
            ax.plot(rows["l0_no_sink"], rows[y], **look)
    log_axes(ax, sorted(found["k"].unique()))
    ax.set_xlabel(header("l0_no_sink"))
    ax.set_ylabel(header(y))
    ax.legend(ncols=2, **ABOVE)
    return ax
