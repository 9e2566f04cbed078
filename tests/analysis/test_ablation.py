import math
import re

import pandas as pd
import pytest

from saegrid.analysis import findings, intervals
from saegrid.analysis.ablation import beside, by_recipe
from saegrid.config.recipes import RECIPES
from saegrid.errors import ResultsError
from saegrid.experiment import finished_run, results
from saegrid.report.pages import findings_page, home_page, recipes_page
from saegrid.report.pages.ablation_section import forest, recipe_means, recipe_section, verdict


@pytest.fixture
def mixed(fake_grid, fake_runs):
    """BatchTopK at 8x and K = 64: published over two seeds, improved over two, and improved without AuxK."""
    df = results.tidy(fake_grid, fake_runs / "runs")
    one = df[df["name"] == "BatchTopK_exp8x_k64"].iloc[0]
    rows = [
        {"seed": 0, "delta_loss": 2.0},
        {"seed": 1, "delta_loss": 3.0},
        {**RECIPES["improved"], "recipe": "improved", "seed": 0, "delta_loss": 0.2},
        {**RECIPES["improved"], "recipe": "improved", "seed": 1, "delta_loss": 0.1},
        {**RECIPES["improved"], "recipe": "improved", "aux_coef": 0.0, "seed": 0, "delta_loss": 0.5},
    ]
    return df.iloc[[0] * len(rows)].assign(**{n: [(one.to_dict() | row)[n] for row in rows] for n in df})


def test_means_over_seeds_and_their_range(mixed):
    table = by_recipe(mixed.assign(kl=math.nan))
    assert list(table["recipe"]) == ["published", "improved", "improved but aux_coef = 0.0"]
    assert list(table["delta_loss"]) == pytest.approx([2.5, 0.15, 0.5])
    assert table[["low", "high"]].to_numpy().tolist()[:2] == [[2.0, 3.0], [0.1, 0.2]] and table["low"].isna()[2]
    assert list(table["seeds"]) == [2, 2, 1]
    by_kl = recipe_means(mixed.assign(kl=mixed["delta_loss"] / 2))
    assert list(by_kl["kl_range"]) == ["1.000 to 1.500", "0.050 to 0.100", ""]


def test_the_card_compares_recipes_where_there_is_more_than_one(mixed):
    section = recipe_section(mixed)
    assert "improved but aux_coef = 0.0" in section and section in home_page.model_card(mixed)
    assert recipe_section(mixed.iloc[:2]) == ""
    assert "## Recipes" not in home_page.model_card(mixed.iloc[:2])
    assert "## Recipes" not in home_page.model_card(mixed.iloc[[0, 2, 3, 4]])  # most settings have one seed


def test_the_published_findings_are_tested_on_the_published_recipe_alone(mixed):
    alone, all_rows = findings.all_findings(mixed.iloc[:2]), findings.all_findings(mixed)
    assert [*map(findings_page.sentence, alone)] == [*map(findings_page.sentence, all_rows)]
    assert all((finding.evidence["recipe"] == "published").all() for finding in all_rows)


def test_intervals_over_templates_and_seeds(fake_grid, fake_runs):
    """Seeds that differ more than prompts do make the interval wider than the prompts alone would."""
    df = results.tidy(fake_grid, fake_runs / "runs")
    found = intervals.measured(finished_run.load_prompts(df, fake_runs / "runs"))
    ids = list(df.sort_values("delta_loss")["run_id"].iloc[[0, -1]])
    both, alone = intervals.over_seeds(found, ids), [intervals.contrast(found, {run_id: 1.0}) for run_id in ids]
    assert both.low < alone[0].low and both.high > alone[1].high
    assert both.value == pytest.approx((alone[0].value + alone[1].value) / 2)
    assert intervals.over_seeds(found, ids[:1]) == alone[0]


def test_runs_on_other_prompts_do_not_matter(mixed, fake_grid, fake_runs):
    """A grid of several texts has the sums of all its runs in one table."""
    prompts = finished_run.load_prompts(results.tidy(fake_grid, fake_runs / "runs"), fake_runs / "runs")
    one = prompts[prompts["run_id"] == prompts["run_id"].iloc[0]]
    df = mixed.assign(run_id=[f"r{n}" for n in range(len(mixed))])
    own = pd.concat(one.assign(run_id=run_id) for run_id in df["run_id"])
    more = pd.concat([own, one.assign(run_id="elsewhere", n_tokens=one["n_tokens"] + 1)])
    for made in (recipe_means, recipes_page.claim):
        assert str(made(df, more)) == str(made(df, own))
    same = df[(df["recipe"] == "improved") & (df["seed"] == 0)]
    assert beside(same, more).equals(beside(same, own))
    alone = beside(df.iloc[[2, 4]], own.assign(template="only"))  # one template: no interval
    assert len(alone) == 1 and "nan" not in forest(alone) and "–" not in forest(alone)


def test_a_switched_choice_beside_the_whole_recipe(mixed, fake_grid, fake_runs):
    """One that adds to every prompt's loss is told from the recipe, one that adds to half of them alike is not."""
    prompts = finished_run.load_prompts(results.tidy(fake_grid, fake_runs / "runs"), fake_runs / "runs")
    one = prompts[prompts["run_id"] == prompts["run_id"].iloc[0]].reset_index(drop=True)
    choices = [{}, {"aux_coef": 0.0}, {"warmup": 0.0}, {"sinks": "keep"}]
    signs = one["template"].astype("category").cat.codes % 2 * 2 - 1
    extra = [0.0, 0.2, 0.3 * signs, -0.1]
    told = [mixed.iloc[2].to_dict() | choice | {"run_id": f"r{n}"} for n, choice in enumerate(choices)]
    sums = [
        one.assign(run_id=f"r{n}", ce_spliced_sum=one["ce_spliced_sum"] + add * one["n_tokens"])
        for n, add in enumerate(extra)
    ]
    losses = [s.eval("(ce_spliced_sum - ce_clean_sum).sum() / n_tokens.sum()") for s in sums]
    df = mixed.iloc[[2] * len(told)].assign(**{n: [row[n] for row in told] for n in mixed})
    df = df.assign(delta_loss=losses, kl=math.nan)
    found = beside(df, pd.concat(sums)).set_index("choice")
    assert found.loc["aux_coef = 0.0", ["more", "low", "high"]].to_list() == pytest.approx([0.2] * 3)
    assert found.loc["sinks = keep", ["more", "low", "high"]].to_list() == pytest.approx([-0.1] * 3)
    assert found.loc["warmup = 0.0", "low"] < 0 < found.loc["warmup = 0.0", "high"]
    lines = verdict(found.reset_index()).splitlines()
    assert lines == [
        "- Loses more: `aux_coef = 0.0` (+0.200 [+0.200, +0.200]) nats/token.",
        "- Loses less: `sinks = keep` (−0.100 [−0.100, −0.100]) nats/token.",
        "- No measurable difference from the full recipe, within the intervals of [the figure](#fig-choices){.ref}: "
        "`warmup = 0.0`.",
        "",
        "Corrected for 3 comparisons (Holm, 5%).",
    ]
    close = pd.DataFrame({"choice": ["a", "b"], "more": 0.1, "low": 0.01, "high": 0.19, "p": [0.06, 0.04]})
    assert "- Loses more: `b`" in verdict(close) and "{.ref}: `a`" in verdict(close)
    labels = re.findall(r'class="label">([^<]*)<', forest(found.reset_index()))
    assert 'id="fig-choices"' in forest(found.reset_index())
    assert labels[0] == found["more"].idxmax() and set(labels) - {""} == set(found.index)
    assert beside(df.iloc[:1], sums[0]).empty
    with pytest.raises(ResultsError, match="more than one setting"):
        beside(df.assign(k=[64, 64, 64, 32]), pd.concat(sums))
    with pytest.raises(ResultsError, match="only equal seeds can be paired"):
        beside(df.assign(seed=[0, 0, 0, 1]), pd.concat(sums))


def test_the_recipes_page_is_made_from_kept_tables(mixed, fake_grid, fake_runs, tmp_path):
    assert "`make recipes` does it" in recipes_page.page(tmp_path)
    df = results.tidy(fake_grid, fake_runs / "runs")
    pairs = df[df["k"] == 64].iloc[[0, 1, 2, 3]]
    recipes = [{"recipe": "published"}] * 2 + [{**RECIPES["improved"], "recipe": "improved"}] * 2
    values = {
        name: [(row | new)[name] for row, new in zip(pairs.to_dict("records"), recipes, strict=True)] for name in df
    }
    kept = pairs.assign(**values).assign(arch="BatchTopK", expansion=8, seed=[0, 1, 0, 1])
    prompts = finished_run.load_prompts(df, fake_runs / "runs")
    folder = tmp_path / "results/recipes"
    results.write_tables(kept, folder, prompts[prompts["run_id"].isin(kept["run_id"])])
    page = recipes_page.page(tmp_path)
    old, new = (kept[kept["recipe"] == recipe]["kl"].mean() for recipe in ("published", "improved"))
    assert f"{100 * new / old:.1f}% of it" in page and "`make ablation` does it" in page
    path = folder / "results_prompts.csv"
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(ResultsError, match=r"results_prompts\.csv"):
        recipes_page.page(tmp_path)
