"""Claims at each layer and text: verdicts from rows made so that each comes out one way, and lines over layers."""

import numpy as np
import pandas as pd
import pytest

from saegrid.analysis import selection
from saegrid.analysis.findings import FAILS, HOLDS, NOT_TESTABLE
from saegrid.analysis.origins.headlines import NOT_SIGNIFICANT, findings_by_origin, headlines
from saegrid.analysis.origins.layers import hardest, lines, over_layers
from saegrid.config.grid import Grid
from saegrid.report import layers

AXES = [
    {"layer": [6, 12], "dataset": ["embedded:gsm_symbolic", "embedded:python_docs"], **block}
    for block in (
        {"recipe": ["published"], "arch": ["TopK", "BatchTopK"], "seed": [0, 1, 2]},
        {"recipe": ["improved"], "arch": ["BatchTopK", "Matryoshka"], "seed": [0, 1, 2]},
    )
]
KL = {("TopK", "published"): 1.0, ("BatchTopK", "published"): 2.0}
KL |= {("BatchTopK", "improved"): 0.1, ("Matryoshka", "improved"): 0.05}


@pytest.fixture
def grid():
    return Grid(name="g", title="G", constants={"k": 64}, axes=AXES)


def made(grid, kl=KL, dead=0.5, noise=0.01):
    """Rows and per-prompt sums with the KL of (arch, recipe), or of a function of the run; seeds and templates differ a
    little."""
    rows, prompts = [], []
    for run in grid.runs():
        value = kl(run) if callable(kl) else kl[run.arch, run.recipe]
        rng = np.random.default_rng([run.seed, run.layer, len(rows)])
        sums = 100 * value * (1 + noise * rng.standard_normal(20))
        prompts.append(
            pd.DataFrame({"run_id": run.run_id, "prompt": range(20), "template": range(20), "n_tokens": 100})
            .assign(kl_sum=sums, ce_clean_sum=200.0, ce_spliced_sum=200.0 + sums)
        )  # fmt: skip
        row = run.model_dump() | {"run_id": run.run_id, "name": run.name, "dead_pct": dead, "kl": sums.sum() / 2000}
        row |= {"steps": 790, "loss_recovered_mean": 0.9, "frac_rec_pct": 50.0, "val_mse": value, "nmse": value}
        row |= {"d_sae": 4608, "l0": 64.0, "threshold": np.nan}
        rows.append(row | {"delta_loss": row["kl"], "fvu_no_sink": row["kl"] / (1 + run.layer)})
    return pd.DataFrame(rows), pd.concat(prompts)


def verdicts(df, prompts):
    return {headline.name: [held.verdict for held in headline.held.values()] for headline in headlines(df, prompts)}


def test_the_headlines_hold_where_they_are_true(grid):
    df, prompts = made(grid)
    assert verdicts(df, prompts) == {
        "topk_loses_less": [HOLDS] * 4,
        "improved_is_far_better": [HOLDS] * 4,
        "matryoshka_loses_least": [HOLDS] * 4,
    }
    first, second, third = headlines(df, prompts)
    labels = ["layer 6, gsm_symbolic", "layer 6, python_docs", "layer 12, gsm_symbolic", "layer 12, python_docs"]
    assert list(first.held) == labels
    for held in first.held.values():
        assert held.told.value == pytest.approx(-1.0, abs=0.03) and held.told.low < held.told.value < held.told.high
    assert second.held[labels[0]].told.value == pytest.approx(0.05, abs=0.003)
    assert third.held[labels[0]].facts["rival"] == "BatchTopK, improved"


def test_each_origin_has_its_own_verdict(grid):
    """TopK loses more at layer 12 on one text; the improved recipe leaves too much at layer 6 there."""

    def kl(run):
        changed = {(12, "TopK", "published"): 2.5, (6, "BatchTopK", "improved"): 0.3}
        here = changed if run.dataset.endswith("docs") else {}
        return here.get((run.layer, run.arch, run.recipe), KL[run.arch, run.recipe])

    df, prompts = made(grid, kl)
    assert verdicts(df, prompts)["topk_loses_less"] == [HOLDS, HOLDS, HOLDS, FAILS]
    assert verdicts(df, prompts)["improved_is_far_better"] == [HOLDS, FAILS, HOLDS, HOLDS]
    found = headlines(df, prompts)
    assert " ".join(layers.verdicts(found)).count(": holds at 3 of 4, fails at 1.") == 2
    table = layers.exceptions(found, df)
    assert "| layer 12, python_docs | fails | +0.5" in table and len(table.splitlines()) == 2 + 2
    assert "| layer 6, python_docs | fails | 15.0% of the KL [" in table


def test_what_chance_may_do_is_not_shown_and_dead_latents_count(grid):
    near = KL | {("Matryoshka", "improved"): 0.0999, ("BatchTopK", "improved"): 0.1}
    df, prompts = made(grid, near, noise=0.0)
    df["kl"] += 0
    assert verdicts(df, prompts)["matryoshka_loses_least"] == [HOLDS] * 4  # no noise: any difference is one
    df, prompts = made(grid, near, noise=0.5)
    assert set(verdicts(df, prompts)["matryoshka_loses_least"]) <= {NOT_SIGNIFICANT, FAILS}
    df, prompts = made(grid, dead=1.0)
    assert verdicts(df, prompts)["improved_is_far_better"] == [FAILS] * 4


def test_what_a_grid_does_not_hold_is_not_tested(grid):
    df, prompts = made(grid)
    published = df[df["recipe"] == "published"]
    found = verdicts(published, prompts)
    assert found["topk_loses_less"] == [HOLDS] * 4
    assert found["improved_is_far_better"] == found["matryoshka_loses_least"] == [NOT_TESTABLE] * 4
    one = df[(df["seed"] == 0) | (df["arch"] == "TopK")]  # a grid that is not finished: seeds that both have
    assert verdicts(one, prompts)["topk_loses_less"] == [HOLDS] * 4


def test_findings_and_recommendations_are_those_of_an_origin_alone(grid):
    df, prompts = made(grid)
    parts = selection.by_origin(df)
    assert {len(rows) for rows in parts.values()} == {12}
    findings = findings_by_origin(df, prompts)
    for name, rows in parts.items():
        assert findings[name][0].facts["pairs"] == 3 and findings[name][0].interval is not None
        assert set(findings[name][0].evidence["run_id"]) <= set(rows["run_id"])
    assert selection.by_origin(parts["layer 6, gsm_symbolic"]).keys() == {""}
    assert len(selection.first_origin(df)) == 12


def test_lines_over_layers_average_seeds_and_nothing_else(grid):
    df, _ = made(grid, lambda run: KL[run.arch, run.recipe] * (2 if run.layer == 12 else 1))
    table = over_layers(df)
    assert len(table[table["measure"] == "kl"]) == 4 * 2 * 2 and set(table["seeds"]) == {3}
    runs = df[(df["layer"] == 12) & (df["arch"] == "TopK") & (df["dataset"] == "embedded:python_docs")]["kl"]
    row = table.query("measure == 'kl' and layer == 12 and text == 'python_docs' and line == 'TopK'").iloc[0]
    assert row["mean"] == pytest.approx(runs.mean())
    half = 4.302653 * runs.std() / 3**0.5  # t of 2 degrees of freedom
    assert (row["low"], row["high"]) == pytest.approx((runs.mean() - half, runs.mean() + half))
    assert over_layers(df[df["seed"] == 0])["low"].isna().all()
    same = over_layers(df.assign(stable_pct=df["layer"] / 10)).query("measure == 'stable_pct'")
    assert set(same["mean"]) == {0.6, 1.2} and same[["low", "high"]].isna().all(axis=None)
    assert set(lines(df)) == {"TopK", "BatchTopK", "BatchTopK (improved)", "Matryoshka (improved)"}
    worst = hardest(df)
    assert set(worst[worst["measure"] == "kl"]["layer"]) == {12}
    assert set(worst[worst["measure"] == "fvu_no_sink"]["layer"]) == {6 if 1 / 7 > 2 / 13 else 12}
    assert "- By KL on gsm_symbolic: layer 12 for each architecture and recipe (0." in layers.hardest_text(df)


def test_the_table_has_a_column_per_origin_and_no_claim_without_a_test(grid):
    df, prompts = made(grid)
    text = layers.section(df, prompts, pages="layers/")
    assert '<th scope="colgroup" colspan="2">gsm_symbolic: layer</th>' in text
    assert 'href="layers/layer-6-gsm-symbolic.html"' in text
    assert text.count('<span class="visually-hidden">holds</span>') == 3 * 4
    assert "These runs do not test: Finding 2" in text and "Finding 1: BatchTopK against TopK" in text
    assert text.count("<figure") == 2 * len(over_layers(df)["measure"].unique())
    overview = layers.overview(df, prompts)
    assert overview.count('<tr><th scope="row">') == 4 and "Matryoshka, improved" in overview


def test_one_origin_needs_no_words(grid):
    df, prompts = made(grid)
    rows = selection.first_origin(df)
    assert "Over layers" not in layers.section(rows, prompts)
