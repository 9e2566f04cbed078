"""Pages made from the runs and the tables: the home page, the run pages and their index, and the generated parts of
committed pages."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.numbers import counted, number
from saegrid.analysis.scaling import MEASURES
from saegrid.config import settings
from saegrid.config.recipes import described
from saegrid.experiment import finished_run
from saegrid.report import bibliography, layers
from saegrid.report.figures.plots import setting
from saegrid.report.pages import home_page, recipes_page
from saegrid.report.site import front_matter
from saegrid.report.tables import Markdown, html_block, html_table, markdown
from saegrid.storage.atomic import write_text
from saegrid.storage.checksums import check_sum, read_json

INDEX_COLUMNS = ["name", "l0", "fvu_no_sink", "dead_pct", "kl", "delta_loss", "frac_rec_pct"]
LAYERS = "Layers"
"""Title of the page about several layers, texts, sites or models."""
LABELS = {"arch": "architecture", "k": "K"}
"""Axes that readers know by a name other than the parameter's."""


def write_committed_parts(root: str | Path) -> None:
    """Write the includes of `method.qmd` and `recipes.qmd`: they come only from committed tables and are committed."""
    folder = Path(root) / "results"
    folder.mkdir(exist_ok=True)
    write_text(folder / "_published.md", home_page.published_note())
    write_text(folder / "_recipes.md", recipes_page.page(root))
    if (papers := Path(root) / "references.bib").exists():
        write_text(folder / "_references.md", bibliography.references(papers))


def write_origin_pages(df: pd.DataFrame, prompts: pd.DataFrame, budget: int, report: Path, **beside: Any) -> None:
    """If the runs have several origins (layers, texts, …): a page about all of them, and one page for each.

    Deletes these pages of an earlier grid. `beside`: `baseline` and `stable`, as in `home_page.model_card`.
    """
    shutil.rmtree(report / "layers", ignore_errors=True)
    (report / "layers.qmd").unlink(missing_ok=True)
    origins = selection.by_origin(df)
    if len(origins) < 2:
        return
    (report / "layers").mkdir(parents=True)
    what = layers.words(df)
    text = f"Each {what} is judged by itself; controls are left out."
    page = layers.section(selection.without_controls(df), prompts, pages="layers/", level="##")
    write_text(report / "layers.qmd", markdown(front_matter(LAYERS), text, "## What holds where", page))
    for name, rows in layers.by_text(df).items():
        page = home_page.origin_page(rows, prompts, budget, "../", **beside)
        links = f"[Every {what}](../layers.qmd)"
        write_text(
            report / "layers" / f"{layers.slug(name)}.qmd", markdown(front_matter(name.capitalize()), links, page)
        )


def write_run_pages(df: pd.DataFrame, runs_dir: str | Path, folder: Path) -> None:
    """Write every run's executed notebook as a page, and an index. Deletes the pages of other grids' runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ipynb"):
        if old.stem not in set(df["run_id"]):
            old.unlink()
    rows = df.to_dict("records")
    also = settings.unusual(rows)
    for n, row in enumerate(rows):
        path = Path(runs_dir) / row["run_id"] / finished_run.NOTEBOOK
        with finished_run.advising():
            check_sum(path)
            notebook = read_json(path)
        page = run_page(notebook, title(row, also), markdown(summary(row, df), navigation(rows, n)))
        page = nbformat.writes(nbformat.from_dict(page))  # cells as lists of lines: Quarto reads only those
        write_text(folder / f"{row['run_id']}.ipynb", page + "\n")
    timing, curves = finished_run.load_timing(df, runs_dir), finished_run.load_curves(df, runs_dir)
    write_text(folder / "index.qmd", index_page(df, timing, curves))


def run_page(notebook: dict[str, Any], page_title: str, nav: str) -> dict[str, Any]:
    """An executed notebook as a page of the site.

    It gets a title and links to its neighbours. Its first heading, progress bars and widgets are removed; HTML outputs
    become raw Markdown, and figures get a text alternative: the page is the same and fetches nothing in both renderers.
    """
    page = copy.deepcopy(notebook)
    page.setdefault("metadata", {}).pop("widgets", None)
    heading = "the run"
    for n, cell in enumerate(page["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines = source.split("\n")
            if n == 0 and lines[0].startswith("# "):
                lines = lines[1:]
            cell["source"] = "\n".join(lines).strip("\n")
            heading = next((line.lstrip("# ") for line in lines if line.startswith("## ")), heading)
        elif cell["cell_type"] == "code":
            cell["outputs"] = [output for output in map(_portable, cell.get("outputs", [])) if output]
            options = []
            if "parameters" in cell["metadata"].get("tags", []):
                options = ["code-fold: true", 'code-summary: "All parameters and their defaults"']
            if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
                alt = f"{heading} of {page_title}; the text around the figure has its numbers"
                options.append(f"fig-alt: {json.dumps(alt, ensure_ascii=False)}")
            cell["source"] = "".join(f"#| {option}\n" for option in options) + source
    added = [{"cell_type": "raw", "id": "page-front", "metadata": {}, "source": front_matter(page_title)}]
    added += [{"cell_type": "markdown", "id": "page-nav", "metadata": {}, "source": nav}]
    page["cells"] = added + page["cells"]
    return page


def title(row: dict[str, Any], also: Sequence[str] = ()) -> str:
    """A run in words: `TopK, K = 64, 8x, seed 0`; its recipe too, unless that is the published one.

    `also`: further parameters to name, which differ between the grid's runs (`settings.unusual`).
    """
    recipe = described(row)
    parts = [setting(row), f"{row['expansion']}x", *([recipe] if recipe != "published" else [])]
    return ", ".join([*parts, *(f"{label(name)} {row[name]}" for name in also), f"seed {row['seed']}"])


def label(axis: str) -> str:
    """A parameter's name for readers."""
    return LABELS.get(axis, axis.replace("_", " "))


def summary(row: dict[str, Any], df: pd.DataFrame) -> str:
    """A run's results and its place among the runs of its origin, in a sentence or two."""
    origins = settings.origins(df.to_dict("records"))
    origin = origins[settings.origin(row)]
    df = selection.by_origin(df)[origin]
    fit, measure = selection.candidates(df), selection.cost(df)
    moved = f" and moves its predictions by a KL of {number(row['kl'], 'kl')}" if measure == "kl" else ""
    control = [f"{name} = {row[name]}" for name, usual in settings.CONTROLS.items() if row.get(name, usual) != usual]
    text = (
        f"Spliced in, it costs the model **{number(row['delta_loss'], 'delta_loss')} nats/token**{moved} with "
        f"**L0 {number(row['l0'], 'l0')}** of {number(row['d_sae'], 'd_sae')} latents; "
        f"{number(row['dead_pct'], 'dead_pct')}% of them are dead. "
    )
    if control:
        return text + f"It is a control ({', '.join(control)}), and so is not ranked."
    if row["run_id"] not in set(fit["run_id"]):
        return text + f"It fires {selection.DENSE_SHARE_PCT:g}% of its latents or more, and so is not ranked."
    place = 1 + int((fit[measure] < row[measure]).sum())
    front = row["run_id"] in set(selection.pareto(fit, measure)["run_id"])
    ranked = f"It has the lowest {MEASURES[measure]}" if place == 1 else f"By {MEASURES[measure]} it is number {place}"
    ranked = f"{ranked} of the {len(fit)} runs" if len(fit) > 1 else "It is the only run"
    text += f"{ranked} {f'at {origin} ' if origin else ''}that {'are' if len(fit) > 1 else 'is'} ranked"
    return text + (" and lies on the [Pareto set](../frontier.ipynb)." if front else ".")


def navigation(rows: list[dict[str, Any]], n: int) -> Markdown:
    """Links to the previous and next run of the same origin, and to those that differ along only one axis."""
    also = settings.unusual(rows)
    around = ["[All runs](index.qmd) · [CSV](../data/results_tidy.csv) · [Results](../results.ipynb)"]
    here = [place for place, row in enumerate(rows) if settings.origin(row) == settings.origin(rows[n])]
    for other in (rows[place] for place in here[here.index(n) - 1 : here.index(n)]):
        around.insert(0, f"← [{title(other, also)}]({other['run_id']}.ipynb)")
    for other in (rows[place] for place in here[here.index(n) + 1 :][:1]):
        around.append(f"[{title(other, also)}]({other['run_id']}.ipynb) →")
    near: dict[str, list[str]] = {}
    for other in rows:
        differing = settings.differing(rows[n], other)
        if len(differing) == 1:
            near.setdefault(label(differing[0]), []).append(f"[{title(other, also)}]({other['run_id']}.ipynb)")
    lines = [f"- another {axis}: {'; '.join(links)}" for axis, links in near.items()]
    return markdown(
        " · ".join(around), *(["Runs that differ in one setting alone:", "\n".join(lines)] if lines else [])
    )


def index_page(df: pd.DataFrame, timing: pd.DataFrame, curves: pd.DataFrame) -> Markdown:
    """The list of all runs with their learning curves, and their hardware."""
    caption = f"{counted(len(df), 'run')}; each leads to its executed notebook."
    table = html_table(df, INDEX_COLUMNS, caption=caption, links="./", tools="runs", curves=curves)
    said = "One page per run: parameters, curves, numbers, files and hashes."
    machine = ["## Machine, time and versions", home_page.setting_note(df, timing)]
    return markdown(front_matter("Runs"), said, table, *machine)


def _portable(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output that renders the same everywhere; None for progress bars and widgets."""
    if output.get("output_type") == "stream":
        return None if output.get("name") == "stderr" else output
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    html = data.pop("text/html", None)
    if html is not None and "text/markdown" not in data:
        output["data"] = {"text/markdown": html_block("".join(html))}
    return output
