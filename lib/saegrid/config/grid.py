"""Turn a grid file into a list of run configs. Free of torch."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from saegrid.config import settings
from saegrid.config.recipes import choices
from saegrid.config.run_config import PLACES, RunConfig, check_place, make_config
from saegrid.errors import ConfigError, DamagedError, explain, shown
from saegrid.storage.checksums import read_bytes
from saegrid.storage.hub_access import expanded

MAX_RUNS = 10_000
"""A grid file with more runs is refused."""
MAX_YAML_BYTES = 1 << 20
L0_BUDGET = 64
"""Active latents per token that the recommended run may have, unless the grid says otherwise."""


class _Loader(yaml.SafeLoader):
    """Accepts plain values only and refuses duplicate names."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class Grid(BaseModel):
    """A grid file, `params/*.yaml`: constants, and blocks of axes whose products are the runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name, used for folders."""
    title: str = Field(pattern=r"^[^<>\x00-\x1f]+$", max_length=300)
    """One line of plain text for the report."""
    results_dir: str = "."
    """Where the CSV tables are written."""
    l0_budget: int = Field(L0_BUDGET, ge=1)
    """Most active latents per token of the recommended run."""
    constants: dict[str, Any] = {}
    """Parameters of `RunConfig` that all runs share."""
    axes: list[dict[str, list[Any]]] = Field(min_length=1)
    """Blocks of axes: each block is a full product, the grid is their union."""

    @field_validator("results_dir")
    @classmethod
    def _a_place(cls, value: str) -> str:
        return check_place(value)

    @property
    def runs_dir(self) -> str:
        """Folder of all runs."""
        return check_place(str(self.constants.get("runs_dir", RunConfig.model_fields["runs_dir"].default)))

    def runs(self) -> list[RunConfig]:
        """All runs in file order. Raises `ConfigError` for an invalid, duplicate or contradictory point."""
        runs: dict[str, RunConfig] = {}
        points = sum(math.prod(map(len, block.values())) for block in self.axes)
        if not 1 <= points <= MAX_RUNS:
            raise ConfigError(f"axes: the grid {self.name} has {points} runs; it must have 1 to {MAX_RUNS}")
        for block in self.axes:
            for name in block.keys() & self.constants.keys():
                raise ConfigError(f"{name}: both a constant and an axis of the grid {self.name}")
            for name in block.keys() & PLACES:
                raise ConfigError(
                    f"{name} = {shown(block[name])}: must be a constant of the grid {self.name}, not an axis"
                )
            for point in _points(block):
                run = make_config(**{**self.constants, **point})
                run.check_training()
                if run.run_id in runs:
                    raise ConfigError(f"axes: the grid {self.name} has {run.name} with seed {run.seed} twice")
                runs[run.run_id] = run
        return list(runs.values())

    def finished(self, root: str | Path = ".") -> Grid:
        """The same grid with its finished runs only. Raises `ConfigError` if there is none."""
        points = [point for block in self.axes for point in _points(block)]
        runs = zip(points, self.runs(), strict=True)
        done = [point for point, run in runs if (Path(root) / run.runs_dir / run.run_id / "metrics.json").exists()]
        if not done:
            raise ConfigError(f"grid {self.name}: none of its {len(points)} runs has finished")
        return self.model_copy(update={"axes": [{name: [value] for name, value in point.items()} for point in done]})

    def seeds(self) -> list[list[RunConfig]]:
        """For each setting with at least two seeds, one run per seed in order of the seeds."""
        groups: dict[tuple[Hashable, ...], dict[int, RunConfig]] = {}
        for run in self.runs():
            groups.setdefault(settings.key(run.model_dump()), {}).setdefault(run.seed, run)
        return [[runs[seed] for seed in sorted(runs)] for runs in groups.values() if len(runs) > 1]

    def other_seeds(self, run_id: str) -> list[str]:
        """Ids of the runs that differ from a run in their seed alone."""
        groups = [[run.run_id for run in runs] for runs in self.seeds()]
        return [other for group in groups if run_id in group for other in group if other != run_id]


def _points(block: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The points of one block of axes."""
    for values in itertools.product(*block.values()):
        yield dict(zip(block, values, strict=True))


def load_grid(path: str | Path) -> Grid:
    """Read a grid file. Raises `ConfigError` for a file that is missing, not YAML, or not a grid."""
    try:
        path = expanded(str(path))
        content = yaml.load(read_bytes(path, MAX_YAML_BYTES).decode("utf-8"), Loader=_Loader)
    except DamagedError as error:
        raise ConfigError(f"grid file {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise ConfigError(f"grid file {path}: not YAML: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"grid file {path}: needs name, title, constants and axes")
    try:
        return Grid(**content)
    except ValidationError as error:
        raise ConfigError(f"grid file {path}: {explain(error, Grid.model_fields)}") from None


def papermill_arguments(run: RunConfig) -> str:
    """The `-p` and `-r` options that make papermill run this config, quoted for a shell.

    Strings use `-r` (taken literally), numbers `-p`; parameters at their default or their recipe's value are left out.
    """
    options: list[str] = []
    said = choices(run.model_dump())
    for name, value in run.model_dump(exclude_defaults=True).items():
        if name in said and said[name] == value:
            continue
        options += ["-r" if isinstance(value, str) else "-p", name, str(value)]
    return shlex.join(options)
