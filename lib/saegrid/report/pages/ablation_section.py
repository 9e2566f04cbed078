"""The gain from a recipe and from each of its choices, as sentences, a figure and a table."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis.ablation import MEANS, by_recipe, setting
from saegrid.analysis.intervals import LEVEL, Estimate
from saegrid.analysis.numbers import COLUMNS, bounds, change
from saegrid.analysis.selection import cost
from saegrid.report.figures.strips import Look, Mark, Row, strips
from saegrid.report.tables import Markdown, html_table, markdown

SWITCHED = Look("one choice switched")

UNCERTAIN = ["kl_interval", "kl_range", "delta_loss_interval", "delta_loss_range"]
"""Uncertainty of a mean cost: its interval if there are per-prompt sums, else its range over the seeds."""


def verdict(found: pd.DataFrame) -> str:
    """Which switched choices (`beside`) raise the cost, lower it, or do not differ significantly, as a family."""
    shown = found["p"] < LEVEL
    parts = {"Loses more": shown & (found["more"] > 0), "Loses less": shown & (found["more"] < 0)}
    lines = []
    for words, rows in parts.items():
        if rows.any():
            lines.append(f"- {words}: {_told(found[rows])} nats/token.")
    if not shown.all():
        names = ", ".join(f"`{choice}`" for choice in found["choice"][~shown])
        within = "within the intervals of [the figure](#fig-choices){.ref}"
        lines.append(f"- No measurable difference from the full recipe, {within}: {names}.")
    return "\n".join([*lines, "", f"Corrected for {len(found)} comparisons (Holm, {LEVEL:.0%})."])


def _told(rows: pd.DataFrame) -> str:
    return ", ".join(f"`{row.choice}` ({change(row.more, row.low, row.high)})" for row in rows.itertuples())


def forest(found: pd.DataFrame, *, measure: str = "delta_loss") -> Markdown:
    """Change of a measure when each choice is switched (`beside`), with intervals; one row per choice."""
    changes = [Estimate(*values) for values in found[["more", "low", "high", "p"]].itertuples(index=False)]
    rows = [
        Row(choice, [Mark(SWITCHED, more.value, more.interval)], change(*more[:3]))
        for choice, more in zip(found["choice"], changes, strict=True)
    ]
    title, unit = COLUMNS[measure].title, COLUMNS[measure].unit
    caption = f"{title} with one choice of the recipe switched, minus that of the full recipe; 95% intervals of each."
    axis = f"{title} minus the full recipe's ({unit})"
    return strips(rows, axis=axis, caption=caption, origin=0.0, name="fig-choices")


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
