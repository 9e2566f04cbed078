"""The gain from a recipe and from each of its choices, as sentences, a figure and a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.ablation import LEVEL, MEANS, by_recipe, setting
from saegrid.analysis.numbers import COLUMNS, bounds, change
from saegrid.analysis.selection import cost
from saegrid.report.figures.style import INK, styled
from saegrid.report.tables import html_table, markdown

UNCERTAIN = ["kl_interval", "kl_range", "delta_loss_interval", "delta_loss_range"]
"""Uncertainty of a mean cost: its interval if there are per-prompt sums, else its range over the seeds."""


def verdict(found: pd.DataFrame) -> str:
    """Which switched choices (`beside`) raise the cost, lower it, or are not shown to differ, as a family."""
    shown = found["p"] < LEVEL
    parts = {"More is lost": shown & (found["more"] > 0), "Less is lost": shown & (found["more"] < 0)}
    lines = []
    for words, rows in parts.items():
        if rows.any():
            lines.append(f"- {words} with {_told(found[rows])} nats/token.")
    if not shown.all():
        lines.append(f"- Not shown to differ from the full recipe, within these intervals: {_told(found[~shown])}.")
    return "\n".join(
        [*lines, "", f"Verdicts hold together: corrected for {len(found)} comparisons (Holm, {LEVEL:.0%})."]
    )


def _told(rows: pd.DataFrame) -> str:
    return ", ".join(f"`{row.choice}` ({change(row.more, row.low, row.high)})" for row in rows.itertuples())


@styled
def forest(found: pd.DataFrame, *, measure: str = "delta_loss", ax: Axes | None = None) -> Axes:
    """Change of a measure when each choice is switched (`beside`), with intervals; one row per choice."""
    rows = found.iloc[::-1]
    beyond = [(rows["more"] - rows["low"]).clip(lower=0), (rows["high"] - rows["more"]).clip(lower=0)]
    ax.errorbar(rows["more"], range(len(rows)), xerr=beyond, fmt="o", color=INK, capsize=3)
    ax.axvline(0.0, color=INK, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), rows["choice"])
    ax.set_xlabel(f"{COLUMNS[measure].title} more than the whole recipe's ({COLUMNS[measure].unit})")
    ax.grid(visible=False, axis="y")
    return ax


def recipe_means(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """`by_recipe` with the bounds of the cost in words, in one of the columns `UNCERTAIN`."""
    table, kind = by_recipe(df, prompts), "range" if prompts is None else "interval"
    words = [bounds(low, high, "delta_loss") for low, high in zip(table["low"], table["high"], strict=True)]
    return table.assign(**{f"{cost(df)}_{kind}": words})


def recipe_section(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> str:
    """The comparison of recipes as a section of a page; empty if all runs have the same one."""
    table = recipe_means(df, prompts)
    if table["recipe"].nunique() < 2:
        return ""
    keys = [name for name in setting(df) if table[name].nunique() > 1]
    columns = ["recipe", *keys, "seeds", *MEANS, *UNCERTAIN]
    caption = "Means over seeds by recipe; “but” names the choices that differ from it."
    return markdown("## Recipes", html_table(table, columns, caption=caption, mark_best=not keys))
