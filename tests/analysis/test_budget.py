import numpy as np
import pandas as pd
import pytest

from saegrid.analysis import selection
from saegrid.analysis.budget import by_budget
from saegrid.experiment import finished_run, results
from saegrid.report import card
from saegrid.report.pages import home_page


def rows(*runs):
    names = ["run_id", "l0", "d_sae", "delta_loss"]
    df = pd.DataFrame([dict(zip(names, run, strict=True)) for run in runs])
    return df.assign(name=df["run_id"], recipe="published", arch="BatchTopK", expansion=8, k=range(len(df)))


def prompts(**losses):
    """24 prompts of 12 templates; the same noise in all runs but `noisy` ones."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(24)
    frames = []
    for run_id, loss in losses.items():
        sums = 100 * loss + noise + (20 * rng.standard_normal(24) if run_id.startswith("noisy") else 0)
        frame = pd.DataFrame({"prompt": range(24), "template": np.arange(24) % 12, "n_tokens": 100})
        frames.append(frame.assign(run_id=run_id, ce_clean_sum=0.0, ce_spliced_sum=sums))
    return pd.concat(frames)


def test_the_best_run_within_each_budget_and_its_neighbours():
    df = rows(
        ("a", 20.5, 512, 0.9), ("b", 33, 1024, 0.5), ("c", 33, 512, 0.75), ("d", 60, 1024, 0.6), ("e", 120, 2048, 0.2)
    )
    choices = by_budget(df)
    assert [choice.best["run_id"] for choice in choices] == ["a", "b", "b", "e"]  # d is denser than b and worse
    assert [choice.smaller and choice.smaller.more for choice in choices] == pytest.approx([None, 0.25, 0.25, 0.3])
    assert [choice.sparser and choice.sparser.more for choice in choices] == pytest.approx([None, 0.4, None, 0.3])
    assert [choice.others for choice in choices] == [0, 2, 3, 4]


def test_half_the_latents_are_compared_within_one_recipe():
    df = rows(("a", 16, 1024, 0.5), ("b", 16, 512, 0.9), ("c", 16, 512, 0.7))
    assert by_budget(df)[0].smaller.more == pytest.approx(0.2)
    mixed = df.assign(recipe=["improved", "improved", "published"])
    assert by_budget(mixed)[0].smaller.more == pytest.approx(0.4)


def test_what_can_not_be_distinguished_is_named():
    df = rows(("a", 60, 1024, 0.5), ("b", 60, 1024, 0.6), ("noisy", 60, 1024, 0.51))
    choice = by_budget(df, prompts(a=0.5, b=0.6, noisy=0.51), (64,))[0]
    assert [price.run["run_id"] for price in choice.alike] == ["noisy"]
    assert choice.interval[0] < 0.5 < choice.interval[1]


def test_nothing_within_a_budget():
    assert by_budget(rows(("a", 900, 51200, 0.9))) == []
    df = rows(("a", 900, 51200, 0.9), ("b", 700, 51200, 0.95))
    assert selection.recommend(df)["run_id"] == "b" and selection.recommend(df, 1000)["run_id"] == "a"


def test_the_card_has_each_budget_with_intervals(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    sums = finished_run.load_prompts(df, fake_runs / "runs")
    choices = by_budget(df, sums)
    assert [choice.budget for choice in choices] == [64, 128]
    for choice in choices:
        rows = selection.candidates(df)
        assert choice.best["kl"] == rows[rows["l0"] <= 1.05 * choice.budget]["kl"].min()
    text = card.budget_cards(df, sums, 100, "runs/")
    assert text.count("No run of this grid is this sparse") == 2 and text.count("As for L0 64") == 1
    assert 'class="budget chosen">\n<p class="budget-title">L0 up to 100' in text
    assert card.budget_cards(df, sums) in home_page.model_card(df, sums)
