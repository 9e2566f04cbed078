"""95% intervals of measures on the evaluation prompts, by a paired bootstrap over problem templates.

Prompts of one template are alike, so templates are drawn. Every draw takes the same templates for all runs, so the
noise that two runs share cancels in their difference. A measure is a ratio of two sums over prompts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from saegrid.errors import ResultsError

DRAWS = 2000
SEED = 0
COVERAGE = 0.95
MEASURES = {
    "delta_loss": ("ce_spliced_sum - ce_clean_sum", "n_tokens"),
    "fvu_eval": ("sq_error", "sq_norm_centred"),
}
"""Numerator and denominator, each summed over prompts: nats/token; FVU without sinks on the prompts."""


def draws(prompts: pd.DataFrame, measure: str = "delta_loss") -> pd.DataFrame:
    """A measure of every run under every bootstrap draw: one row per draw, one column per run id.

    `prompts` is long-form: `run_id, prompt, template, n_tokens` and the sums that the measure needs (`MEASURES`). A
    prompt without a template is its own group. Raises `ResultsError` if the runs were not scored on the same prompts
    and tokens, or if a sum is missing.
    """
    alone = "prompt " + prompts["prompt"].astype(str)
    above, below = MEASURES[measure]
    for name in re.findall(r"\w+", f"{above} {below}"):
        if name not in prompts or prompts[name].isna().any():
            raise ResultsError(f"prompts.csv: lacks {name}, of which {measure} is made; make the runs again")
    prompts = prompts.assign(
        above=prompts.eval(above),
        below=prompts.eval(below),
        group=prompts["template"].astype("object").where(prompts["template"].notna(), alone).astype(str),
    )
    tokens = prompts.pivot(index=["group", "prompt"], columns="run_id", values="n_tokens")
    if tokens.isna().any().any() or (tokens.nunique(axis=1) != 1).any():
        raise ResultsError("prompts.csv: the runs were scored on different prompts or tokens and can't be compared")
    groups = prompts.groupby(["group", "run_id"], sort=True)[["above", "below"]].sum().unstack("run_id")
    n_groups = len(groups)
    weights = np.random.default_rng(SEED).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=DRAWS)
    above, below = groups["above"], groups["below"]
    return pd.DataFrame((weights @ above.to_numpy()) / (weights @ below.to_numpy()), columns=above.columns)


def interval(drawn: pd.DataFrame, weights: Mapping[str, float]) -> tuple[float, float]:
    """The central 95% interval of a weighted sum of runs' measures, such as `{"a": 1, "b": -1}` for a - b."""
    return central(sum(drawn[run_id] * weight for run_id, weight in weights.items()))


def over_seeds(drawn: pd.DataFrame, run_ids: Sequence[str]) -> np.ndarray:
    """Means (`DRAWS`,) over the runs of one setting; both seeds and templates are drawn.

    Two settings with equally many seeds in the same order get the same draws, so their difference is paired.
    """
    values = drawn[list(run_ids)].to_numpy()
    picked = np.random.default_rng(SEED + 1).integers(values.shape[1], size=values.shape)
    means: np.ndarray = np.take_along_axis(values, picked, axis=1).mean(axis=1)
    return means


def difference(drawn: pd.DataFrame, runs: pd.DataFrame, base: pd.DataFrame) -> tuple[float, float]:
    """The central 95% interval of the mean over `runs` minus that over `base`, paired over templates and seeds.

    Both have the columns `run_id` and `seed`. Raises `ResultsError` if their seeds differ.
    """
    runs, base = runs.sort_values("seed"), base.sort_values("seed")
    if list(runs["seed"]) != list(base["seed"]):
        raise ResultsError(f"seeds {list(runs['seed'])} and {list(base['seed'])}: only the same ones can be paired")
    return central(over_seeds(drawn, list(runs["run_id"])) - over_seeds(drawn, list(base["run_id"])))


def central(values: np.ndarray | pd.Series) -> tuple[float, float]:
    """The central 95% interval of the drawn values."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
