import pytest

from saegrid import card, findings, results
from saegrid.ablation import by_recipe, recipe_section
from saegrid.recipes import RECIPES


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
    table = by_recipe(mixed)
    assert list(table["recipe"]) == ["published", "improved", "improved but aux_coef = 0.0"]
    assert list(table["delta_loss"]) == pytest.approx([2.5, 0.15, 0.5])
    assert list(table["delta_range"]) == ["2.000 to 3.000", "0.100 to 0.200", ""]
    assert list(table["seeds"]) == [2, 2, 1]


def test_the_card_compares_recipes_where_there_is_more_than_one(mixed):
    section = recipe_section(mixed)
    assert "improved but aux_coef = 0.0" in section and section in card.model_card(mixed)
    assert recipe_section(mixed.iloc[:2]) == ""
    assert "## Recipes" not in card.model_card(mixed.iloc[:2])


def test_the_published_findings_are_tested_on_the_published_recipe_alone(mixed):
    alone, all_rows = findings.all_findings(mixed.iloc[:2]), findings.all_findings(mixed)
    assert [finding.sentence for finding in alone] == [finding.sentence for finding in all_rows]
    assert all((finding.evidence["recipe"] == "published").all() for finding in all_rows)
