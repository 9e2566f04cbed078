"""The five published findings, each a function from the tidy table to a verdict, an effect and its numbers.

The same functions run on our own rows and on the published ones; `report.pages.findings_page` words the results.
An effect is a delta loss or a difference of delta losses in nats/token; its 95% interval is a t interval over problem
templates and needs the runs' per-prompt sums (`finished_run.load_prompts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.selection import DENSE_SHARE_PCT, matched, recipes, without_controls

HOLDS, FAILS, NOT_TESTABLE = "holds", "fails", "not testable here"

# Fixed before the results, like `selection.DENSE_SHARE_PCT`. Each comes from the published sentence; where that has
# only a word, the number is ours.
SMALL_K, ENOUGH_K, DEAD_EXPANSION = 64, 128, 8  # "K=64 at 8x ... K should be at least 128"
MOSTLY_DEAD_PCT = 50.0  # "57% of latents dead", taken as: most of them
SWEET_K, SWEET_EXPANSIONS = 220, (4, 8)  # "BatchTopK, 4x or 8x, K=220"
SWEET_FRAC_REC_PCT, SWEET_DEAD_PCT = 90.0, 21.0  # "about 90-93% frac_rec, 13-21% dead"
NEAR_PERFECT_FRAC_REC_PCT = 98.0  # "almost perfectly"
LARGE, MEDIUM = 16, 8  # "16x adds little over 8x"
LITTLE_NATS = 0.05  # "little"


@dataclass(frozen=True)
class Finding:
    """What a table says about one published claim."""

    number: int
    verdict: str
    """`holds`, `fails` or `not testable here`."""
    effect: float | None
    """nats/token; None if the rows don't give it."""
    interval: tuple[float, float] | None
    """95% interval of the effect."""
    evidence: pd.DataFrame
    """The rows that support the verdict."""
    facts: dict[str, Any]
    """The numbers and rows for the page's sentence."""
    others: dict[str, Finding] = field(default_factory=dict)
    """The same test on the rows of each other recipe that allows it. The verdict does not rest on them."""

    @property
    def steps(self) -> tuple[int, int] | None:
        """Range of training steps of the runs that the verdict compares; None without a verdict or without steps."""
        if self.verdict == NOT_TESTABLE or "steps" not in self.evidence or self.evidence.empty:
            return None
        return int(self.evidence["steps"].min()), int(self.evidence["steps"].max())


def all_findings(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> list[Finding]:
    """The five findings on the rows of `df`; with intervals if `prompts` has the runs' per-prompt sums.

    The verdicts concern the published recipe as it is; the same tests on other recipes, and on recipes with another
    choice, are in `Finding.others`. Controls are ignored. The rows must have one origin (`selection.by_origin`).
    """
    df = without_controls(df)
    measured = None if prompts is None or df.empty else intervals.measured(prompts, among=df["run_id"])
    tests = (batchtopk_beats_topk, small_k_dies, sweet_spot, jumprelu_is_dense, large_adds_little)
    if "recipe" not in df:
        return [test(df, measured) for test in tests]
    groups = dict(list(df.groupby(recipes(df).to_numpy(), sort=False)))
    own = groups.pop("published", df.iloc[:0])
    found = [test(own, measured) for test in tests]
    for recipe, rows in groups.items():
        also = [test(rows, measured) for test in tests]
        found = [
            one if other.verdict == NOT_TESTABLE else replace(one, others=one.others | {str(recipe): other})
            for one, other in zip(found, also, strict=True)
        ]
    return found


def batchtopk_beats_topk(df: pd.DataFrame, measured: intervals.Measured | None = None) -> Finding:
    """Finding 1: every BatchTopK row against the otherwise equal TopK row.

    Facts: `pairs`, their number; in how many BatchTopK has lower `val_mse`, lower `delta_loss`, no higher `dead_pct`.
    """
    batch, top = matched(df[df["arch"] == "BatchTopK"], df[df["arch"] == "TopK"], "arch")
    n = len(batch)
    if not n:
        return Finding(1, NOT_TESTABLE, None, None, df.iloc[:0], {"pairs": 0})
    facts = {name: int((batch[name] < top[name]).sum()) for name in ("val_mse", "delta_loss")}
    facts |= {"pairs": n, "dead_pct": int((batch["dead_pct"] <= top["dead_pct"]).sum())}
    verdict = HOLDS if facts["val_mse"] == n and facts["dead_pct"] == n else FAILS
    effect, interval = _difference(batch, top, measured)
    evidence = _both(batch, top).sort_values(["expansion", "k", "arch"])
    return Finding(1, verdict, effect, interval, evidence, facts)


def small_k_dies(df: pd.DataFrame, measured: intervals.Measured | None = None) -> Finding:
    """Finding 2: dead latents at small and at larger K, at one expansion.

    Facts: rows with `small` and with `enough` K; if the claim's own K are missing, the smallest and the largest.
    """
    rows = df[df["arch"].isin(["BatchTopK", "TopK"]) & (df["expansion"] == DEAD_EXPANSION)]
    small, enough = rows[rows["k"] == SMALL_K], rows[rows["k"] >= ENOUGH_K]
    verdict = NOT_TESTABLE
    if len(small) and len(enough):
        most = small["dead_pct"].mean() >= MOSTLY_DEAD_PCT
        verdict = HOLDS if most and enough["dead_pct"].mean() < small["dead_pct"].mean() else FAILS
    elif rows["k"].nunique() > 1:
        small, enough = rows[rows["k"] == rows["k"].min()], rows[rows["k"] == rows["k"].max()]
    effect, interval = _difference(small, enough, measured) if len(small) and len(enough) else (None, None)
    evidence = pd.concat([small, enough]).sort_values(["k", "arch"])
    return Finding(2, verdict, effect, interval, evidence, {"small": small, "enough": enough})


def sweet_spot(df: pd.DataFrame, measured: intervals.Measured | None = None) -> Finding:
    """Finding 3: the best of BatchTopK, 4x or 8x, K=220 against the best other BatchTopK or TopK run.

    Facts: `best`, the best claimed run (or the best of all), and `rival`, the best other run: at most one row each.
    """
    rows = df[df["arch"].isin(["BatchTopK", "TopK"])]
    is_sweet = (rows["arch"] == "BatchTopK") & (rows["k"] == SWEET_K) & rows["expansion"].isin(SWEET_EXPANSIONS)
    sweet, other = rows[is_sweet], rows[~is_sweet]
    if not (len(sweet) and len(other)):
        best = rows.nsmallest(1, "delta_loss")
        return Finding(3, NOT_TESTABLE, None, None, best, {"best": best, "rival": rows.iloc[:0]})
    best, rival = sweet.nsmallest(1, "delta_loss"), other.nsmallest(1, "delta_loss")
    effect, interval = _difference(best, rival, measured)
    as_good = best["frac_rec_pct"].item() >= SWEET_FRAC_REC_PCT and best["dead_pct"].item() <= SWEET_DEAD_PCT
    verdict = HOLDS if effect < 0 and as_good else FAILS
    return Finding(3, verdict, effect, interval, pd.concat([sweet, rival]), {"best": best, "rival": rival})


def jumprelu_is_dense(df: pd.DataFrame, measured: intervals.Measured | None = None) -> Finding:
    """Finding 4: reconstruction and density of JumpReLU at the smallest threshold. Facts: its rows, `lowest`.

    Thresholds of two units can't be compared: those in units of the RMS count only where there are no others.
    """
    rows = df[(df["arch"] == "JumpReLU") & df["threshold"].notna()]
    absolute = rows[rows["threshold_unit"] == "absolute"] if "threshold_unit" in rows else rows
    rows = absolute if len(absolute) else rows
    lowest = rows[rows["threshold"] == rows["threshold"].min()]
    verdict, effect, interval = NOT_TESTABLE, None, None
    if len(lowest):
        share = 100 * lowest["l0"] / lowest["d_sae"]
        perfect = (lowest["frac_rec_pct"] >= NEAR_PERFECT_FRAC_REC_PCT).all()
        verdict = HOLDS if perfect and (share >= DENSE_SHARE_PCT).all() else FAILS
        effect = float(lowest["delta_loss"].mean())
        interval = _interval(measured, _weights(lowest, 1 / len(lowest)))
    evidence = rows.sort_values(["threshold", "expansion"])
    return Finding(4, verdict, effect, interval, evidence, {"lowest": lowest})


def large_adds_little(df: pd.DataFrame, measured: intervals.Measured | None = None) -> Finding:
    """Finding 5: 16x against 8x, all else equal, for each architecture by itself.

    Effect: that of the architecture that gains most. Facts: its name, `arch`; the expansions `small` and `large` (the
    two largest if the claim's are missing); and `by_arch`: for each architecture the `Gap` from small to large.
    """
    rows = df[df["arch"].isin(["BatchTopK", "TopK"])]

    def pairs(small: int, large: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        return matched(rows[rows["expansion"] == large], rows[rows["expansion"] == small], "expansion")

    small, large, sizes = MEDIUM, LARGE, sorted(rows["expansion"].unique())
    wide, narrow = pairs(small, large)
    testable = len(wide) > 0
    if not testable and len(sizes) > 1:
        small, large = sizes[-2:]
        wide, narrow = pairs(small, large)
    facts: dict[str, Any] = {"small": small, "large": large, "arch": "", "by_arch": {}}
    if wide.empty:
        return Finding(5, NOT_TESTABLE, None, None, rows.iloc[:0], facts)
    by_arch = {
        str(arch): _gap(those, narrow.loc[those.index], measured) for arch, those in wide.groupby("arch", sort=False)
    }
    most = min(by_arch, key=lambda arch: by_arch[arch].mean)
    little = all(-gap.mean <= LITTLE_NATS for gap in by_arch.values())
    verdict = NOT_TESTABLE if not testable else HOLDS if little else FAILS
    evidence = _both(wide, narrow).sort_values(["arch", "k", "expansion"])
    facts |= {"arch": most, "by_arch": by_arch}
    return Finding(5, verdict, by_arch[most].mean, by_arch[most].interval, evidence, facts)


@dataclass(frozen=True)
class Gap:
    """Delta loss of the larger dictionary minus that of the smaller one, over the pairs of one architecture."""

    gaps: list[float]
    """One per pair, in nats/token."""
    interval: tuple[float, float] | None
    """95% interval of the mean."""

    @property
    def mean(self) -> float:
        return sum(self.gaps) / len(self.gaps)


def _gap(wide: pd.DataFrame, narrow: pd.DataFrame, measured: intervals.Measured | None) -> Gap:
    return Gap((wide["delta_loss"] - narrow["delta_loss"]).tolist(), _difference(wide, narrow, measured)[1])


def _both(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([a, b]).drop(columns="rest")


def _difference(
    a: pd.DataFrame, b: pd.DataFrame, measured: intervals.Measured | None
) -> tuple[float, tuple[float, float] | None]:
    weights = _weights(a, 1 / len(a)) | _weights(b, -1 / len(b))
    return float(a["delta_loss"].mean() - b["delta_loss"].mean()), _interval(measured, weights)


def _weights(rows: pd.DataFrame, weight: float) -> dict[str, float]:
    """Each run's weight; a run that is in several pairs counts in each."""
    return (weight * rows["run_id"].value_counts()).to_dict() if "run_id" in rows else {}


def _interval(measured: intervals.Measured | None, weights: Mapping[str, float]) -> tuple[float, float] | None:
    if measured is None or not weights:
        return None
    return intervals.contrast(measured, weights).interval
