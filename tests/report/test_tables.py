"""Tables show every value with its unit, and what is missing as missing."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from saegrid.analysis import findings, numbers, published_sweep, selection
from saegrid.config import settings
from saegrid.core import sae
from saegrid.experiment import finished_run, results
from saegrid.report import card, tables
from saegrid.report.pages import findings_page, home_page, run_pages

HEADS = ["Key Findings", "Recommendation", "Results", "SAE Architecture", "Loading SAEs", "File naming"]
HEADS += ["Training details"]
"""Sections of the published card, in its order."""


def parse(text):
    return ElementTree.fromstring(text.removeprefix("```{=html}\n").rstrip("`\n"))


@pytest.mark.parametrize(
    ("value", "name", "shown"),
    [
        (0.2469, "delta_loss", "0.247"),
        (-0.0141, "delta_loss", "−0.014"),
        (0.000479, "nmse", "0.000479"),
        (1.4e-5, "nmse", "1.40e-05"),
        (12.94, "dead_pct", "12.9"),
        (7168, "d_sae", "7,168"),
        (5748.3, "val_mse", "5748"),
        (0.0, "dead_pct", "0.0"),
        (None, "k", "–"),
        (pd.NA, "k", "–"),
        (math.nan, "delta_loss", "–"),
        ("TopK", "arch", "TopK"),
    ],
)
def test_numbers(value, name, shown):
    assert numbers.number(value, name) == shown


def test_a_missing_value_is_a_dash_and_never_zero():
    df = published_sweep.rows()
    table = parse(tables.html_table(df, ["name", "k", "l0"], caption="Published"))
    rows = table.findall(".//tbody/tr")
    assert "".join(rows[0].findall("td")[1].itertext()) == "–"
    assert rows[0].findall("td")[1].get("data-value") is None
    assert "".join(rows[5].findall("td")[0].itertext()) == "–"
    assert rows[5].findall("td")[1].get("data-value") == "77.0"


def test_units_headers_caption_and_best():
    df = published_sweep.rows()
    table = parse(tables.html_table(df, ["name", "delta_loss", "frac_rec_pct"], caption="A & B"))
    heads = ["".join(head.itertext()) for head in table.findall(".//thead/tr/th")]
    assert heads == ["Run", "Delta loss nats/token", "frac_rec %"]
    assert all(head.get("scope") == "col" for head in table.findall(".//thead/tr/th"))
    assert table.find(".//caption").text.startswith("A & B")
    best = [cell for cell in table.iter("td") if cell.find("strong") is not None]
    assert [cell.find("strong").text for cell in best] == ["0.247", "92.9"]  # the dense JumpReLU rows are no candidates
    assert all(cell.find("span").get("aria-label") == "best" for cell in best)


def test_columns_that_hold_nothing_are_left_out():
    df = published_sweep.rows().assign(theta_over_rms=math.nan)
    table = parse(tables.html_table(df, ["name", "theta_over_rms", "nothing", "nmse"], caption="c"))
    assert len(table.findall(".//thead/tr/th")) == 2


def test_rows_beside_published_ones_name_no_origin(fake_grid, fake_runs):
    same, _ = selection.same_settings(results.tidy(fake_grid, fake_runs / "runs"), published_sweep.rows())
    assert len(same) > 2
    heads = [head["text"] for head in tables.headers(same)]
    assert heads == [settings.label(row) for row in same.to_dict("records")]


def test_names_lead_to_their_runs_and_cells_carry_full_precision(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    table = parse(tables.html_table(df, ["name", "delta_loss"], caption="c", links="runs/"))
    assert [link.get("href") for link in table.iter("a")] == [f"runs/{run_id}.html" for run_id in df["run_id"]]
    assert [float(cell.get("data-value")) for cell in table.iter("td")] == list(df["delta_loss"])


def test_what_a_notebook_shows_is_markdown_and_no_html_output():
    text = tables.html_table(published_sweep.rows(), ["name", "nmse"], caption="c")
    assert text._repr_markdown_() == text
    assert not hasattr(text, "_repr_html_")
    assert len(repr(text)) < 40


def test_text_is_escaped():
    df = published_sweep.rows().head(1).assign(name="<b>&")
    table = parse(tables.html_table(df, ["name", "nmse"], caption="<i>"))
    head = table.find(".//tbody/tr/th")
    assert head.text == "BatchTopK 4x, K = 220" and head.find("span").text == head.get("data-text") == "<b>&"


def test_run_metrics_and_files(fake_grid, fake_runs):
    row = results.tidy(fake_grid, fake_runs / "runs").iloc[0]
    text = tables.run_metrics(row)
    assert f"| Delta loss | {row['delta_loss']:.3f} | nats/token |" in text
    folder = fake_runs / "runs" / row["run_id"]
    files = tables.run_files(folder)
    assert f"| `metrics.json` | {(folder / 'metrics.json').stat().st_size:,} |" in files


def test_the_card_holds_the_recommended_run_and_every_verdict(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    prompts = finished_run.load_prompts(df, fake_runs / "runs")
    text = home_page.model_card(df, prompts)
    best = selection.recommend(df)
    assert f"**Recommended: {settings.label(best)}** (`{best['name']}`)" in text
    assert "with the lowest KL of" in text and f"a KL of **{best['kl']:.3f} nats/token** (95% interval" in text
    older = home_page.model_card(df.assign(kl=math.nan), prompts.drop(columns="kl_sum"))
    assert f"it costs the model **{best['delta_loss']:.3f} nats/token** (95% interval" in older
    assert "with the lowest delta loss of" in older and ">KL" not in older
    assert f"{best['name']}.pt" in text
    for finding in findings.all_findings(df, prompts):
        assert findings_page.CLAIMS[finding.number].text in text
        assert findings_page.effect_text(finding) in text
    assert "<a " not in text  # without links it stands alone
    order = [text.index(f"\n## {head}\n") for head in HEADS]
    assert order == sorted(order)
    assert f"{len(df)} runs, BatchTopK, TopK and JumpReLU at 4x, 8x and 16x with K of 64, 128 and 220" in text


def test_the_arithmetic_on_the_method_page_is_computed():
    text = home_page.published_note()
    for number in ("[47.460, 47.584]", "[3.201, 3.215]", "at most 3.48", "at least 4.19"):
        assert number in text


def test_dense_runs_get_no_star_and_the_table_says_so():
    df = pd.DataFrame({"name": ["sparse", "dense"], "l0": [10.0, 900.0], "d_sae": 1000, "delta_loss": [0.5, 0.01]})
    table = parse(tables.html_table(df, ["name", "l0", "delta_loss"], caption="c"))
    assert [cell.find("strong").text for cell in table.iter("td") if cell.find("strong") is not None] == ["0.500"]
    assert "of runs that fire less than 10%" in table.find(".//caption").text


def test_controls_get_no_star_and_the_table_says_so():
    df = pd.DataFrame({"name": ["a", "b", "c"], "l0": 10.0, "d_sae": 1000, "dead_pct": [9.0, 8.0, 0.0]})
    df["freeze"] = ["none", "none", "decoder"]
    table = parse(tables.html_table(df, ["name", "dead_pct"], caption="c"))
    assert [cell.find("strong").text for cell in table.iter("td") if cell.find("strong") is not None] == ["8.0"]
    assert table.find(".//caption").text.endswith("of a column, of runs that are not controls.")


def test_settings_of_both_sweeps_are_shown_in_pairs():
    published = published_sweep.rows()
    own = published.head(2).assign(source="own", run_id=["a", "b"])
    table = parse(tables.beside(selection.same_settings(own, published)[0], ["name", "source", "nmse"], links="runs/"))
    assert [row.find("td").text for row in table.findall(".//tbody/tr")] == ["own", "published"] * 2
    assert [link.get("href") for link in table.iter("a")] == ["runs/a.html", "runs/b.html"]
    assert "share no setting" in tables.beside(own.head(0), ["name"])


def test_numbers_of_a_column_have_the_same_decimals():
    assert numbers.aligned([7.9812, 13.05, 0.0228, None], "val_mse") == ["7.981", "13.050", "0.023", "–"]
    assert numbers.aligned([0.001, 1.4e-5], "nmse") == ["0.001000", "0.000014"]
    assert numbers.aligned([5748.3], "val_mse") == ["5748"] and numbers.aligned(["–", "a"], "nmse") == ["–", "a"]


def test_the_cards_tables_have_the_published_value_beside_ours(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    first, second, _ = card.result_tables(df, "runs/").split("```\n\n")
    heads = ["".join(head.itertext()) for head in parse(first).findall(".//thead/tr")[1]]
    assert heads[:8] == ["SAE", "Exp", "K", "Val MSE", "NMSE", "Dead %", "Delta Loss", "Frac Rec %"]
    heads = ["".join(head.itertext()) for head in parse(second).findall(".//thead/tr")[1]]
    assert heads[:5] == ["SAE", "Exp", "Threshold", "L0", "Val MSE"]
    shown = {row.find("th").get("data-text"): row for table in (first, second) for row in parse(table).iter("tr")
             if row.find("th") is not None and row.find("th").get("data-text")}  # fmt: skip
    assert len(shown) == len(df)
    for row in published_sweep.rows().to_dict("records"):
        cell = next(cell for cell in shown[row["name"]] if cell.get("data-column") == "nmse")
        assert cell.find("span[@class='theirs']").find("span").tail == f"{row['nmse']:.6f}"
        assert float(cell.get("data-value")) == df.set_index("name").loc[row["name"], "nmse"]
    assert shown["TopK_exp8x_k64"].find(".//span[@class='theirs']") is None


def test_the_class_is_the_source(fake_grid, fake_runs):
    source = Path(sae.__file__).read_text()
    shown = card.class_source(["Matryoshka"])
    for part in shown.split("\n\n\n"):
        for method in part.split("\n\n    def "):
            assert method in source
    assert [line for line in shown.splitlines() if line.startswith("class ")] == [
        "class SAE(nn.Module):", "class BatchTopK(SAE):", "class Matryoshka(BatchTopK):",
    ]  # fmt: skip


def test_the_recommended_run_is_that_of_the_grids_budget(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    sparse, denser = selection.recommend(df, 64), selection.recommend(df, 128)
    assert sparse["k"] == 64 and denser["k"] == 128
    for budget, best in ((64, sparse), (128, denser)):
        text = home_page.model_card(df, budget=budget)
        assert f"**Recommended: {settings.label(best)}**" in text
        assert f"of the runs within an L0 of {budget}" in text
    assert "none is within an L0 of 8" in home_page.recommendation(df, budget=8)


def test_where_every_run_is_dense_none_is_called_sparse_and_a_single_run_is_in_the_singular(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    one = df[df["k"].notna()].head(1)
    assert "that fire less than 10%" in home_page.recommendation(one, budget=64)
    assert "that fire less than 10%" not in home_page.recommendation(one.assign(d_sae=256), budget=64)
    assert home_page.swept_text(one).startswith("1 run, ")
    assert "It is the only run that is ranked" in run_pages.summary(one.iloc[0].to_dict(), one)


def test_runs_of_half_the_published_steps_are_called_undertrained(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    for steps, undertrained in ((790, True), (published_sweep.STEPS, False)):
        own = findings.all_findings(df.assign(steps=steps))
        text = findings_page.steps_text(own)
        assert f"runs of {steps:,} training steps, the published ones on runs of about 5,600" in text
        assert ("undertrained" in text) == undertrained
        section = findings_page.finding_section(own[0], findings.all_findings(published_sweep.rows())[0])
        assert f"It rests on {steps:,} training steps" in section
    assert findings_page.steps_text(findings.all_findings(published_sweep.rows())) == ""
