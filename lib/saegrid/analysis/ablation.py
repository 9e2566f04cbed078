"""What a recipe and each of its choices gain: runs of one setting compared over seeds. Free of torch."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.numbers import number
from saegrid.config import settings
from saegrid.config.recipes import described, switched
from saegrid.errors import ResultsError

MEANS = ["l0", "fvu_no_sink", "dead_pct", "dead_pct_no_sink", "delta_loss"]
BETWEEN = ["delta_interval", "delta_range"]
"""Uncertainty of the mean delta loss: its interval if there are per-prompt sums, else its range over the seeds."""


def named(df: pd.DataFrame) -> pd.DataFrame:
    """The rows with their recipe in words (`improved but sinks = keep`), `base` (`improved`) and `switched`."""
    rows = df.to_dict("records")
    words, choices = [described(row) for row in rows], [switched(row) for row in rows]
    return df.assign(base=df["recipe"], recipe=words, switched=choices)


def setting(df: pd.DataFrame) -> list[str]:
    """The columns other than the recipe that distinguish the settings of these rows."""
    return [*(name for name in settings.USUAL if name != "recipe"), *settings.unusual(df.to_dict("records"))]


def by_recipe(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per setting and recipe, in table order: means over seeds, number of seeds, uncertainty of delta loss.

    Columns: those of `setting`, `recipe` in words, `seeds`, `MEANS`, and one of `BETWEEN`: `delta_interval` (95%,
    over templates and seeds) if the runs' per-prompt sums are given, else `delta_range` (over the seeds).
    """
    groups = named(df).groupby([*setting(df), "recipe"], sort=False, dropna=False)
    table = groups[MEANS].mean().assign(seeds=groups["seed"].nunique())
    if prompts is None:
        bounds = groups["delta_loss"].agg(lambda seeds: _between(seeds.min(), seeds.max()) if len(seeds) > 1 else "")
    else:
        drawn = intervals.draws(prompts)
        bounds = groups["run_id"].agg(lambda ids: _between(*intervals.central(intervals.over_seeds(drawn, list(ids)))))
    return table.assign(**{BETWEEN[prompts is None]: bounds}).reset_index()


def beside(df: pd.DataFrame, prompts: pd.DataFrame, base: str = "improved") -> pd.DataFrame:
    """How switching one choice of a recipe changes delta loss: one row per switched choice, costliest first.

    Columns: `recipe` in words, `choice`, `delta_more` (mean over seeds minus that of unchanged `base`), and `low` and
    `high`, its central 95% interval, paired over templates and seeds.

    Raises:
        ResultsError: the runs have more than one setting, or a choice and `base` have different seeds.
    """
    rows = named(df)
    if len({settings.key(row, "recipe") for row in df.to_dict("records")}) > 1:
        raise ResultsError("ablation: runs of more than one setting; compare one at a time")
    own = rows[rows["recipe"] == base]
    drawn, found = intervals.draws(prompts), []
    changed = rows[(rows["base"] == base) & (rows["switched"] != "")]
    for choice, those in changed.groupby("switched", sort=False):
        low, high = intervals.difference(drawn, those, own)
        more = those["delta_loss"].mean() - own["delta_loss"].mean()
        recipe = those["recipe"].iloc[0]
        found.append({"recipe": recipe, "choice": choice, "delta_more": more, "low": low, "high": high})
    columns = ["recipe", "choice", "delta_more", "low", "high"]
    return pd.DataFrame(found, columns=columns).sort_values("delta_more", ascending=False, ignore_index=True)


def _between(low: float, high: float) -> str:
    return f"{number(low, 'delta_loss')} to {number(high, 'delta_loss')}"
