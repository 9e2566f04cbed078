"""What a recipe and each of its choices gain: runs of one setting compared over seeds. Free of torch."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.selection import cost
from saegrid.config import settings
from saegrid.config.recipes import described, switched
from saegrid.errors import ResultsError

MEANS = ["l0", "fvu_no_sink", "dead_pct", "dead_pct_no_sink", "kl", "delta_loss"]


def named(df: pd.DataFrame) -> pd.DataFrame:
    """The rows with their recipe in words (`improved but sinks = keep`), `base` (`improved`) and `switched`."""
    rows = df.to_dict("records")
    words, choices = [described(row) for row in rows], [switched(row) for row in rows]
    return df.assign(base=df["recipe"], recipe=words, switched=choices)


def setting(df: pd.DataFrame) -> list[str]:
    """The columns other than the recipe that distinguish the settings of these rows."""
    return [*(name for name in settings.USUAL if name != "recipe"), *settings.unusual(df.to_dict("records"))]


def by_recipe(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per setting and recipe, in table order: means over seeds, number of seeds, uncertainty of the cost.

    Columns: those of `setting`, `recipe` in words, `seeds`, `MEANS`, and `low` and `high`, the bounds of
    `selection.cost`: its 95% interval over templates and seeds if the runs' per-prompt sums are given, else its range
    over seeds (NaN for one seed).
    """
    measure = cost(df)
    groups = named(df).groupby([*setting(df), "recipe"], sort=False, dropna=False)
    table = groups[MEANS].mean().assign(seeds=groups["seed"].nunique())
    if prompts is None:
        low, high = (groups[measure].agg(end).where(table["seeds"] > 1) for end in ("min", "max"))
        return table.assign(low=low, high=high).reset_index()
    measured = intervals.measured(prompts, measure, df["run_id"])
    found = [intervals.over_seeds(measured, list(runs)) for _, runs in groups["run_id"]]
    return table.assign(low=[one.low for one in found], high=[one.high for one in found]).reset_index()


def beside(df: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """How switching one choice of the improved recipe changes its cost: one row per switched choice, costliest first.

    Columns: `recipe` in words, `choice`, `more` (mean `selection.cost` over seeds minus that of the recipe as it is),
    `low` and `high`, its 95% interval, paired over templates and seeds, and `p`, adjusted for all choices (Holm).

    Raises:
        ResultsError: the runs have more than one setting, or a choice and the recipe have different seeds.
    """
    rows = named(df)
    if len({settings.key(row, "recipe") for row in df.to_dict("records")}) > 1:
        raise ResultsError("ablation: runs of more than one setting; compare one at a time")
    own = rows[rows["recipe"] == "improved"]
    measured, found = intervals.measured(prompts, cost(df), df["run_id"]), []
    changed = rows[(rows["base"] == "improved") & (rows["switched"] != "")]
    for choice, those in changed.groupby("switched", sort=False):
        found.append((those["recipe"].iloc[0], choice, *intervals.difference(measured, those, own)))
    table = pd.DataFrame(found, columns=["recipe", "choice", "more", "low", "high", "p"])
    table["p"] = intervals.holm(table["p"])
    return table.sort_values("more", ascending=False, ignore_index=True)
