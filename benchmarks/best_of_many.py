"""What does it cost to choose the best run on the prompts that it is reported on?

    python benchmarks/best_of_many.py [--draws 4000]

For each grid in `GRIDS` and each origin in it, the run of the lowest cost on a random half of the templates is judged
on the other half. `optimism` is how much lower its cost is where it was chosen, in nats/token, mean over the draws.
Writes `results/trials/best_of_many.csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from saegrid.analysis import intervals, selection
from saegrid.experiment import results

FILE = Path("results/trials/best_of_many.csv")
GRIDS = ("full", "layers", "recipes", "scaling")


def optimism(sums: pd.DataFrame, tokens: pd.DataFrame, draws: int, rng: np.random.Generator) -> float:
    """From the summed cost and the tokens of each template (rows) and run (columns)."""
    found = []
    for _ in range(draws):
        chosen = rng.permutation(len(sums)) < len(sums) // 2
        here, there = (sums[part].sum() / tokens[part].sum() for part in (chosen, ~chosen))
        found.append(there[here.idxmin()] - here.min())
    return float(np.mean(found))


def table(draws: int, grids: tuple[str, ...] = GRIDS) -> pd.DataFrame:
    """One row per grid and origin."""
    rows, rng = [], np.random.default_rng(0)
    for grid in grids:
        folder = Path("results") / grid
        df, prompts = selection.candidates(results.read_tidy(folder)), results.read_prompts(folder)
        cost = selection.cost(df)
        for origin, runs in selection.by_origin(df).items():
            groups = intervals.by_template(prompts, cost, runs["run_id"])
            sums, tokens = groups["above"], groups["below"]
            best = (sums.sum() / tokens.sum()).min()
            rows.append((grid, origin, cost, len(runs), len(sums), best, optimism(sums, tokens, draws, rng)))
    return pd.DataFrame(rows, columns=["grid", "origin", "cost", "runs", "templates", "lowest", "optimism"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    made = table(parser.parse_args().draws).round(5)
    made.to_csv(FILE, index=False, lineterminator="\n")
    print(made.to_string())
