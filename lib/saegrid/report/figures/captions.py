"""Sentences for figures: captions and text alternatives, all from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, counted, header, number
from saegrid.config import settings
from saegrid.report.figures import plots
from saegrid.report.tables import Markdown

STILL_FALLING = 0.01
"""A curve that fell by more than this share in its last epoch had not converged."""


def point(row: Mapping[str, Any], y: str) -> str:
    """A run's place in the frontier: `L0 127.9, delta loss 0.442 nats/token`."""
    unit = COLUMNS[y].unit
    return f"L0 {number(row['l0'], 'l0')}, {COLUMNS[y].title} {number(row[y], y)}" + (f" {unit}" if unit != "1" else "")


def frontier_alt(df: pd.DataFrame, y: str) -> str:
    """The frontier's text alternative, in a sentence."""
    front = selection.pareto(selection.candidates(df), y)
    points = "; ".join(
        f"{settings.label(r)}: L0 {number(r['l0'], 'l0')}, {number(r[y], y)}" for r in front.to_dict("records")
    )
    return f"{header(y)} against L0 for {counted(len(df), 'run')}. On the Pareto set, from sparse to dense: {points}."


def frontier_caption(df: pd.DataFrame, y: str, baseline: pd.DataFrame | None = None) -> str:
    """What the frontier shows, and what its markers mean."""
    runs, df = len(df), plots.with_latents(df)
    sparse = selection.candidates(df)
    front = selection.pareto(sparse, y)
    held = " and ".join(f"{count} {arch}" for arch, count in front["arch"].value_counts().items())
    ends = [f"{number(row[y], y)} at L0 {number(row['l0'], 'l0')}" for row in front.iloc[[0, -1]].to_dict("records")]
    moves = f", {COLUMNS[y].title} from {ends[0]} to {ends[1]}" if len(front) > 1 else f", {ends[0]}"
    dense = len(df) - len(sparse)
    left_out = (
        f" Hollow: {counted(dense, 'run')} that fire {selection.DENSE_SHARE_PCT:g}% of the latents or "
        "more; dense runs are left out of the Pareto set, as they are of the recommendation."
    )
    better = "lower" if COLUMNS[y].best == "min" else "higher"
    return (
        f"On the Pareto set {'is' if len(front) == 1 else 'are'} {held}{moves}. One marker per run, colour and shape "
        f"by architecture, size by expansion; {better} and further left is better. "
        f"Each marker links to its run's page.{left_out if dense else ''}"
        + (f" Not drawn: {counted(runs - len(df), 'run')} with an L0 of 0." if len(df) < runs else "")
        + (" Pale: the published recipe." if plots.recipes_differ(df) else "")
        + (" Dashed: PCA with as many components." if len(plots.pca_line(df, y, baseline)) else "")
    )


def heatmap_alt(df: pd.DataFrame, metric: str) -> str:
    """The lowest and the highest run of a heat map in a sentence."""
    rows = df[df[metric].notna()].sort_values(metric)
    low, high = (f"{number(r[metric], metric)} for {settings.label(r)}" for r in (rows.iloc[0], rows.iloc[-1]))
    return f"{header(metric)} by setting: from {low} to {high}."


def position_alt(df: pd.DataFrame) -> str:
    """Ratio of the first position's variance to the median, in a sentence."""
    size = df[df["position"] >= 0].groupby("position")["sq_norm_centred"].mean()
    if size.empty:
        return "The rows come from published files, whose positions are not known."
    ratio = size.iloc[0] / size.iloc[1:].median()
    return f"Variance and squared error by position: the first position has {ratio:,.0f} times the median variance."


def curves_text(curves: pd.DataFrame) -> str:
    """Where the learning curves end, and how many still fall."""
    ends, falling = [], 0
    for _, run in curves.sort_values("epoch").groupby("run_id"):
        last = run["val_mse"].to_numpy()
        ends.append(run.iloc[-1])
        falling += len(last) > 1 and last[-1] < (1 - STILL_FALLING) * last[-2]
    low, high = (end(ends, key=lambda row: row["val_mse"]) for end in (min, max))
    low, high = (f"{number(row['val_mse'], 'val_mse')} ({settings.label(row)})" for row in (low, high))
    return (
        f"Validation MSE ends between {low} and {high}; {falling} of {len(ends)} runs still fell by more than "
        f"{STILL_FALLING:.0%} in the last epoch."
    )


def firing_text(latents: pd.DataFrame) -> str:
    """How often the median live latent of each architecture fires."""
    alive = latents[latents["fired"] > 0]
    share = (100 * alive["fired"] / alive["n_val_rows"]).groupby(alive["arch"]).median()
    parts = ", ".join(f"{value:.2g}% in {arch}" for arch, value in share.items())
    return f"The median live latent fires on this share of the validation rows: {parts}."


def dead_text(df: pd.DataFrame) -> str:
    """The runs with the fewest and the most dead latents, among those with a K."""
    rows = df[df["k"].notna()].sort_values("dead_pct")
    if rows.empty:
        return "These rows hold no run with a K."
    low, high = (f"{number(r['dead_pct'], 'dead_pct')}% ({settings.label(r)})" for r in (rows.iloc[0], rows.iloc[-1]))
    return f"Dead latents range from {low} to {high}."


# --- figures with their captions


def heatmaps(df: pd.DataFrame, metrics: list[str]) -> Markdown:
    """One heat map per measure."""
    return plots.side_by_side((plots.heatmap(df, metric=metric), heatmap_alt(df, metric)) for metric in metrics)


def dead_figure(df: pd.DataFrame) -> Markdown:
    """Dead latents over K."""
    return _figure(plots.dead_latents(df), dead_text(df), "One line per setting without its K; means over seeds.")


def curves_figure(curves: pd.DataFrame) -> Markdown:
    """Learning curves (`finished_run.load_curves`)."""
    more = "One line per run; BatchTopK with the batch cut."
    more += " Pale: the published recipe." if plots.recipes_differ(curves) else ""
    return _figure(plots.learning_curves(curves), curves_text(curves), more)


def firing_figure(latents: pd.DataFrame) -> Markdown:
    """How often latents fire (`finished_run.load_latents`)."""
    more = "Mean and range over an architecture's runs; dead latents left out."
    return _figure(plots.firing_histogram(latents), firing_text(latents), more)


def position_figure(positions: pd.DataFrame) -> Markdown:
    """Error by position (`finished_run.load_positions`)."""
    text = position_alt(positions)
    return _figure(plots.error_by_position(positions), text, "Mean over the runs of an architecture.")


def against_published_figure(own: pd.DataFrame, published: pd.DataFrame) -> Markdown:
    """Delta loss of own runs beside the published rows."""
    ax = plots.against_published(pd.concat([own, published], ignore_index=True), metric="delta_loss")
    alt = f"Delta loss of {len(own)} own runs and {len(published)} published rows, one line per setting."
    caption = "Delta loss at each setting: ours filled, the published rows open. The models differ."
    return plots.figure(ax, alt=alt, caption=caption)


def _figure(ax: Axes, text: str, more: str) -> Markdown:
    return plots.figure(ax, alt=text, caption=f"{text} {more}")
