"""95% intervals of measures on the evaluation prompts: t intervals over problem templates and, if several, seeds.

Prompts of one template are alike, so templates are the clusters; seeds are the runs of one setting. A measure is a
ratio of two sums over prompts; its variance over templates is that of its linear approximation (delta method). Runs
are compared on the same templates, so what two runs share cancels. `benchmarks/coverage_of_intervals.py` simulates
the coverage of each interval.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr, stdtrit

from saegrid.errors import ResultsError

LEVEL = 0.05
"""Error rate of an interval, and of every family of comparisons. Fixed before the results."""
MEASURES = {
    "kl": (["kl_sum"], "n_tokens"),
    "delta_loss": (["ce_spliced_sum", "ce_clean_sum"], "n_tokens"),
    "fvu_eval": (["sq_error"], "sq_norm_centred"),
}
"""Numerator (a sum, or the first minus the second) and denominator of each measure, summed over prompts.

`kl` and `delta_loss` are in nats/token; `fvu_eval` is the FVU without sinks on the prompts."""


class Estimate(NamedTuple):
    """A value, its 95% interval, and the two-sided p of a true value of 0; bounds and p are NaN with one template."""

    value: float
    low: float
    high: float
    p: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """The bounds; None with one template."""
        return None if np.isnan(self.low) else (self.low, self.high)


@dataclass(frozen=True)
class Measured:
    """A measure of every run, and what each template adds to it."""

    value: pd.Series  # by run id
    parts: pd.DataFrame
    """One row per template, one column per run id: (numerator - value · denominator) / Σ denominator."""


def measured(prompts: pd.DataFrame, measure: str = "delta_loss", among: Iterable[str] | None = None) -> Measured:
    """A measure of the runs in `prompts`, or of those `among` these ids, from their sums (`by_template`)."""
    groups = by_template(prompts, measure, among)
    value = groups["above"].sum() / groups["below"].sum()
    return Measured(value, (groups["above"] - value * groups["below"]) / groups["below"].sum())


def by_template(prompts: pd.DataFrame, measure: str, among: Iterable[str] | None = None) -> pd.DataFrame:
    """Numerator (`above`) and denominator (`below`) of a measure: a row per template, under each a column per run id.

    `prompts` is long-form: `run_id, prompt, template, n_tokens` and the sums that the measure needs (`MEASURES`). A
    prompt without a template is its own cluster. Raises `ResultsError` if the runs were not scored on the same prompts
    and tokens, or if a sum is missing.
    """
    prompts = prompts if among is None else prompts[prompts["run_id"].isin(among)]
    alone = "prompt " + prompts["prompt"].astype(str)
    above, below = MEASURES[measure]
    for name in (*above, below):
        if name not in prompts or prompts[name].isna().any():
            raise ResultsError(f"prompts.csv: lacks {name}, of which {measure} is made; make the runs again")
    prompts = prompts.assign(
        above=prompts[above[0]] if len(above) == 1 else prompts[above[0]] - prompts[above[1]],
        below=prompts[below],
        group=prompts["template"].astype("object").where(prompts["template"].notna(), alone).astype(str),
    )
    tokens = prompts.pivot(index=["group", "prompt"], columns="run_id", values="n_tokens")
    if tokens.isna().any().any() or (tokens.nunique(axis=1) != 1).any():
        raise ResultsError("prompts.csv: the runs were scored on different prompts or tokens and can't be compared")
    return prompts.groupby(["group", "run_id"], sort=True)[["above", "below"]].sum().unstack("run_id")


def contrast(found: Measured, weights: Mapping[str, float]) -> Estimate:
    """A weighted sum of runs' measures, such as `{"a": 1, "b": -1}` for a - b. Generalises over templates only."""
    runs, factors = list(weights), np.array(list(weights.values()))
    return _estimate(found.value[runs] @ factors, found.parts[runs].to_numpy() @ factors, np.zeros(1))


def over_seeds(found: Measured, runs: Sequence[str]) -> Estimate:
    """The mean over the runs of one setting. Generalises over templates and, if there are several runs, seeds."""
    value, parts = found.value[list(runs)], found.parts[list(runs)]
    return _estimate(value.mean(), parts.to_numpy().mean(axis=1), value.to_numpy())


def difference(found: Measured, runs: pd.DataFrame, base: pd.DataFrame, factor: float = 1.0) -> Estimate:
    """The mean over `runs` minus `factor` times that over `base`, paired over templates and seeds.

    Both have the columns `run_id` and `seed`. Raises `ResultsError` if their seeds differ.
    """
    ours, theirs = _paired(runs, base)
    values = found.value[ours].to_numpy() - factor * found.value[theirs].to_numpy()
    parts = found.parts[ours].to_numpy() - factor * found.parts[theirs].to_numpy()
    return _estimate(values.mean(), parts.mean(axis=1), values)


def ratio(found: Measured, runs: pd.DataFrame, base: pd.DataFrame) -> Estimate:
    """The mean over `runs` divided by that over `base`, paired as `difference` is."""
    ours, theirs = _paired(runs, base)
    whole = found.value[theirs].mean()
    value = found.value[ours].mean() / whole
    parts = (found.parts[ours].to_numpy() - value * found.parts[theirs].to_numpy()).mean(axis=1) / whole
    seeds = (found.value[ours].to_numpy() - value * found.value[theirs].to_numpy()) / whole
    return _estimate(value, parts, seeds)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of a family of comparisons, adjusted (Holm 1979).

    Rejecting those below 0.05 keeps the chance of any false rejection in the family below 5%.
    """
    order = np.argsort(ps, kind="stable")
    raised = np.array(ps)[order] * np.arange(len(ps), 0, -1)
    found = np.empty(len(ps))
    found[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return list(found)


def t_interval(value: float, error: float, df: float) -> Estimate:
    """value ± t(df) · error, where `error` is the standard error; `df` is rounded down."""
    if not df >= 1:
        return Estimate(value, np.nan, np.nan, np.nan)
    df, apart = int(df), abs(value) / error if error else np.inf * abs(value)
    half = _quantile(df) * error
    return Estimate(value, value - half, value + half, 1.0 if np.isnan(apart) else _tails(apart, df))


def _estimate(value: float, parts: np.ndarray, seeds: np.ndarray) -> Estimate:
    """The t interval of a value, with Satterthwaite's df, from its parts by template (G,) and values by seed (n,)."""
    n_groups, n = len(parts), len(seeds)
    templates = n_groups / max(n_groups - 1, 1) * np.sum(np.square(parts))
    between = seeds.var(ddof=1) / n if n > 1 else 0.0
    total = templates + between
    if n_groups < 2 or not total > 0:
        return t_interval(float(value), 0.0, n_groups - 1)
    df = total**2 / (templates**2 / (n_groups - 1) + between**2 / max(n - 1, 1))
    return t_interval(float(value), float(np.sqrt(total)), df)


def _paired(runs: pd.DataFrame, base: pd.DataFrame) -> tuple[list[str], list[str]]:
    runs, base = runs.sort_values("seed"), base.sort_values("seed")
    if list(runs["seed"]) != list(base["seed"]):
        raise ResultsError(f"seeds {list(runs['seed'])} and {list(base['seed'])}: only equal seeds can be paired")
    return list(runs["run_id"]), list(base["run_id"])


def _tails(t: float, df: int) -> float:
    """The chance that Student's |t| with `df` degrees of freedom is above `t`."""
    return float(2 * stdtr(df, -abs(t)))


@functools.cache
def _quantile(df: int) -> float:
    """The value that Student's |t| exceeds with a chance of 5%."""
    return float(stdtrit(df, 1 - LEVEL / 2))
