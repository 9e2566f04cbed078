"""How often does a 95% interval contain the true value? Simulated for every kind of interval in the report.

    python benchmarks/coverage_of_intervals.py [--draws 2000]

A run's loss on a prompt is its true mean plus effects of the prompt's template, of the seed, of seed and prompt, and of
the prompt. Their spreads are those of the comparisons in `results/peers` (delta loss in nats/token). Template effects
are normal, or skewed as an exponential. Prompts are drawn with their template and 120 to 220 tokens each. Writes
`results/trials/coverage.csv`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from saegrid.analysis import scaling
from saegrid.analysis.intervals import Estimate, Measured, contrast, difference, over_seeds, ratio

FILE = Path("results/trials/coverage.csv")
COUNTS = ((15, 50), (34, 102))
"""Templates and prompts: those of a default grid (its 50 prompts have 15 of 17 templates), and twice as many."""


class Spread(NamedTuple):
    """Standard deviations, in nats/token, of what moves a run's loss on a prompt away from its mean."""

    template: float
    prompt: float
    seed: float
    seed_and_prompt: float


ONE = Spread(template=0.06, prompt=0.04, seed=0.0, seed_and_prompt=0.0)
SEEDS = {
    "seeds alike": Spread(0.04, 0.03, 0.003, 0.09),
    "seeds differ": Spread(0.02, 0.016, 0.010, 0.04),
    "seeds differ most": Spread(0.017, 0.0165, 0.0156, 0.04),
}
RUNS = pd.DataFrame({"run_id": ["a0", "a1", "a2"], "seed": range(3)})
BASE = pd.DataFrame({"run_id": ["b0", "b1", "b2"], "seed": range(3)})
ZERO = Spread(0.0, 0.0, 0.0, 0.0)
A, B = 0.1, 0.25
"""True means of the runs a and b."""


def simulated(rng: np.random.Generator, counts: tuple[int, int], a: Spread, b: Spread, skewed: bool) -> Measured:
    """Three runs a and three runs b on the same prompts; template effects of a and b are independent."""
    templates, prompts = counts
    tokens = rng.integers(120, 220, prompts)
    template = np.concatenate([np.arange(templates), rng.integers(0, templates, prompts - templates)])
    sums = {}
    for name, mean, spread in (("a", A, a), ("b", B, b)):
        effect = rng.exponential(size=templates) - 1 if skewed else rng.standard_normal(templates)
        shared = mean + spread.template * effect[template] + spread.prompt * rng.standard_normal(prompts)
        for seed in range(3):
            own = spread.seed * rng.standard_normal() + spread.seed_and_prompt * rng.standard_normal(prompts)
            sums[f"{name}{seed}"] = np.bincount(template, (shared + own) * tokens, templates)
    above, below = pd.DataFrame(sums), np.bincount(template, tokens, templates)
    value = above.sum() / below.sum()
    return Measured(value, (above - np.outer(below, value)) / below.sum())


def slope(rng: np.random.Generator, skewed: bool) -> Estimate:
    """The slope over d_sae fitted to the 24 runs of a scaling grid, which scatter by 10% about an exponent of -0.2."""
    points = [(d, k, n) for d in (1152, 2304, 4608, 9216) for k in (32, 64, 128) for n in (40_000, 160_000)]
    df = pd.DataFrame(points, columns=list(scaling.SIZES))
    miss = rng.exponential(size=len(df)) if skewed else rng.standard_normal(len(df))
    df["fvu_no_sink"] = df["delta_loss"] = df["d_sae"] ** -0.2 * df["k"] ** -0.5 * np.exp(0.1 * miss)
    row = scaling.exponents(df).iloc[0]
    return Estimate(row["slope"], row["low"], row["high"], np.nan)


Kind = tuple[str, float, Callable[[np.random.Generator, tuple[int, int], bool], Estimate]]


def kinds(seeds: int) -> list[Kind]:
    """(name, true value, a simulated interval) of every kind over some seeds; with three, those of single runs too."""
    runs, base = RUNS.head(seeds), BASE.head(seeds)

    def of(a: Spread, b: Spread, estimate: Callable[[Measured], Estimate]) -> Callable[..., Estimate]:
        return lambda rng, counts, skewed: estimate(simulated(rng, counts, a, b, skewed))

    single: list[Kind] = [
        ("one run", A, of(ONE, ZERO, lambda m: contrast(m, {"a0": 1.0}))),
        ("two runs, difference", B - A, of(ONE, ONE, lambda m: contrast(m, {"b0": 1.0, "a0": -1.0}))),
    ]
    found = single if seeds == 3 else []
    for words, spread in SEEDS.items():
        over = f"over {seeds} seeds, {words}"
        found += [
            (f"mean {over}", A, of(spread, ZERO, lambda m: over_seeds(m, list(runs["run_id"])))),
            (f"difference {over}", A - B, of(spread, ZERO, lambda m: difference(m, runs, base))),
            (f"ratio {over}", A / B, of(spread, spread, lambda m: ratio(m, runs, base))),
        ]
    return found


def table(draws: int, seed: int = 0) -> pd.DataFrame:
    """One row per kind, counts and shape of template effects: share of intervals with the true value, in %."""
    rows = []
    for seeds, skewed in itertools.product((3, 2), (False, True)):
        shape = "skewed" if skewed else "normal"
        for counts in COUNTS:
            for name, true, estimate in kinds(seeds):
                rng = np.random.default_rng([seed, len(rows)])
                found = [estimate(rng, counts, skewed) for _ in range(draws)]
                rows.append((name, *counts, shape, share(found, true), draws))
        if seeds == 3:
            rng, name = np.random.default_rng([seed, len(rows)]), "slope of 24 runs"
            rows.append((name, 0, 0, shape, share([slope(rng, skewed) for _ in range(draws)], -0.2), draws))
    return pd.DataFrame(rows, columns=["interval", "templates", "prompts", "effects", "covers_pct", "draws"])


def share(found: list[Estimate], true: float) -> float:
    """Share of the intervals that contain the true value, in %."""
    return round(100 * float(np.mean([low <= true <= high for _, low, high, _ in found])), 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    made = table(parser.parse_args().draws)
    made.to_csv(FILE, index=False, lineterminator="\n")
    print(made.to_string())
