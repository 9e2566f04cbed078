"""A grid file's axes to a list of run configs: free of torch."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saegrid.config import RunConfig, explain, make_config
from saegrid.errors import ConfigError
from saegrid.recipes import is_as_recipe_says


class Grid(BaseModel):
    """A grid file, `params/*.yaml`: constants, and blocks of axes whose products are the runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name, used for folders."""
    title: str
    """One line for the report."""
    results_dir: str = "."
    """Where the CSV tables are written."""
    constants: dict[str, Any] = {}
    """Parameters of `RunConfig` that all runs share."""
    axes: list[dict[str, list[Any]]] = Field(min_length=1)
    """Blocks of axes: each block is a full product, the grid is their union."""

    def runs(self) -> list[RunConfig]:
        """All runs, in the order of the file. Raises `ConfigError` for a bad, doubled or contradictory point."""
        runs: dict[str, RunConfig] = {}
        for block in self.axes:
            for name in block.keys() & self.constants.keys():
                raise ConfigError(f"{name}: both a constant and an axis of the grid {self.name}")
            for values in itertools.product(*block.values()):
                run = make_config(**self.constants, **dict(zip(block, values, strict=True)))
                if run.run_id in runs:
                    raise ConfigError(f"axes: the grid {self.name} names {run.name} with seed {run.seed} twice")
                runs[run.run_id] = run
        return list(runs.values())


def load_grid(path: str | Path) -> Grid:
    """Read a grid file. Raises `ConfigError` for a file that is missing, no YAML, or no grid."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"grid file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"grid file {path}: not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"grid file {path}: needs name, title, constants and axes")
    try:
        return Grid(**content)
    except ValidationError as error:
        raise ConfigError(f"grid file {path}: {explain(error)}") from None


def papermill_arguments(run: RunConfig) -> str:
    """The `-p` and `-r` options that make papermill run this config, quoted for a shell.

    Strings go by `-r` (taken as they are), numbers by `-p`; parameters at their default, or as the recipe says, are
    left out.
    """
    options: list[str] = []
    for name, value in run.model_dump(exclude_defaults=True).items():
        if is_as_recipe_says(run.recipe, name, value):
            continue
        options += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    return shlex.join(options)
