import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.budget import by_budget
from saegrid.experiment import finished_run, results
from saegrid.report.pages import home_page
from saegrid.report.pages.home_page import budget_section


def rows(*runs):
    names = ["run_id", "l0", "d_sae", "delta_loss"]
    return pd.DataFrame([dict(zip(names, run, strict=True)) for run in runs]).assign(
        name=lambda df: df["run_id"], recipe="published"
    )


def test_the_best_run_within_each_budget_and_its_neighbours():
    df = rows(
        ("a", 16.5, 512, 0.9), ("b", 33, 1024, 0.5), ("c", 33, 512, 0.75), ("d", 60, 1024, 0.6), ("e", 120, 2048, 0.2)
    )
    table = by_budget(df)
    assert list(table["run_id"]) == ["a", "b", "e"]  # 16.5 is within 16 and 5%; d is denser than b and worse
    assert list(table["budget"]) == ["16", "32 to 64", "128 to 512"]
    assert list(table["smaller"]) == ["", "+0.250", "+0.300"]
    assert list(table["sparser"]) == ["", "+0.400", "+0.300"]


def test_half_the_latents_are_compared_within_one_recipe():
    df = rows(("a", 16, 1024, 0.5), ("b", 16, 512, 0.9), ("c", 16, 512, 0.7))
    assert list(by_budget(df)["smaller"]) == ["+0.200"]
    mixed = df.assign(recipe=["improved", "improved", "published"])
    assert list(by_budget(mixed)["smaller"]) == ["+0.400"]


def test_nothing_within_a_budget():
    assert by_budget(rows(("a", 900, 512, 0.9))).empty
    assert budget_section(rows(("a", 20, 512, 0.9))) == ""


def test_the_card_has_the_table_with_intervals(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    prompts = finished_run.load_prompts(df, fake_runs / "runs")
    table = by_budget(df, prompts)
    for row in table.to_dict("records"):
        for budget in map(int, row["budget"].split(" to ")):
            within = selection.candidates(df)[lambda runs, budget=budget: runs["l0"] <= 1.05 * budget]
            assert row["kl"] == within["kl"].min()
    assert table["sparser"].iloc[1].count("[") == 1
    assert budget_section(df, prompts) in home_page.model_card(df, prompts)
