"""This project's headlines, tested wherever a grid has rows: at how many layers and texts does each of them hold?

A headline is one or more comparisons of mean costs (`selection.cost`), paired over templates and seeds. Its comparisons
over all origins are one family (Holm), so that all verdicts of a headline hold together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.findings import FAILS, HOLDS, NOT_TESTABLE, Finding, all_findings
from saegrid.analysis.intervals import Estimate, Measured
from saegrid.analysis.selection import by_origin, cost, matched, recipes, without_controls
from saegrid.config import settings

NOT_SIGNIFICANT = "not significant"
FEW_DEAD_PCT, PART = 1.0, 0.1  # fixed before the results: "less than 1% dead and a tenth of the loss"


@dataclass(frozen=True)
class Held:
    """What one origin's rows say about a headline."""

    verdict: str
    """`holds`, `fails`, `not significant` (it points there, but may be chance) or `not testable here`."""
    told: Estimate | None
    """The number that the report shows, with its own 95% interval."""
    facts: dict[str, Any]


@dataclass(frozen=True)
class Headline:
    """A claim of this project in each origin."""

    name: str
    measure: str
    """The cost that is compared: `kl` or `delta_loss`."""
    held: dict[str, Held]
    """By the origin's label."""

    def where(self, verdict: str) -> list[str]:
        """The origins with a verdict."""
        return [origin for origin, held in self.held.items() if held.verdict == verdict]


@dataclass(frozen=True)
class _Test:
    """A headline's comparisons in one origin: all must be below 0, and `others` must be true."""

    comparisons: list[Estimate]
    others: bool
    told: Estimate | None
    facts: dict[str, Any]


def headlines(df: pd.DataFrame, prompts: pd.DataFrame | None) -> list[Headline]:
    """The project's headlines on the rows of `df`, with the runs' per-prompt sums, in each origin.

    Controls, and recipes with another choice, are ignored. None without the sums.
    """
    if prompts is None:
        return []
    df = without_controls(df)
    df = df[recipes(df) == df["recipe"]]
    measure, parts = cost(df), by_origin(df)
    found = {name: intervals.measured(prompts, measure, among=rows["run_id"]) for name, rows in parts.items()}
    tests = (topk_loses_less, improved_is_far_better, matryoshka_loses_least)
    return [
        Headline(test.__name__, measure, _verdicts({name: test(rows, found[name]) for name, rows in parts.items()}))
        for test in tests
    ]


def findings_by_origin(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> dict[str, list[Finding]]:
    """The five published findings on the rows of each origin."""
    return {name: all_findings(rows, prompts) for name, rows in by_origin(df).items()}


def topk_loses_less(df: pd.DataFrame, found: Measured) -> _Test:
    """With the published recipe, TopK costs less than BatchTopK at every setting that both have."""
    published = df["recipe"] == "published"
    pairs = _pairs(df, published & (df["arch"] == "TopK"), published & (df["arch"] == "BatchTopK"), "arch")
    compared = [intervals.difference(found, *pair) for pair in pairs]
    return _Test(compared, True, _most(compared), {})


def improved_is_far_better(df: pd.DataFrame, found: Measured) -> _Test:
    """BatchTopK with the improved recipe costs at most a tenth of the published one's, and few of its latents are dead.

    `told`: the ratio of the costs. Facts: `dead_pct`, the highest of the means over seeds.
    """
    batch = df["arch"] == "BatchTopK"
    pairs = _pairs(df, batch & (df["recipe"] == "improved"), batch & (df["recipe"] == "published"), "recipe")
    compared = [intervals.difference(found, *pair, factor=PART) for pair in pairs]
    dead = max((float(improved["dead_pct"].mean()) for improved, _ in pairs), default=0.0)
    told = _most([intervals.ratio(found, *pair) for pair in pairs])
    return _Test(compared, dead < FEW_DEAD_PCT, told, {"dead_pct": dead})


def matryoshka_loses_least(df: pd.DataFrame, found: Measured) -> _Test:
    """Matryoshka with the improved recipe costs less than every other architecture and recipe of the same size and K.

    `told`: its cost less that of the best other. Facts: `rival`, that other in words.
    """
    kinds = df["arch"] + " " + df["recipe"]
    ours = kinds == "Matryoshka improved"
    pairs = [pair for kind in dict.fromkeys(kinds[~ours]) for pair in _pairs(df, ours, kinds == kind, "arch", "recipe")]
    compared = [intervals.difference(found, *pair) for pair in pairs]
    told = _most(compared)
    rival = pairs[compared.index(told)][1].iloc[0].to_dict() | {"seed": 0} if told else {}
    return _Test(compared, True, told, {"rival": settings.label(rival, sizes=False) if rival else ""})


def _pairs(df: pd.DataFrame, ours: pd.Series, theirs: pd.Series, *axes: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Our runs and theirs at each setting (but for `axes`) that both have, with the seeds that both have."""
    left, right = matched(df[ours], df[theirs], *axes)
    return [(runs, right.loc[runs.index]) for _, runs in left.groupby("rest", sort=False)]


def _most(estimates: list[Estimate]) -> Estimate | None:
    """The highest estimate: the strongest evidence against a claim that all are low."""
    return max(estimates, key=lambda one: one.value, default=None)


def _verdicts(tests: dict[str, _Test]) -> dict[str, Held]:
    """Verdicts of one headline, its comparisons over all origins corrected together."""
    adjusted = intervals.holm([one.p for test in tests.values() for one in test.comparisons])
    ends = list(accumulate((len(test.comparisons) for test in tests.values()), initial=0))
    found = {}
    for n, (origin, test) in enumerate(tests.items()):
        below = all(one.value < 0 for one in test.comparisons)
        shown = all(p < intervals.LEVEL for p in adjusted[ends[n] : ends[n + 1]])
        verdict = FAILS if not (below and test.others) else HOLDS if shown else NOT_SIGNIFICANT
        found[origin] = Held(verdict if test.comparisons else NOT_TESTABLE, test.told, test.facts)
    return found
