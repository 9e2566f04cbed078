"""The five published findings, each as a function from the tidy table to a verdict, an effect and a sentence.

The same functions run on our own rows and on the published ones. No number in a sentence is typed: all are formatted
from the rows. An effect is a delta loss or a difference of delta losses in nats/token; its 95% interval is a paired
bootstrap over problem templates and needs the runs' per-prompt sums (`records.load_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.numbers import between, change, counted, number, signed
from saegrid.analysis.selection import DENSE_SHARE_PCT

HOLDS, FAILS, NOT_TESTABLE = "holds", "fails", "not testable here"

# Fixed before the results, as `results.DENSE_SHARE_PCT` is. Each comes from the published sentence; where that gives
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
    title: str
    claim: str
    """The published sentence."""
    rule: str
    """What the verdict asks, with its thresholds."""
    verdict: str
    """`holds`, `fails` or `not testable here`."""
    sentence: str
    """The numbers behind the verdict."""
    effect_name: str
    effect: float | None
    """nats/token; None where the rows don't give it."""
    interval: tuple[float, float] | None
    """95% interval of the effect."""
    evidence: pd.DataFrame
    """The rows that the verdict rests on."""

    @property
    def effect_text(self) -> str:
        """Effect and interval as text: `+0.052 [+0.031, +0.070]`."""
        if self.effect is None:
            return number(None)
        return signed(self.effect) if self.interval is None else change(self.effect, *self.interval)


def all_findings(df: pd.DataFrame, prompts: pd.DataFrame | None = None) -> list[Finding]:
    """The five findings on the rows of `df`; with intervals if `prompts` has the runs' per-prompt sums.

    They are about the published recipe: runs of another one are passed over.
    """
    if "recipe" in df:
        df = df[df["recipe"] == "published"]
    drawn = None if prompts is None else intervals.draws(prompts)
    tests: list[Callable] = [batchtopk_beats_topk, small_k_dies, sweet_spot, jumprelu_is_dense, large_adds_little]
    return [test(df, drawn) for test in tests]


def batchtopk_beats_topk(df: pd.DataFrame, drawn: pd.DataFrame | None = None) -> Finding:
    """Finding 1: every BatchTopK row against the TopK row of the same expansion, K and seed."""
    keys = ["expansion", "k", *(["seed"] if "seed" in df else [])]
    pairs = df[df["arch"] == "BatchTopK"].merge(df[df["arch"] == "TopK"], on=keys, suffixes=("_batch", "_top"))
    n = len(pairs)
    sentence, effect, interval = "These rows hold no pair of BatchTopK and TopK at the same setting.", None, None
    verdict = NOT_TESTABLE
    if n:
        wins = {name: int((pairs[f"{name}_batch"] < pairs[f"{name}_top"]).sum()) for name in ("val_mse", "delta_loss")}
        dead = int((pairs["dead_pct_batch"] <= pairs["dead_pct_top"]).sum())
        verdict = HOLDS if wins["val_mse"] == n and dead == n else FAILS
        gap = pairs["delta_loss_batch"] - pairs["delta_loss_top"]
        weights = _weights(pairs, "run_id_batch", 1 / n) | _weights(pairs, "run_id_top", -1 / n)
        effect, interval = float(gap.mean()), _interval(drawn, weights)
        sentence = (
            f"Of {n} matched settings BatchTopK has the lower MSE in {wins['val_mse']}, no more dead latents in {dead} "
            f"and the lower delta loss in {wins['delta_loss']}: on average {signed(effect)} nats/token against TopK."
        )
    evidence = df[df["arch"].isin(["BatchTopK", "TopK"])] if n else df.iloc[:0]
    return Finding(
        1,
        "BatchTopK against TopK",
        "BatchTopK beats TopK at every configuration, on MSE and on dead latents.",
        "Holds if BatchTopK has the lower MSE and no more dead latents in every matched pair of runs.",
        verdict,
        sentence,
        "Delta loss, BatchTopK − TopK",
        effect,
        interval,
        evidence.sort_values(["expansion", "k", "arch"]),
    )


def small_k_dies(df: pd.DataFrame, drawn: pd.DataFrame | None = None) -> Finding:
    """Finding 2: dead latents at small and at larger K, at one expansion."""
    rows = df[df["arch"].isin(["BatchTopK", "TopK"]) & (df["expansion"] == DEAD_EXPANSION)]
    small, enough = rows[rows["k"] == SMALL_K], rows[rows["k"] >= ENOUGH_K]
    testable = len(small) > 0 and len(enough) > 0
    verdict = NOT_TESTABLE
    if testable:
        most = small["dead_pct"].mean() >= MOSTLY_DEAD_PCT
        verdict = HOLDS if most and enough["dead_pct"].mean() < small["dead_pct"].mean() else FAILS
        sentence = f"At {DEAD_EXPANSION}x, {_dead(small)}; {_dead(enough)}."
    else:
        sentence = f"These rows hold no K = {SMALL_K} beside K of at least {ENOUGH_K} at {DEAD_EXPANSION}x."
        if rows["k"].nunique() > 1:
            small, enough = rows[rows["k"] == rows["k"].min()], rows[rows["k"] == rows["k"].max()]
            sentence += f" Nearest to it, at {DEAD_EXPANSION}x: {_dead(small)}; {_dead(enough)}."
    effect, interval = _difference(small, enough, drawn) if len(small) and len(enough) else (None, None)
    return Finding(
        2,
        "Small K and dead latents",
        "K=64 at 8x leaves 57% of latents dead: K should be at least 128 to 220.",
        f"Holds if at {DEAD_EXPANSION}x the runs with K = {SMALL_K} leave at least {MOSTLY_DEAD_PCT:g}% dead, "
        f"and those with K of at least {ENOUGH_K} fewer (means over the runs).",
        verdict,
        sentence,
        "Delta loss, smallest K − larger K",
        effect,
        interval,
        pd.concat([small, enough]).sort_values(["k", "arch"]),
    )


def sweet_spot(df: pd.DataFrame, drawn: pd.DataFrame | None = None) -> Finding:
    """Finding 3: the best of BatchTopK, 4x or 8x, K=220 against the best other BatchTopK or TopK run."""
    rows = df[df["arch"].isin(["BatchTopK", "TopK"])]
    is_sweet = (rows["arch"] == "BatchTopK") & (rows["k"] == SWEET_K) & rows["expansion"].isin(SWEET_EXPANSIONS)
    sweet, other = rows[is_sweet], rows[~is_sweet]
    verdict, effect, interval, evidence = NOT_TESTABLE, None, None, rows.nsmallest(1, "delta_loss")
    if len(sweet) and len(other):
        best, rival = sweet.nsmallest(1, "delta_loss"), other.nsmallest(1, "delta_loss")
        effect, interval = _difference(best, rival, drawn)
        as_good = best["frac_rec_pct"].item() >= SWEET_FRAC_REC_PCT and best["dead_pct"].item() <= SWEET_DEAD_PCT
        verdict = HOLDS if effect < 0 and as_good else FAILS
        sentence = f"The best claimed run, {_describe(best)}; the best other, {_describe(rival)}."
        evidence = pd.concat([sweet, rival])
    else:
        sentence = f"These rows hold no BatchTopK at K = {SWEET_K} with 4x or 8x to compare."
        if len(evidence):
            sentence += f" The best of BatchTopK and TopK here: {_describe(evidence)}."
    return Finding(
        3,
        "The sweet spot",
        "The sweet spot is BatchTopK, 4x or 8x, K=220: about 90-93% frac_rec, 13-21% dead.",
        f"Holds if the lowest delta loss of all BatchTopK and TopK runs is BatchTopK, 4x or 8x, K = {SWEET_K}, "
        f"with frac_rec of at least {SWEET_FRAC_REC_PCT:g}% and at most {SWEET_DEAD_PCT:g}% dead.",
        verdict,
        sentence,
        "Delta loss, best claimed − best other",
        effect,
        interval,
        evidence,
    )


def jumprelu_is_dense(df: pd.DataFrame, drawn: pd.DataFrame | None = None) -> Finding:
    """Finding 4: reconstruction and density of JumpReLU at the smallest threshold."""
    rows = df[(df["arch"] == "JumpReLU") & df["threshold"].notna()]
    lowest = rows[rows["threshold"] == rows["threshold"].min()]
    verdict, effect, interval = NOT_TESTABLE, None, None
    sentence = "These rows hold no JumpReLU with a fixed threshold."
    if len(lowest):
        share = 100 * lowest["l0"] / lowest["d_sae"]
        perfect = (lowest["frac_rec_pct"] >= NEAR_PERFECT_FRAC_REC_PCT).all()
        verdict = HOLDS if perfect and (share >= DENSE_SHARE_PCT).all() else FAILS
        effect = float(lowest["delta_loss"].mean())
        interval = _interval(drawn, _weights(lowest, "run_id", 1 / len(lowest)))
        theta = number(lowest["threshold"].iloc[0], "threshold") + _in_rms(lowest)
        sentence = (
            f"At the smallest threshold, θ = {theta}, JumpReLU fires {between(share, '.1f')}% of its latents "
            f"(L0 {between(lowest['l0'], ',.0f')}), with frac_rec {between(lowest['frac_rec_pct'], '.1f')}% "
            f"and NMSE {between(lowest['nmse'], '.3g')}."
        )
    return Finding(
        4,
        "JumpReLU at low thresholds",
        "JumpReLU reconstructs almost perfectly, but by firing 10-45% of its latents: not sparse at low thresholds.",
        f"Holds if at the smallest threshold every JumpReLU run has frac_rec of at least {NEAR_PERFECT_FRAC_REC_PCT:g}%"
        f" and fires at least {DENSE_SHARE_PCT:g}% of its latents.",
        verdict,
        sentence,
        "Delta loss at the smallest θ",
        effect,
        interval,
        rows.sort_values(["threshold", "expansion"]),
    )


def large_adds_little(df: pd.DataFrame, drawn: pd.DataFrame | None = None) -> Finding:
    """Finding 5: 16x against 8x at the same architecture, K and seed."""
    rows = df[df["arch"].isin(["BatchTopK", "TopK"])]
    pairs = _by_expansion(rows, MEDIUM, LARGE)
    testable, small, large = len(pairs) > 0, MEDIUM, LARGE
    sentence = ""
    if not testable:
        sentence = f"These rows hold no {LARGE}x beside {MEDIUM}x at the same K. "
        sizes = sorted(rows["expansion"].unique())
        if len(sizes) > 1:
            small, large = sizes[-2:]
            pairs = _by_expansion(rows, small, large)
    effect, interval = None, None
    if len(pairs):
        gap, n = pairs["delta_loss_large"] - pairs["delta_loss_small"], len(pairs)
        weights = _weights(pairs, "run_id_large", 1 / n) | _weights(pairs, "run_id_small", -1 / n)
        effect, interval = float(gap.mean()), _interval(drawn, weights)
        spread = "" if n == 1 else f", from {signed(gap.min())} to {signed(gap.max())}"
        sentence += (
            f"From {small}x to {large}x at matched K, delta loss moves by {signed(effect)} nats/token on average over "
            f"{counted(n, 'pair')}{spread} (below 0 is a gain)."
        )
    verdict = NOT_TESTABLE if not testable else HOLDS if -effect <= LITTLE_NATS else FAILS
    return Finding(
        5,
        "16x against 8x",
        "16x adds little over 8x at matched K.",
        f"Holds if {LARGE}x lowers the delta loss of {MEDIUM}x by at most {LITTLE_NATS:g} nats/token on average.",
        verdict,
        sentence.strip(),
        f"Delta loss, {large}x − {small}x",
        effect,
        interval,
        rows[rows["expansion"].isin([small, large] if len(pairs) else [])].sort_values(["arch", "k", "expansion"]),
    )


def _by_expansion(rows: pd.DataFrame, small: int, large: int) -> pd.DataFrame:
    keys = ["arch", "k", *(["seed"] if "seed" in rows else [])]
    at_small, at_large = rows[rows["expansion"] == small], rows[rows["expansion"] == large]
    return at_large.merge(at_small, on=keys, suffixes=("_large", "_small"))


def _difference(a: pd.DataFrame, b: pd.DataFrame, drawn: pd.DataFrame | None):
    weights = _weights(a, "run_id", 1 / len(a)) | _weights(b, "run_id", -1 / len(b))
    return float(a["delta_loss"].mean() - b["delta_loss"].mean()), _interval(drawn, weights)


def _weights(rows: pd.DataFrame, name: str, weight: float) -> dict[str, float]:
    return dict.fromkeys(rows[name], weight) if name in rows else {}


def _interval(drawn: pd.DataFrame | None, weights: Mapping[str, float]) -> tuple[float, float] | None:
    return intervals.interval(drawn, weights) if drawn is not None and weights else None


def _dead(rows: pd.DataFrame) -> str:
    ks = " and ".join(f"{k}" for k in sorted(rows["k"].unique()))
    return f"K = {ks} leaves {between(rows['dead_pct'], '.1f')}% dead"


def _describe(rows: pd.DataFrame) -> str:
    row = rows.iloc[0]
    return (
        f"{row['name']}, has delta loss {number(row['delta_loss'], 'delta_loss')} nats/token, frac_rec "
        f"{number(row['frac_rec_pct'], 'frac_rec_pct')}% and {number(row['dead_pct'], 'dead_pct')}% dead"
    )


def _in_rms(rows: pd.DataFrame) -> str:
    if "theta_over_rms" not in rows or rows["theta_over_rms"].isna().any():
        return ""
    return f" ({between(rows['theta_over_rms'], '.2g')} RMS of the pre-activations)"
