"""A notebook's parameters: the variables of its first cells, as papermill sets them. Unknown ones are refused."""

from __future__ import annotations

import types
from typing import Any

from saegrid.config.run_config import RunConfig, make_config
from saegrid.errors import ConfigError, shown


def config_from_namespace(namespace: dict[str, Any]) -> RunConfig:
    """The config of a notebook whose parameters are the variables of `namespace` (its `globals()`)."""
    return make_config(**_parameters(namespace))


def check_names(namespace: dict[str, Any], *known: str) -> None:
    """Check that the variables of `namespace` are known parameters of the notebook, each of them text.

    Raises:
        ConfigError: names the first variable that is unknown, not text, or begins with `~`.
    """
    for name, value in _parameters(namespace).items():
        if name not in known:
            raise ConfigError(f"{name} = {shown(value)}: no such parameter; known are {', '.join(known)}")
        if not isinstance(value, str):
            raise ConfigError(f"{name} = {shown(value)}: must be text")
        if value.startswith("~"):
            raise ConfigError(f"{name} = {shown(value)}: name the whole path, as ~ is not expanded here")


def _parameters(namespace: dict[str, Any]) -> dict[str, Any]:
    """All variables but modules, functions, classes and IPython's own names."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in ("In", "Out")
        and not isinstance(value, types.ModuleType)
        and not callable(value)
    }
