"""The gain from a recipe and from each of its choices, as sentences, a figure and a table."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis.ablation import BETWEEN, MEANS, by_recipe, setting
from saegrid.analysis.numbers import number
from saegrid.report.figures.style import INK, styled
from saegrid.report.tables import html_table, markdown


def verdict(found: pd.DataFrame) -> str:
    """Which switched choices (`beside`) raise delta loss, lower it, or make no measurable difference."""
    parts = {"More is lost": found["low"] > 0, "Less is lost": found["high"] < 0}
    lines = []
    for words, rows in parts.items():
        if rows.any():
            told = [f"`{row.choice}` ({number(row.delta_more, 'delta_more')})" for row in found[rows].itertuples()]
            lines.append(f"- {words} with {', '.join(told)} nats/token.")
    rest = found.loc[(found["low"] <= 0) & (found["high"] >= 0), "choice"]
    if len(rest):
        lines.append(f"- No measurable difference from the full recipe: {', '.join(f'`{choice}`' for choice in rest)}.")
    return "\n".join(lines)


@styled
def forest(found: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Change of delta loss when each choice is switched (`beside`), with intervals; one row per choice."""
    rows = found.iloc[::-1]
    beyond = [(rows["delta_more"] - rows["low"]).clip(lower=0), (rows["high"] - rows["delta_more"]).clip(lower=0)]
    ax.errorbar(rows["delta_more"], range(len(rows)), xerr=beyond, fmt="o", color=INK, capsize=3)
    ax.axvline(0.0, color=INK, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), rows["choice"])
    ax.set_xlabel("Delta loss more than the whole recipe's (nats/token)")
    ax.grid(visible=False, axis="y")
    return ax


def recipe_section(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> str:
    """The comparison of recipes as a section of a page; empty if all runs have the same one."""
    table = by_recipe(df, prompts)
    if table["recipe"].nunique() < 2:
        return ""
    keys = [name for name in setting(df) if table[name].nunique() > 1]
    columns = ["recipe", *keys, "seeds", *MEANS, *BETWEEN]
    caption = "Means over seeds by recipe; “but” names the choices that differ from it."
    return markdown("## Recipes", html_table(table, columns, caption=caption, mark_best=not keys))
