"""The best run for a budget of active latents, what is as good, and what its neighbours cost. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.selection import candidates, cost, is_within
from saegrid.config import settings

BUDGETS = (20, 32, 64, 128)
"""Most active latents per token that a reader may want."""


@dataclass(frozen=True)
class Price:
    """How much more a run costs than the best one of a budget."""

    run: pd.Series
    more: float
    """nats/token."""
    interval: tuple[float, float] | None
    """95% interval of `more`; None without per-prompt sums, and with one template."""
    p: float
    """Of no difference; NaN if there is no interval."""


@dataclass(frozen=True)
class Choice:
    """The run with the lowest cost (`selection.cost`) within one L0 budget."""

    budget: int
    best: pd.Series
    interval: tuple[float, float] | None
    """95% interval of its cost."""
    others: int
    """Number of other settings within the budget."""
    alike: list[Price]
    """The best runs of other settings within the budget that can't be distinguished from it (Holm over all of them)."""
    sparser: Price | None
    """The best run of the next smaller budget, if that is another run."""
    smaller: Price | None
    """The best run of its recipe within the budget that has at most half its latents."""
    exact: Price | None
    """The best TopK within the budget: exactly K latents in each row, in any batch."""


def by_budget(
    df: pd.DataFrame, prompts: pd.DataFrame | None = None, budgets: tuple[int, ...] = BUDGETS
) -> list[Choice]:
    """The choice for each budget that a sparse run is within (`selection.candidates`), from sparse to dense."""
    measure = cost(df)
    df, found = candidates(df), None if prompts is None else intervals.measured(prompts, measure, df["run_id"])
    choices: list[Choice] = []
    for budget in sorted(budgets):
        rows = df[is_within(df["l0"], budget)]
        if rows.empty:
            continue
        best = lowest(rows, measure)
        prices = [_price(best, other, measure, found) for other in _others(rows, best, measure)]
        half = rows[(rows["d_sae"] <= best["d_sae"] / 2) & (rows["recipe"] == best["recipe"])]
        exact = rows.head(0) if best["arch"] == "TopK" else rows[rows["arch"] == "TopK"]
        before = choices[-1].best if choices and choices[-1].best["run_id"] != best["run_id"] else None
        choices.append(
            Choice(
                budget,
                best,
                None if found is None else intervals.contrast(found, {best["run_id"]: 1.0}).interval,
                len(prices),
                [] if found is None else _alike(prices),
                None if before is None else _price(best, before, measure, found),
                *(_price(best, lowest(r, measure), measure, found) if len(r) else None for r in (half, exact)),
            )
        )
    return choices


def lowest(rows: pd.DataFrame, measure: str) -> pd.Series:
    """The row with the lowest value of a measure."""
    return rows.nsmallest(1, measure).iloc[0]


def _others(rows: pd.DataFrame, best: pd.Series, measure: str) -> list[pd.Series]:
    """The best run of each setting but the best one's, by cost."""
    ranked, seen = rows.sort_values(measure, kind="stable"), {settings.key(best)}
    found = []
    for n, row in enumerate(ranked.to_dict("records")):
        if settings.key(row) not in seen:
            seen.add(settings.key(row))
            found.append(ranked.iloc[n])
    return found


def _alike(prices: list[Price]) -> list[Price]:
    adjusted = intervals.holm([price.p for price in prices])
    return [price for price, p in zip(prices, adjusted, strict=True) if not p < intervals.LEVEL]


def _price(best: pd.Series, other: pd.Series, measure: str, found: intervals.Measured | None) -> Price:
    more = float(other[measure] - best[measure])
    if found is None:
        return Price(other, more, None, math.nan)
    apart = intervals.contrast(found, {other["run_id"]: 1.0, best["run_id"]: -1.0})
    return Price(other, more, apart.interval, apart.p)
