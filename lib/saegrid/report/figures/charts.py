"""The interactive frontier: a Vega-Lite chart above the static picture, and the one script that draws it.

Hover shows a run; a click or Enter opens its page. The script comes from vl-convert, whose wheel contains Vega,
Vega-Lite and Vega-Embed: nothing is fetched, and the repository has no minified code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import altair as alt
import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, MEANINGS, header, number
from saegrid.analysis.selection import candidates
from saegrid.report.figures import captions, plots
from saegrid.report.figures.style import MARKERS, PALE, PALETTE
from saegrid.report.tables import Markdown, from_template
from saegrid.storage.atomic import write_text

LIBRARY = "scripts/vega.js"
"""The script's path relative to the report's pages."""
SHAPES = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
SHOWN = ["l0", "l0_share_pct", "kl", "delta_loss", "frac_rec_pct", "loss_recovered_mean", "fvu_no_sink", "dead_pct"]
"""Measures in a marker's tooltip."""
LOG_2 = alt.Scale(type="log", base=2, nice=False, padding=24)
LEGENDS = {"top": {"anchor": "start", "direction": "vertical", "margin": 4}}
"""Stacked legends, for phones; Vega supports this, Altair's schema does not."""
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'


def write_library(folder: str | Path) -> None:
    """Write the script into the report's folder unless this version is there: bundling takes seconds."""
    path = Path(folder) / LIBRARY
    head = f"// Vega, Vega-Lite and Vega-Embed (BSD-3-Clause), from vl-convert-python {version('vl-convert-python')}\n"
    if path.exists() and path.read_text(encoding="utf-8").startswith(head):
        return
    import vl_convert

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + vl_convert.javascript_bundle())


def frontier_figures(df: pd.DataFrame, measures: Sequence[str], *, baseline: pd.DataFrame | None = None) -> Markdown:
    """The frontier of each measure that all runs have; with scripts, one at a time and interactive."""
    shown = [name for name in measures if df[name].notna().all()]
    figures = [frontier_figure(df, y, baseline=baseline).html for y in shown]
    return from_template("chooser.html", label="Measure", figures=figures)


def frontier_figure(df: pd.DataFrame, y: str, *, baseline: pd.DataFrame | None = None) -> Markdown:
    """The frontier of `y` as a figure: interactive if scripts run, else the static picture."""
    content = frontier(df, y, links="runs/", baseline=baseline).to_dict()
    content["config"]["legend"]["layout"] = LEGENDS
    spec = json.dumps(content).replace("</", "<\\/")  # no text in the data can close the element
    above = f'<div class="chart" data-library="{LIBRARY}"><script type="application/json">{spec}</script></div>'
    meaning = f"{COLUMNS[y].title}: {MEANINGS[y]} "
    return plots.figure(
        plots.frontier(df, y=y, links="runs/", baseline=baseline),
        alt=captions.frontier_alt(df, y),
        caption=meaning + captions.frontier_caption(df, y, baseline),
        above=above,
        name=COLUMNS[y].title,
    )


def frontier(
    df: pd.DataFrame,
    y: str,
    *,
    links: str = "",
    baseline: pd.DataFrame | None = None,
) -> alt.LayerChart:
    """L0 against `y`, one marker per run as in `plots.frontier`: colour and shape by architecture, size by expansion,
    dense runs hollow, the Pareto set of the others joined by a line."""
    df = plots.with_latents(df)
    sparse = candidates(df)
    rows = df.assign(
        page=[f"{links}{run_id}.html" for run_id in df["run_id"]],
        size=[f"{size}x" for size in df["expansion"]],
        dense=~df["run_id"].isin(sparse["run_id"]),
        l0_share_pct=100 * df["l0"] / df["d_sae"],
    )
    rows["label"] = [f"{row['name']}: {captions.point(row, y)}" for row in rows.to_dict("records")]
    shown = [name for name in dict.fromkeys([*SHOWN, y]) if name not in df or df[name].notna().any()]
    for name in shown:
        rows[f"{name}_text"] = [number(value, name) for value in rows[name]]
    keep = [
        "name",
        "seed",
        "arch",
        "expansion",
        "size",
        "l0",
        y,
        "page",
        "dense",
        "recipe",
        "label",
        *(f"{name}_text" for name in shown),
    ]
    rows = rows[list(dict.fromkeys(keep))].sort_values("expansion", ascending=False)
    beside = plots.pca_line(df, y, baseline).rename(columns={"components": "l0"})
    logarithmic = plots.spans_widely(df, y, beside)
    x_axis = alt.X("l0:Q", title=header("l0") + ", log scale", scale=LOG_2)
    title = header(y) + (", log scale" if logarithmic else "")
    y_axis = alt.Y(f"{y}:Q", title=title, scale=alt.Scale(type="log") if logarithmic else alt.Scale(zero=False))
    front = selection.pareto(sparse, y)[["l0", y]]
    line = alt.Chart(front).mark_line(color="currentColor", opacity=0.45, strokeWidth=1.2, aria=False)
    sizes = [f"{size}x" for size in sorted(df["expansion"].unique())]
    arches = [arch for arch in PALETTE if arch in set(df["arch"])]
    marks = alt.Chart(rows, name="runs").mark_point(filled=True, opacity=1, strokeWidth=1.5, cursor="pointer")
    marks = marks.encode(
        color=alt.Color(
            "arch:N",
            legend=alt.Legend(title=None, columns=3),  # three columns fit a phone
            scale=alt.Scale(domain=arches, range=[PALETTE[a] for a in arches]),
        ),
        stroke=alt.Stroke("arch:N", title=None, scale=alt.Scale(domain=arches, range=[PALETTE[a] for a in arches])),
        shape=alt.Shape(
            "arch:N", title=None, scale=alt.Scale(domain=arches, range=[SHAPES[MARKERS[a]] for a in arches])
        ),
        size=alt.Size("size:O", title=None, scale=alt.Scale(range=[60, 190]), sort=sizes),
        fillOpacity=alt.condition("datum.dense", alt.value(0), alt.value(0.9)),
        opacity=_opacity(df),
        tooltip=_tooltip(shown),
        href="page:N",
        description="label:N",
    )
    dashes = alt.Chart(beside).mark_line(color="currentColor", opacity=0.45, strokeDash=[4, 4], aria=False)
    lines = [part.encode(x=x_axis, y=y_axis) for part in ((line, dashes) if len(beside) else (line,))]
    chart = alt.layer(*lines, marks.encode(x=x_axis, y=y_axis))
    return _themed(chart.properties(width="container", height=380, description=captions.frontier_alt(df, y)))


def _opacity(df: pd.DataFrame) -> alt.Opacity | alt.OpacityValue:
    """Published-recipe runs are pale if there are others."""
    if not plots.recipes_differ(df):
        return alt.OpacityValue(1)
    recipes = sorted(set(df["recipe"]) - {"published"})
    scale = alt.Scale(domain=[*recipes, "published"], range=[*(1.0 for _ in recipes), PALE])
    return alt.Opacity("recipe:N", title=None, scale=scale)


def _tooltip(shown: list[str]) -> list[alt.Tooltip]:
    measures = [alt.Tooltip(f"{name}_text:N", title=header(name)) for name in shown]
    return [alt.Tooltip("name:N", title="Run"), alt.Tooltip("seed:N", title=COLUMNS["seed"].title), *measures]


def _themed(chart: alt.LayerChart) -> alt.LayerChart:
    """Ink in the page's text colour, so that one chart fits both themes."""
    ink = {"labelColor": "currentColor", "titleColor": "currentColor"}
    axis = {**ink, "gridColor": "currentColor", "gridOpacity": 0.12, "domainColor": "currentColor"}
    axis |= {"tickColor": "currentColor", "titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 13}
    chart = chart.configure(background="transparent", font=FONT).configure_view(stroke=None).configure_axis(**axis)
    return chart.configure_legend(**ink, symbolFillColor="currentColor", labelFontSize=12, orient="top")
