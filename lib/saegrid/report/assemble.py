"""Every page and include of the report, written from the tables and the runs' folders."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from saegrid.config.grid import Grid
from saegrid.experiment import finished_run, pca_table, results
from saegrid.report import library_page
from saegrid.report.figures import charts
from saegrid.report.pages import home_page
from saegrid.report.pages.run_pages import write_committed_parts, write_origin_pages, write_run_pages
from saegrid.report.site import HOME, front_matter, pages
from saegrid.storage.atomic import write_text


def make(grid: Grid, root: str | Path = ".", runs_dir: str | Path | None = None) -> None:
    """Write the home page, a page per run of the grid, their index, and the generated parts of committed pages.

    Reads the grid's tables (`results.make`) and the runs' folders; writes `index.qmd` and `report/`.
    Raises `ResultsError` if a table or a run's file is missing.
    """
    root = Path(root)
    runs_dir = root / (runs_dir or grid.runs_dir)
    report = root / "report"
    df = results.read_tidy(root / grid.results_dir)
    prompts = finished_run.load_prompts(df, runs_dir)
    beside = pca_table.read(root / grid.results_dir)
    stable = results.read_stability(root / grid.results_dir)
    home = home_page.model_card(df, prompts, budget=grid.l0_budget, links="report/", baseline=beside, stable=stable)
    write_text(root / "index.qmd", front_matter(home_page.title(df), HOME[1]) + home)
    write_origin_pages(df, prompts, grid.l0_budget, report, baseline=beside, stable=stable)
    write_committed_parts(root)
    write_run_pages(df, runs_dir, report / "runs")
    write_text(report / "library.qmd", library_page.page(pages(root)["report/library.qmd"]))
    charts.write_library(report)
    (report / "data").mkdir(exist_ok=True)
    for name in (name for name in results.TABLES if (root / grid.results_dir / name).exists()):
        shutil.copyfile(root / grid.results_dir / name, report / "data" / name)


def execute(grid: Grid, names: Iterable[str] = ()) -> None:
    """Execute the site's notebooks (or those named) into `report/`, as the workflow does once a grid has finished."""
    import papermill

    Path("report").mkdir(exist_ok=True)
    places = {"results_dir": grid.results_dir, "runs_dir": grid.runs_dir}
    for name in names or [Path(page).stem for page in pages() if page.endswith(".ipynb")]:
        own = {} if name == "latents" else places
        papermill.execute_notebook(f"notebooks/{name}.ipynb", f"report/{name}.ipynb", own, progress_bar=False)
