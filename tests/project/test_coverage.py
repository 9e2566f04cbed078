"""The simulated coverage of the intervals: a short version, and what the committed table and the method page say."""

import re
from pathlib import Path

import best_of_many
import coverage_of_intervals as coverage
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = pd.read_csv(ROOT / "results/trials/coverage.csv")


def test_a_short_simulation_covers_what_the_table_says():
    """30 draws of each of 82 kinds; one standard error of their mean is 0.5%."""
    found = coverage.table(draws=30, seed=1)
    keys = ["interval", "templates", "prompts", "effects"]
    assert found[keys].equals(TABLE[keys])
    assert found["covers_pct"].mean() == pytest.approx(TABLE["covers_pct"].mean(), abs=2.5)
    assert found["covers_pct"].min() >= 73


def test_intervals_over_templates_alone_cover_too_little_where_seeds_differ():
    """So the simulation can tell a bad interval from a good one."""
    rng, spread = np.random.default_rng(0), coverage.SEEDS["seeds differ most"]
    weights = {f"a{n}": 1 / 3 for n in range(3)} | {f"b{n}": -1 / 3 for n in range(3)}
    drawn = (coverage.simulated(rng, (15, 50), spread, coverage.ZERO, False) for _ in range(200))
    assert coverage.share([coverage.contrast(found, weights) for found in drawn], coverage.A - coverage.B) < 85


def test_the_method_page_says_what_the_table_says():
    page = (ROOT / "method.qmd").read_text()
    pattern = (
        r"cover (\S+)% to (\S+)% over three seeds .* two runs, (\S+)% to (\S+)% over two seeds; "
        r".* covers (\S+)% to (\S+)%, and (\S+)% to (\S+)% if templates"
    )
    stated = [float(number) for number in re.search(pattern, page).groups()]
    one, two = TABLE["interval"] == "one run", TABLE["interval"].str.contains("2 seeds")
    rest, two, one = TABLE[~one & ~two], TABLE[two], TABLE[one]
    shapes = [one.loc[one["effects"] == shape, "covers_pct"] for shape in ("normal", "skewed")]
    bounds = [f(values) for values in (rest["covers_pct"], two["covers_pct"], *shapes) for f in (min, max)]
    assert stated == pytest.approx(bounds, abs=0.4)


def test_choosing_the_best_run_is_optimistic_where_runs_are_alike():
    rng = np.random.default_rng(0)
    sums = pd.DataFrame(100 + 10 * rng.standard_normal((20, 8)))
    tokens = pd.DataFrame(np.full((20, 8), 100.0))
    alike = best_of_many.optimism(sums, tokens, 500, rng)
    sums[3] -= 90.0
    assert alike > 0.02 and abs(best_of_many.optimism(sums, tokens, 500, rng)) < 0.01


def test_the_committed_optimism_is_of_the_committed_grids():
    table = pd.read_csv(ROOT / "results/trials/best_of_many.csv", keep_default_na=False)
    made = best_of_many.table(20)
    keys = ["grid", "origin", "cost", "runs", "templates"]
    assert made[keys].equals(table[keys]) and list(made["lowest"]) == pytest.approx(list(table["lowest"]), abs=1e-5)
