"""Pages of a grid over two layers and two texts, from synthetic runs: nothing is ranked or averaged across them."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic_runs import write_synthetic_run

from saegrid.analysis import selection
from saegrid.config.grid import Grid
from saegrid.experiment import finished_run, results
from saegrid.report import assemble, layers
from saegrid.report.pages import home_page, run_pages, trust_section
from saegrid.report.publish import model_card

ROOT = Path.cwd()
ORIGINS = ["layer 6, gsm_symbolic", "layer 6, python_docs", "layer 12, gsm_symbolic", "layer 12, python_docs"]


@pytest.fixture(scope="module")
def grid():
    return Grid(
        name="two",
        title="Two layers and two texts",
        results_dir="results/two",
        constants={"train_tokens": 1000, "val_tokens": 200, "threads": 1, "expansion": 1, "k": 64},
        axes=[
            {
                "layer": [6, 12],
                "dataset": ["embedded:gsm_symbolic", "embedded:python_docs"],
                "recipe": ["published", "improved"],
                "arch": ["TopK", "BatchTopK"],
                "seed": [0, 1],
            }
        ],
    )


@pytest.fixture(scope="module")
def made(grid, tmp_path_factory):
    """The project with its tables, and their rows. The synthetic rows are alike at each origin, but for the layer's
    share of the loss."""
    root = tmp_path_factory.mktemp("layers")
    shutil.copy(ROOT / "_quarto.yml", root)
    for run in grid.runs():
        write_synthetic_run(root / "runs" / run.run_id, run)
    results.make(grid, root)
    df = results.read_tidy(root / grid.results_dir)
    df["kl"] *= df["layer"] / 6
    return root, df, finished_run.load_prompts(df, root / "runs")


def test_the_report_has_a_page_over_all_and_one_for_each(made, grid):
    root, _, _ = made
    assemble.make(grid, root)
    names = sorted(path.name for path in (root / "report/layers").glob("*.qmd"))
    assert names == sorted(f"{layers.slug(origin)}.qmd" for origin in ORIGINS)
    page = (root / "report/layers.qmd").read_text()
    assert 'title: "Layers"' in page and "## Which layer is hardest?" in page and page.count("<figure") >= 10
    for name in names:
        text = (root / "report/layers" / name).read_text()
        assert "Recommended:" in text and "../runs/" in text and "](../layers.qmd)" in text
        assert set(re.findall(r"of layer (\d+) and judged", text)) == {name.split("-")[1]}
    home = (root / "index.qmd").read_text()
    assert "## At each layer and text" in home and "Recommended:" not in home and "report/layers.qmd" in home
    assert all(f'href="report/layers/{name.replace(".qmd", ".html")}"' in home for name in names)


def test_a_grid_of_one_origin_has_no_such_pages(made, grid):
    root, df, prompts = made
    run_pages.write_origin_pages(df, prompts, 64, root / "report")
    assert (root / "report/layers.qmd").exists()
    run_pages.write_origin_pages(selection.first_origin(df), prompts, 64, root / "report")
    assert not (root / "report/layers.qmd").exists() and not (root / "report/layers").exists()
    text = home_page.model_card(selection.first_origin(df), prompts)
    assert "## Key Findings" in text and "At each" not in text


def test_each_origins_numbers_are_its_own(made):
    _, df, prompts = made
    text = layers.recommended(df, prompts, 64)
    for origin, rows in selection.by_origin(df).items():
        best = selection.recommend(rows)
        row = re.search(rf'<tr><th scope="row">{origin}</th>.*?</tr>', text)[0]
        assert f"<td>{best['kl']:.3f}" in row
    over = "within an L0 of 8, or the sparsest where none is within it,"
    assert "or the sparsest" not in text and over in layers.recommended(df, prompts, 8)
    parts = selection.by_origin(df)
    low, high = (selection.recommend(parts[name])["kl"] for name in (ORIGINS[0], ORIGINS[2]))
    assert high == pytest.approx(2 * low)


def test_a_run_is_placed_among_those_of_its_origin(made):
    _, df, _ = made
    row = df[(df["layer"] == 12) & (df["dataset"] == "embedded:python_docs")].iloc[0].to_dict()
    assert f"of the 8 runs at {ORIGINS[3]} that are ranked" in run_pages.summary(row, df)
    also = ["layer", "dataset"]
    assert run_pages.title(row, also).endswith("layer 12, dataset embedded:python_docs, seed 0")


def test_stars_are_given_within_an_origin(made):
    from saegrid.report import tables

    _, df, _ = made
    best, note = tables.best_values(df, ["kl"])
    assert note == " ★ marks the best value of a column for each source of rows."
    starred = df.loc[sorted(best["kl"])]
    assert set(starred["layer"]) == {6, 12} and len(selection.by_origin(starred)) == 4
    text = tables.html_table(df, ["name", "kl"], caption="All")
    assert f"TopK 1x, K = 64, {ORIGINS[1]}" in text


def test_stability_and_the_released_card_are_by_origin(made):
    _, df, prompts = made
    seeds = df[df["seed"] == 0].assign(seeds=2, pairs=1, stable_energy_pct=1.0, matched_cosine=0.3, random_cosine=0.1)
    seeds = seeds.assign(start_cosine=0.5, stable_pct=seeds["layer"] / 10.0)
    seeds = seeds.assign(**{f"stable_pct_{end}": float("nan") for end in ("low", "high")})
    text = trust_section.stability(seeds)
    assert "- **Layer 6, gsm_symbolic**: 0.60% of the live latents" in text
    assert "- **Layer 12, python_docs**: 1.20% of the live latents" in text and "<figure" not in text
    files = {run_id: f"seed/{run_id}" for run_id in df["run_id"]}
    card = model_card.readme(df, prompts, files, "Two layers")
    assert "## At each layer and text" in card and card.count('<tr><th scope="row">layer') == 4


@pytest.mark.parametrize("name", ["findings", "frontier", "results"])
def test_the_notebooks_take_several_origins(made, grid, name, monkeypatch):
    """Their cells, run in this process, on two of the origins. Each figure and list has both."""
    root, _, _ = made
    monkeypatch.chdir(root)
    axes = [block | {"dataset": ["embedded:gsm_symbolic"]} for block in grid.axes]
    results.make(grid.model_copy(update={"axes": axes, "results_dir": "results/one_text"}))
    scope, shown = {}, []
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *before, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(before, []), name, "exec"), scope)
            if isinstance(last, ast.Expr):
                shown.append(str(eval(compile(ast.Expression(last.value), name, "eval"), scope)))
            else:
                exec(compile(ast.Module([last], []), name, "exec"), scope)
            scope.update({"results_dir": "results/one_text", "runs_dir": "runs"})
    text = "\n".join(shown)
    for origin in ("Layer 6", "Layer 12"):
        assert text.count(f'<p class="origin">{origin}</p>') == {"findings": 0, "frontier": 6, "results": 1}[name]
    assert text.count("- **Everywhere**: ") == (5 if name == "findings" else 0)  # the rows are alike
