"""The best run for a budget of active latents and dictionary size, and the cost of its neighbours. Free of torch."""

from __future__ import annotations

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.numbers import change, signed
from saegrid.analysis.selection import candidates, cost

BUDGETS = (16, 32, 64, 128, 256, 512)
"""Most active latents per token that a reader may want."""
SLACK = 1.05
"""A run up to 5% over a budget is within it: K is a target, L0 is measured."""


def by_budget(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> pd.DataFrame:
    """The run with the lowest `selection.cost` within each L0 budget, each run once, with its own columns and:

    `budget`, the budgets that it is best for; `smaller`, the price of the best run of its recipe within that budget
    that has at most half its latents; `sparser`, the price of the best run of the next smaller budget. A price is a
    difference of the cost in nats/token, with a 95% interval if per-prompt sums are given; "" without such a run.
    """
    measure = cost(df)
    df, found = candidates(df), None if prompts is None else intervals.measured(prompts, measure)
    picks = {budget: best for budget in BUDGETS if (best := _best(df, budget, measure)) is not None}
    rows, before = [], None
    for budget, best in picks.items():
        if before is not None and best["run_id"] == before["run_id"]:
            rows[-1]["budget"] = f"{rows[-1]['budget'].split()[0]} to {budget}"
        else:
            small = df["d_sae"] <= best["d_sae"] / 2
            smaller = _best(df[small & (df["recipe"] == best["recipe"])], budget, measure)
            others = {"smaller": smaller, "sparser": before}
            prices = {name: _price(best, other, measure, found) for name, other in others.items()}
            rows.append({**best, "budget": f"{budget}", **prices})
            before = best
    return pd.DataFrame(rows)


def _best(df: pd.DataFrame, budget: float, measure: str) -> pd.Series | None:
    within = df[df["l0"] <= SLACK * budget]
    return None if within.empty else within.nsmallest(1, measure).iloc[0]


def _price(best: pd.Series, other: pd.Series | None, measure: str, found: intervals.Measured | None) -> str:
    if other is None:
        return ""
    more = other[measure] - best[measure]
    if found is None:
        return signed(more)
    _, low, high, _ = intervals.contrast(found, {other["run_id"]: 1.0, best["run_id"]: -1.0})
    return change(more, low, high)
