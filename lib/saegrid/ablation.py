"""What a recipe, and each choice of it, buys: runs of one setting compared over their seeds. Free of torch."""

from __future__ import annotations

import pandas as pd

from saegrid.recipes import described
from saegrid.tables import html_table, markdown, number

SETTING = ["arch", "expansion", "k", "threshold"]
MEANS = ["l0", "fvu_no_sink", "dead_pct", "dead_pct_no_sink", "delta_loss"]


def by_recipe(df: pd.DataFrame) -> pd.DataFrame:
    """One row a setting and recipe, in the table's order: means over the seeds, their number, delta loss's range.

    Columns: `SETTING`, `recipe` in words (`improved but sinks = keep`), `seeds`, `MEANS`, `delta_range`.
    """
    named = df.assign(recipe=[described(row) for row in df.to_dict("records")])
    groups = named.groupby([*SETTING, "recipe"], sort=False, dropna=False)
    table = groups[MEANS].mean().assign(seeds=groups["seed"].nunique())
    low, high = (getattr(groups["delta_loss"], bound)().map(_delta) for bound in ("min", "max"))
    table["delta_range"] = (low + " to " + high).where(table["seeds"] > 1, "")
    return table.reset_index()


def recipe_section(df: pd.DataFrame) -> str:
    """The comparison as a section of a page; empty where all runs have one recipe."""
    table = by_recipe(df)
    if table["recipe"].nunique() < 2:
        return ""
    keys = [name for name in SETTING if table[name].nunique() > 1]
    columns = ["recipe", *keys, "seeds", *MEANS, "delta_range"]
    caption = "Means over seeds by recipe; “but” names the choices that differ from it."
    return markdown("## Recipes", html_table(table, columns, caption=caption, mark_best=not keys))


def _delta(value: float) -> str:
    return number(value, "delta_loss")
