"""What a recipe, and each choice of it, buys: runs of one setting compared over their seeds. Free of torch."""

from __future__ import annotations

import pandas as pd

from saegrid import intervals
from saegrid.recipes import described
from saegrid.tables import html_table, markdown, number

SETTING = ["arch", "expansion", "k", "threshold"]
MEANS = ["l0", "fvu_no_sink", "dead_pct", "dead_pct_no_sink", "delta_loss"]
BETWEEN = ["delta_interval", "delta_range"]
"""How sure the mean delta loss is: its interval where it can be told, else its range over the seeds."""


def named(df: pd.DataFrame) -> pd.DataFrame:
    """The rows with their recipe in words: `improved but sinks = keep`."""
    return df.assign(recipe=[described(row) for row in df.to_dict("records")])


def by_recipe(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a setting and recipe, in the table's order: means over the seeds, their number, how sure delta loss is.

    Columns: `SETTING`, `recipe` in words, `seeds`, `MEANS`, and one of `BETWEEN`: `delta_interval` (95%, over templates
    and seeds) where the runs' per-prompt sums are given, else `delta_range` (over the seeds).
    """
    groups = named(df).groupby([*SETTING, "recipe"], sort=False, dropna=False)
    table = groups[MEANS].mean().assign(seeds=groups["seed"].nunique())
    if prompts is None:
        bounds = groups["delta_loss"].agg(lambda seeds: _between(seeds.min(), seeds.max()) if len(seeds) > 1 else "")
    else:
        drawn = intervals.draws(prompts)
        bounds = groups["run_id"].agg(lambda ids: _between(*intervals.central(intervals.over_seeds(drawn, list(ids)))))
    return table.assign(**{BETWEEN[prompts is None]: bounds}).reset_index()


def recipe_section(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> str:
    """The comparison as a section of a page; empty where all runs have one recipe."""
    table = by_recipe(df, prompts)
    if table["recipe"].nunique() < 2:
        return ""
    keys = [name for name in SETTING if table[name].nunique() > 1]
    columns = ["recipe", *keys, "seeds", *MEANS, *BETWEEN]
    caption = "Means over seeds by recipe; “but” names the choices that differ from it."
    return markdown("## Recipes", html_table(table, columns, caption=caption, mark_best=not keys))


def _between(low: float, high: float) -> str:
    return f"{number(low, 'delta_loss')} to {number(high, 'delta_loss')}"
