"""This project's SAEs and other libraries', as sentences, figures and a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.intervals import LEVEL
from saegrid.analysis.numbers import between, change, header, listed, number, signed
from saegrid.analysis.peers import COMPARED, against_best
from saegrid.analysis.scaling import MEASURES
from saegrid.report.figures.style import ABOVE, LIBRARIES, MARKERS, log_axes, styled
from saegrid.report.tables import Markdown, html_table

SHARED = "Runs without KL are older: a sentence that all prompts share is scored too, which lowers their delta loss."
LINES = {"BatchTopK": "--", "TopK": ":", "Matryoshka": "-."}
CONTENDERS = [
    *(("saegrid", arch) for arch in ("BatchTopK", "JumpReLU", "Matryoshka")),
    *((peer, arch) for peer in ("sae-lens", "dictionary_learning") for arch in LINES),
    ("sparsify", "TopK"),
]
"""Colour is the library, marker the architecture; this project has solid lines."""


def rules(found: pd.DataFrame) -> str:
    """How the contenders were trained and measured."""
    tried, seeds = between(found["tried"], "d"), between(found["seeds"], "d")
    return (
        "Each library's released code trained its SAEs (for sparsify, the step inside its trainer) with its "
        "recommended settings, at the same width, epochs and batch; settings in steps or tokens were scaled to the "
        f"run's length. The learning rate is the best of {tried} by FVU on the validation rows: steps of a factor of "
        f"3, then one between the best and its better neighbour. Means over {seeds} seed{'s' * (seeds != '1')}; the "
        "first one chose that rate. Attention sinks are left out of all training rows, of every measure and of the "
        "splice, and thresholds are calibrated to K without them. This project keeps the epoch with the lowest "
        "validation MSE, as always; the others keep the last. This project's recipe was developed at 4x, K = 64 and "
        "layer 12 of gsm_symbolic; the others' defaults were not. Intervals are t intervals over problem templates "
        "and, where there are several, seeds, paired. The speed page has the time of a step."
        + (f" {SHARED}" if found["kl"].isna().any() else "")
    )


def table(found: pd.DataFrame) -> Markdown:
    """All contenders at each K, as a table."""
    own = {"Contender": found["peer"] + " " + found["arch"], "Where": found["where"]}
    more = {
        f"More {MEASURES[name]}": found[f"{on}_more"].map(_bounds).mask(found["is_base"], "")
        for name, on in COMPARED.items()
        if f"{on}_more" in found
    }
    columns = [
        *own,
        "l0_no_sink",
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
        f"More: the difference from this project's SAE with the lowest FVU{_elsewhere(found) or ' at that K'}, on the "
        "prompts; 95% intervals of each. Rate: the best learning rate / the library's default."
    )
    return html_table(found.assign(**own), columns, caption=caption, mark_best=False)


def beside(found: pd.DataFrame) -> Markdown:
    """At each K and in each measure, this project's SAE and the best of the others, as a table."""
    rows = [
        {
            "Where": f"{row.where}, {header(row.measure)}",
            "This project": f"{number(row.own, row.measure)} ({row.arch})",
            "Best other": f"{number(row.theirs, row.measure)} ({row.peer} {row.their_arch})",
            "Difference on the prompts": change(row.more, row.low, row.high),
        }
        for row in against_best(found).itertuples()
    ]
    run = set(zip(found["peer"], found["arch"], strict=True))
    absent = [
        f"{' '.join(name)} at {where}"
        for where, group in found.groupby("where", sort=False)
        for name in CONTENDERS
        if name in run and name not in set(zip(group["peer"], group["arch"], strict=True))
    ]
    caption = f"This project's SAE with the lowest FVU{_elsewhere(found)}, and the best of the other libraries; 95% "
    caption += "intervals of each."
    caption += f" Not run: {listed(absent)}." if absent else ""
    return html_table(pd.DataFrame(rows), list(rows[0]), caption=caption, mark_best=False)


def stand(found: pd.DataFrame) -> str:
    """Which of the comparisons with the best other SAE (`against_best`) are significant as a family."""
    table = against_best(found)
    shown = table[table["p"] < LEVEL].assign(way=lambda rows: rows["more"].gt(0).map({True: "lower", False: "higher"}))
    shared: dict[tuple[str, str], list[str]] = {}
    for (measure, way), rows in shown.groupby(["measure", "way"], sort=False):
        shared.setdefault((way, _places(rows["where"])), []).append(MEASURES[measure])
    parts = [f"{way} {listed(measures)} at {places}" for (way, places), measures in shared.items()]
    told = f"this project's has significantly {' and '.join(parts)}" if parts else "no difference is significant"
    return (
        f"Against the best SAE of the others, {told} (corrected for all {len(table)} comparisons: Holm, {LEVEL:.0%})."
    )


def _places(where: pd.Series) -> str:
    """`K = 16, 32 and 64`, or layers and texts: `layer 6, gsm_symbolic; layer 24, …`."""
    plain = where.str.startswith("K = ").all()
    return f"K = {listed(where.str.removeprefix('K = '))}" if plain else "; ".join(where)


def _elsewhere(found: pd.DataFrame) -> str:
    """What tells a table of other layers and texts (`peers.at_each`) from the first one."""
    return "" if found["where"].str.startswith("K = ").all() else " there"


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
