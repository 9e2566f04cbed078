"""What a recipe, and each choice of it, buys: runs of one setting compared over their seeds. Free of torch."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid import intervals
from saegrid.errors import ResultsError
from saegrid.recipes import described
from saegrid.style import INK, styled
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


def beside(df: pd.DataFrame, prompts: pd.DataFrame, base: str = "improved") -> pd.DataFrame:
    """What switching one choice of a recipe does to delta loss: one row a switched choice, the costliest first.

    Columns: `recipe` in words, `choice`, `delta_more` (mean over seeds, less that of `base` as it is), and `low` and
    `high`, its central 95% interval, paired over templates and seeds.

    Raises:
        ResultsError: the runs are of more than one setting, or a choice has other seeds than `base`.
    """
    rows, whole = named(df), f"{base} but "
    if len(rows[SETTING].drop_duplicates()) > 1:
        raise ResultsError("ablation: runs of more than one setting; compare one at a time")
    own = rows[rows["recipe"] == base]
    drawn, found = intervals.draws(prompts), []
    for recipe, those in rows[rows["recipe"].str.startswith(whole)].groupby("recipe", sort=False):
        low, high = intervals.difference(drawn, those, own)
        more = those["delta_loss"].mean() - own["delta_loss"].mean()
        choice = recipe.removeprefix(whole)
        found.append({"recipe": recipe, "choice": choice, "delta_more": more, "low": low, "high": high})
    columns = ["recipe", "choice", "delta_more", "low", "high"]
    return pd.DataFrame(found, columns=columns).sort_values("delta_more", ascending=False, ignore_index=True)


def verdict(found: pd.DataFrame) -> str:
    """Which switched choices (`beside`) raise delta loss, which lower it, and which can't be told from the recipe."""
    parts = {"More is lost": found["low"] > 0, "Less is lost": found["high"] < 0}
    lines = []
    for words, rows in parts.items():
        if rows.any():
            told = [f"`{row.choice}` ({number(row.delta_more, 'delta_more')})" for row in found[rows].itertuples()]
            lines.append(f"- {words} with {', '.join(told)} nats/token.")
    rest = found.loc[(found["low"] <= 0) & (found["high"] >= 0), "choice"]
    if len(rest):
        lines.append(f"- Not told from the whole recipe: {', '.join(f'`{choice}`' for choice in rest)}.")
    return "\n".join(lines)


@styled
def forest(found: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Delta loss more than the recipe's with each choice switched (`beside`), with intervals; one row a choice."""
    rows = found.iloc[::-1]
    beyond = [(rows["delta_more"] - rows["low"]).clip(lower=0), (rows["high"] - rows["delta_more"]).clip(lower=0)]
    ax.errorbar(rows["delta_more"], range(len(rows)), xerr=beyond, fmt="o", color=INK, capsize=3)
    ax.axvline(0.0, color=INK, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(rows)), rows["choice"])
    ax.set_xlabel("Delta loss more than the whole recipe's (nats/token)")
    ax.grid(visible=False, axis="y")
    return ax


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
