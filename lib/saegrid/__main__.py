"""Commands: `python -m saegrid list | collect | pca | stability | tables | latents | pages | site | mend | publish`.

A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from saegrid.config.grid import Grid, load_grid
from saegrid.data.language_model import lm_shape
from saegrid.data.prompts import check_dataset
from saegrid.errors import ConfigError, SaegridError
from saegrid.experiment.preflight import check
from saegrid.storage.hub_access import local_folder

COMMANDS = {
    "collect": "make an activation store of a grid",
    "pca": "measure PCA, the baseline, on one store of a grid",
    "stability": "match the latents of runs that differ in their seed, on one store",
    "list": "the runs of a grid: id, store, and whether it has finished",
    "tables": "write the CSV tables of a finished grid",
    "latents": "describe the recommended run's latents, for the report",
    "pages": "write the report's pages of a grid that has its tables",
    "mend": "drop what is damaged, so that the next run makes it again",
    "site": "render the website, after a grid's pages if one is named: Quarto where it is on PATH, else smalldocs",
    "publish": "build a model repository of a finished grid, and upload it",
}


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="saegrid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help).add_argument("grid", type=Path, nargs="?" if name == "site" else None)
    for name in ("collect", "pca", "stability"):
        commands.choices[name].add_argument("store_id", help="one of the grid's stores, as `list` shows them")
    publish = commands.choices["publish"]
    publish.add_argument("--repo", default="", metavar="ORG/NAME", help="model repository on the Hub")
    publish.add_argument("--space", default="", metavar="ORG/NAME", help="static Space on the Hub, for the site")
    publish.add_argument("--folder", default="", metavar="DIR", help="where to build; default: published/<grid's name>")
    publish.add_argument("--dry-run", action="store_true", help="build and show what would go where, and send nothing")
    early = {"stability": "", "tables": "", "site": "; make tables, latents and pages of the others first"}
    for name, more in early.items():
        help = f"leave out runs that have not finished{more}"
        commands.choices[name].add_argument("--finished", action="store_true", help=help)
    try:
        _run(parser.parse_args(arguments))
    except SaegridError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that is read-only, a pipe that was closed
        print(f"{type(error).__name__}: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Reports command-line mistakes in one line, too."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows how it is called)")


def _run(options: argparse.Namespace) -> None:
    grid = _checked(options.grid) if options.grid else None
    if grid and getattr(options, "finished", False):
        grid = grid.finished()
    if options.command == "site":
        _site(grid, options.finished)
        return
    assert grid
    if options.command == "list":
        _list(grid)
    elif options.command == "tables":
        from saegrid.experiment import results

        results.make(grid)
    elif options.command == "latents":
        from saegrid.report.pages import latents_page  # imports torch

        latents_page.make(grid)
    elif options.command == "mend":
        from saegrid.experiment.mend import mend

        for line in mend(grid):
            print(line)
    elif options.command == "pages":
        from saegrid.experiment import results

        results.read_tidy(grid.results_dir)  # reports a missing table before the plots' packages are imported
        from saegrid.report import assemble

        assemble.make(grid)
    elif options.command == "publish":
        from saegrid.report.publish import upload

        upload.publish(grid, options.repo, options.space, options.folder, options.dry_run)
    else:
        _of_store(grid, options.store_id, options.command)


def _checked(grid_file: Path) -> Grid:
    """Load a grid file, and check each run against its model and dataset if these are on this machine."""
    grid = load_grid(grid_file)
    for run in grid.runs():
        check_dataset(run)
        if run.model.startswith("embedded:") or local_folder("model", run.model):
            run.check_shape(*lm_shape(run))
    return grid


def _site(grid: Grid | None, early: bool) -> None:
    """Render the website. `early`: before the grid's end, so what the workflow makes then is made first."""
    from saegrid.report import site

    if grid:
        from saegrid.report import assemble

        if early:
            from saegrid.experiment import results
            from saegrid.report.pages import latents_page  # imports torch

            results.make(grid)
            latents_page.make(grid)
            assemble.execute(grid)
        assemble.make(grid)
    print(site.render(Path()))


def _list(grid: Grid) -> None:
    for run in grid.runs():
        state = "finished" if (Path(run.runs_dir) / run.run_id / "metrics.json").exists() else "to do"
        print(f"{run.run_id}  {run.store_id}  {state}")


def _of_store(grid: Grid, store_id: str, command: str) -> None:
    """Run `collect`, `pca` or `stability`."""
    stores = {run.store_id: run for run in grid.runs()}
    if store_id not in stores:
        raise SaegridError(f"store_id = {store_id!r}: the grid {grid.name} has {', '.join(stores)}")
    if command == "stability":
        from saegrid.experiment import stability

        stability.make(grid, store_id)
        return
    check(stores[store_id])  # also for a model on the Hub
    from saegrid.experiment.run import prepare_store  # imports torch

    store = prepare_store(stores[store_id], also=stores.values())
    if command == "pca":
        from saegrid.experiment import pca

        pca.make(stores[store_id], store)


if __name__ == "__main__":
    sys.exit(main())
