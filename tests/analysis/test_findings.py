"""Verdicts on rows that are made so that each comes out one way, and intervals against a computation by hand."""

import re

import pandas as pd
import pytest

from saegrid.analysis import findings, published_sweep, selection
from saegrid.analysis.findings import FAILS, HOLDS, NOT_TESTABLE
from saegrid.config.recipes import RECIPES
from saegrid.experiment import finished_run, results
from saegrid.report import card
from saegrid.report.pages import findings_page, home_page


def rows(*given):
    """Rows of (arch, expansion, k or threshold, val_mse, dead_pct, delta_loss), the rest made up."""
    made = []
    for n, (arch, expansion, sparsity, mse, dead, delta) in enumerate(given):
        k, threshold = (None, sparsity) if arch == "JumpReLU" else (sparsity, None)
        row = {"run_id": f"run{n}", "arch": arch, "expansion": expansion, "k": k, "threshold": threshold, "seed": 0}
        row |= {"val_mse": mse, "nmse": mse / 50, "dead_pct": dead, "delta_loss": delta, "l0": float(k or 500)}
        row |= {"d_sae": 576 * expansion, "frac_rec_pct": 100 * 2.3 / (2.3 + delta)}
        made.append(row | {"name": f"{arch}_{expansion}_{sparsity}"})
    return pd.DataFrame(made).astype({"k": "Int64", "threshold": float})


def test_1_needs_every_pair():
    good = [("BatchTopK", 4, 64, 1.0, 5, 0.3), ("TopK", 4, 64, 2.0, 5, 0.2)]
    finding = findings.batchtopk_beats_topk(rows(*good))
    assert finding.verdict == HOLDS
    assert finding.effect == pytest.approx(0.1)
    assert "the lower delta loss in 0" in findings_page.sentence(finding)
    bad = [*good, ("BatchTopK", 8, 64, 1.0, 6, 0.1), ("TopK", 8, 64, 2.0, 5, 0.2)]
    assert findings.batchtopk_beats_topk(rows(*bad)).verdict == FAILS
    assert findings.batchtopk_beats_topk(rows(good[0])).verdict == NOT_TESTABLE


def test_2_most_dead_at_small_k():
    small, large = ("BatchTopK", 8, 64, 1.0, 57, 0.9), ("BatchTopK", 8, 128, 1.0, 31, 0.5)
    assert findings.small_k_dies(rows(small, large)).verdict == HOLDS
    assert findings.small_k_dies(rows((*small[:4], 49.0, 0.9), large)).verdict == FAILS
    assert findings.small_k_dies(rows(small, (*large[:4], 60.0, 0.5))).verdict == FAILS
    elsewhere = findings.small_k_dies(rows(("TopK", 8, 32, 1.0, 40, 0.9), large))
    assert elsewhere.verdict == NOT_TESTABLE
    assert "K = 32 leaves 40.0% dead; K = 128 leaves 31.0% dead" in findings_page.sentence(elsewhere)


def test_3_the_best_of_the_sparse_runs():
    sweet, other = ("BatchTopK", 4, 220, 1.0, 13, 0.2), ("TopK", 8, 220, 1.0, 5, 0.3)
    assert findings.sweet_spot(rows(sweet, other)).verdict == HOLDS
    assert findings.sweet_spot(rows(sweet, (*other[:5], 0.1))).verdict == FAILS
    assert findings.sweet_spot(rows((*sweet[:4], 22.0, 0.2), other)).verdict == FAILS
    assert findings.sweet_spot(rows((*sweet[:5], 0.3), (*other[:5], 0.4))).verdict == FAILS  # frac_rec 88%
    assert findings.sweet_spot(rows(other)).verdict == NOT_TESTABLE
    assert findings.sweet_spot(rows(("JumpReLU", 4, 0.1, 1.0, 5, 0.0))).verdict == NOT_TESTABLE


def test_4_dense_and_near_perfect():
    dense = rows(("JumpReLU", 4, 0.1, 1.0, 5, 0.01), ("JumpReLU", 4, 0.5, 1.0, 5, 0.9))
    assert findings.jumprelu_is_dense(dense).verdict == HOLDS  # 500 of 2,304 latents
    assert findings.jumprelu_is_dense(dense.assign(l0=100.0)).verdict == FAILS
    assert findings.jumprelu_is_dense(dense.assign(frac_rec_pct=97.0)).verdict == FAILS
    assert findings.jumprelu_is_dense(rows(("TopK", 4, 64, 1.0, 5, 0.1))).verdict == NOT_TESTABLE


def test_4_compares_thresholds_of_one_unit():
    df = rows(("JumpReLU", 4, 0.5, 1.0, 5, 0.01), ("JumpReLU", 4, 0.2, 1.0, 5, 0.9))
    both = findings.jumprelu_is_dense(df.assign(threshold_unit=["absolute", "rms"]))
    assert both.verdict == HOLDS and list(both.facts["lowest"]["threshold"]) == [0.5]
    assert list(findings.jumprelu_is_dense(df.assign(threshold_unit="rms")).facts["lowest"]["threshold"]) == [0.2]


def test_5_little_gain():
    eight = ("TopK", 8, 64, 1.0, 5, 0.50)
    assert findings.large_adds_little(rows(eight, ("TopK", 16, 64, 1.0, 5, 0.46))).verdict == HOLDS
    assert findings.large_adds_little(rows(eight, ("TopK", 16, 64, 1.0, 5, 0.60))).verdict == HOLDS
    assert findings.large_adds_little(rows(eight, ("TopK", 16, 64, 1.0, 5, 0.40))).verdict == FAILS
    elsewhere = findings.large_adds_little(rows(("TopK", 4, 64, 1.0, 5, 0.60), eight))
    assert elsewhere.verdict == NOT_TESTABLE
    assert "From 4x to 8x at matched K, delta loss moves by −0.100" in findings_page.sentence(elsewhere)


def test_5_looks_at_each_architecture():
    """A mean of -0.02 hides a gain of 0.3 and a loss of 0.26."""
    eight = [(arch, 8, 64, 1.0, 5, 0.50) for arch in ("TopK", "BatchTopK")]
    large = [("TopK", 16, 64, 1.0, 5, 0.20), ("BatchTopK", 16, 64, 1.0, 5, 0.76)]
    finding = findings.large_adds_little(rows(*eight, *large))
    assert finding.verdict == FAILS and finding.effect == pytest.approx(-0.3)
    assert findings_page.effect_name(finding) == "Delta loss, 16x − 8x, TopK"
    worse = findings.large_adds_little(rows(*eight, ("TopK", 16, 64, 1.0, 5, 0.50), large[1]))
    assert worse.verdict == HOLDS and worse.effect == 0.0
    text = findings_page.sentence(worse)
    assert "+0.000 nats/token for TopK (1 pair) and +0.260 nats/token for BatchTopK (1 pair)" in text
    assert text.endswith("For BatchTopK, 16x adds nothing: it loses more.")


def test_other_recipes_are_tested_beside_the_published_one():
    df = rows(
        ("BatchTopK", 8, 64, 2.0, 5, 0.3), ("TopK", 8, 64, 1.0, 5, 0.2),
        ("BatchTopK", 8, 64, 0.5, 1, 0.1), ("TopK", 8, 64, 0.6, 1, 0.2),
    ).assign(recipe=["published", "published", "improved", "improved"])  # fmt: skip
    first, second = findings.all_findings(df)[:2]
    assert (first.verdict, first.others["improved"].verdict) == (FAILS, HOLDS)
    assert first.effect == pytest.approx(0.1) and first.others["improved"].effect == pytest.approx(-0.1)
    assert second.others == {}  # no larger K
    text = findings_page.finding_section(first, findings.all_findings(published_sweep.rows())[0])
    assert "**Other recipes.** With the recipe `improved` it holds. Of 1 matched pair BatchTopK has" in text
    assert "With the recipe improved it holds." in findings_page.key_findings([first], [first])


def test_a_recipe_with_another_choice_is_no_published_one():
    switched = RECIPES["published"] | {"theta_tie": 0.0, "lr": 3e-4}
    small, large = ("BatchTopK", 8, 64, 1.0, 57, 0.9), ("BatchTopK", 8, 128, 1.0, 31, 0.5)
    plain = rows(small, large).assign(recipe="published", **RECIPES["published"] | {"theta_tie": 0.0})
    other = rows((*small[:4], 2.0, 0.9), (*large[:4], 1.0, 0.5)).assign(recipe="published", **switched)
    second = findings.all_findings(pd.concat([plain, other], ignore_index=True))[1]
    assert (second.verdict, list(second.facts["small"]["dead_pct"])) == (HOLDS, [57])
    assert [(name, own.verdict) for name, own in second.others.items()] == [("published but lr = 0.0003", FAILS)]


def test_the_published_rows():
    verdicts = [finding.verdict for finding in findings.all_findings(published_sweep.rows())]
    assert verdicts == [NOT_TESTABLE, NOT_TESTABLE, HOLDS, HOLDS, HOLDS]
    sweet, dense, large = findings.all_findings(published_sweep.rows())[2:]
    assert sweet.effect == pytest.approx(0.247 - 0.406)
    assert "27.4 to 44.5% of its latents" in findings_page.sentence(dense)
    assert large.effect == pytest.approx(0.406 - 0.354)


def test_nothing_is_testable_on_an_empty_table(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    for finding in findings.all_findings(df.iloc[:0]):
        assert finding.verdict == NOT_TESTABLE
        assert finding.effect is None
        assert len(finding.evidence) == 0


def test_a_run_that_is_in_several_pairs_counts_in_each():
    """Each architecture in two precisions: four pairs, and an interval around the effect."""
    pairs = [("BatchTopK", 4, 64, 1.0, 5, 0.3), ("TopK", 4, 64, 2.0, 5, 0.2)]
    df = rows(*pairs, *pairs).assign(matmul=["fp32", "fp32", "bf16", "bf16"])
    losses = {"prompt": range(20), "template": [str(n // 2) for n in range(20)], "n_tokens": 100, "ce_clean_sum": 230.0}
    spread = [100 * (0.9 + n % 3 / 10) for n in range(20)]
    prompts = pd.concat(
        pd.DataFrame(losses).assign(run_id=run_id, ce_spliced_sum=[230 + delta * part for part in spread])
        for run_id, delta in zip(df["run_id"], df["delta_loss"], strict=True)
    )
    finding = findings.all_findings(df, prompts)[0]
    low, high = finding.interval
    assert finding.facts["pairs"] == 4 and low < finding.effect < high and low + high == pytest.approx(0.2, abs=0.01)


def test_one_template_gives_no_interval_and_the_pages_show_none(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    prompts = finished_run.load_prompts(df, fake_runs / "runs").assign(template="only")
    own, published = findings.all_findings(df, prompts), findings.all_findings(published_sweep.rows())
    assert all(finding.effect is not None and finding.interval is None for finding in own)
    texts = [findings_page.figure(own, published), home_page.recommendation(df, prompts)]
    texts += [findings_page.finding_section(*both) for both in zip(own, published, strict=True)]
    texts += [card.budget_cards(df, prompts)]
    assert not any(re.search(r"nan|\[–|interval –", text) for text in texts)


def test_sentences_follow_the_rows(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    prompts = finished_run.load_prompts(df, fake_runs / "runs")
    before = findings.all_findings(df, prompts)
    after = findings.all_findings(df.assign(delta_loss=df["delta_loss"] * 1.5, l0=df["l0"] * 0.9), prompts)
    for old, new in zip(before, after, strict=True):
        assert old.effect != new.effect
        assert old.interval is not None
        assert len(old.evidence) > 0


def test_recommended_is_the_lowest_loss_of_the_sparse():
    df = rows(("JumpReLU", 4, 0.1, 1.0, 5, 0.01), ("TopK", 4, 64, 1.0, 5, 0.3), ("BatchTopK", 4, 64, 1.0, 5, 0.2))
    assert selection.recommend(df)["run_id"] == "run2"
    assert selection.recommend(df.iloc[:1])["run_id"] == "run0"
