"""The run to take for a budget of active latents and dictionary size, and what its neighbours would cost. No torch."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.numbers import change, signed
from saegrid.analysis.selection import candidates

BUDGETS = (16, 32, 64, 128, 256, 512)
"""Latents a token that a reader may want to look at, at most."""
SLACK = 1.05
"""A run up to 5% over a budget is within it: K is a target, and L0 what was measured."""


def by_budget(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """The run with the lowest delta loss within each budget of L0, once each, with the columns of its row and:

    `budget`, which ones it is best for; `smaller`, what the best run of its recipe with half its latents or fewer
    costs within that budget; `sparser`, what the best run of the next smaller budget costs. Differences of delta loss
    in nats/token, with 95% intervals where the runs' per-prompt sums are given; "" where there is no such run.
    """
    df, drawn = candidates(df), None if prompts is None else intervals.draws(prompts)
    picks = {budget: best for budget in BUDGETS if (best := _best(df, budget)) is not None}
    rows, before = [], None
    for budget, best in picks.items():
        if before is not None and best["run_id"] == before["run_id"]:
            rows[-1]["budget"] = f"{rows[-1]['budget'].split()[0]} to {budget}"
        else:
            small = df["d_sae"] <= best["d_sae"] / 2
            smaller = _best(df[small & (df["recipe"] == best["recipe"])], budget)
            costs = {"smaller": _cost(best, smaller, drawn), "sparser": _cost(best, before, drawn)}
            rows.append({**best, "budget": f"{budget}", **costs})
            before = best
    return pd.DataFrame(rows)


def _best(df: pd.DataFrame, budget: float) -> pd.Series | None:
    within = df[df["l0"] <= SLACK * budget]
    return None if within.empty else within.nsmallest(1, "delta_loss").iloc[0]


def _cost(best: pd.Series, other: pd.Series | None, drawn: pd.DataFrame | None) -> str:
    if other is None:
        return ""
    more = other["delta_loss"] - best["delta_loss"]
    if drawn is None:
        return signed(more)
    return change(more, *intervals.interval(drawn, {other["run_id"]: 1.0, best["run_id"]: -1.0}))
