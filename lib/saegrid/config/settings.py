"""A setting: all parameters of a run but its seed. The one definition used to pair, group and label runs.

Its origin is the part that says where the rows come from: model, layer, site and text. Runs of different origins are
never ranked or averaged together.

Free of torch and pandas. A row is a run's parameters, from its config or from a table; a table may lack some of them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.recipes import RECIPES, described
from saegrid.config.run_config import PLACES, STORE_FIELDS, RunConfig

MACHINE = {"device", "kernel", "matmul", "threads", "checkpoint_steps"}
"""Parameters that say how a run is computed, not what."""
CONTROLS = {"freeze": "none", "model_init": "trained"}
"""Parameters that make a run a control, with their value in all other runs."""
CHOICES = {*RECIPES["published"], "theta_tie"}
"""Parameters that a recipe decides: together they are one axis, `recipe`."""
AXES = [name for name in RunConfig.model_fields if name not in {*PLACES, *MACHINE, *CHOICES, "threshold_unit", "seed"}]
"""Parameters that distinguish settings. A threshold includes its unit."""
NO_ORIGIN = {"model_init", "lm_dtype", "act_dtype", "train_tokens", "val_tokens"}
"""Parameters of an activation store in which runs may be compared: they change neither the model nor the prompts."""
ORIGIN = [name for name in RunConfig.model_fields if name in STORE_FIELDS - NO_ORIGIN]
"""Parameters that say where a run's rows come from, and on which prompts it is judged."""
USUAL = ["arch", "expansion", "k", "threshold", "recipe"]
"""Axes that every label names; others are named where they vary."""


def axes(row: Mapping[str, Any]) -> dict[str, Hashable]:
    """The setting of a row: one value per axis that the row has; None if not given or the default."""
    values = {name: _plain(row[name]) for name in AXES if name in row}
    if set(row) >= CHOICES:
        values["recipe"] = described(row)
    arch = ARCHITECTURES.get(str(values.get("arch")))
    if arch and values.get("prefixes") == arch.prefixes:
        values["prefixes"] = None
    values |= {name: None for name in ("k", "threshold") if values.get(name) == 0}
    if values.get("threshold") is not None and _plain(row.get("threshold_unit")) not in (None, "absolute"):
        values["threshold"] = f"{values['threshold']:g} {row['threshold_unit']}"
    return values


def key(row: Mapping[str, Any], *without: str) -> tuple[Hashable, ...]:
    """A row's setting without some axes: equal for runs that differ only in those (and their seed)."""
    return tuple((name, value) for name, value in axes(row).items() if name not in without and value is not None)


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The axes, and `seed`, in which two rows differ."""
    of_a, of_b = axes(a) | {"seed": a.get("seed")}, axes(b) | {"seed": b.get("seed")}
    return [name for name in [*AXES, "seed"] if of_a.get(name) != of_b.get(name)]


def unusual(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Axes other than `USUAL` that vary over the rows: a label has to name them too."""
    settings = [axes(row) for row in rows]
    return [name for name in AXES if name not in USUAL and len({setting.get(name) for setting in settings}) > 1]


def origin(row: Mapping[str, Any], *without: str) -> tuple[Hashable, ...]:
    """Where a row's run reads its rows, as a key; without some of the parameters in `ORIGIN`."""
    return tuple(_plain(row.get(name)) for name in ORIGIN if name not in without)


def origins(rows: Iterable[Mapping[str, Any]], *without: str) -> dict[tuple[Hashable, ...], str]:
    """The rows' distinct origins in their order, each with a label of what varies: `layer 6, python_docs`.

    If all rows have one origin, its label is empty.
    """
    firsts: dict[tuple[Hashable, ...], Mapping[str, Any]] = {}
    for row in rows:
        firsts.setdefault(origin(row, *without), row)
    varied = varying(firsts.values(), *without)
    values = {name: {_plain(row.get(name)) for row in firsts.values()} for name in varied}
    return {
        key: ", ".join(_said(name, _plain(row.get(name)), values[name]) for name in varied)
        for key, row in firsts.items()
    }


def varying(rows: Iterable[Mapping[str, Any]], *without: str) -> list[str]:
    """The parameters in `ORIGIN` that vary over the rows."""
    rows = list(rows)
    return [name for name in ORIGIN if name not in without and len({_plain(row.get(name)) for row in rows}) > 1]


def _said(name: str, value: Hashable, values: set[Hashable]) -> str:
    """A value of an origin's parameter in words; a model or dataset by the last part of its name if that is unique."""
    if name not in ("model", "dataset", "site"):
        return f"{name.replace('_', ' ')} {value}"
    short = {one: re.split("[:/]", str(one).rstrip("/"))[-1] for one in values}
    return short[value] if len(set(short.values())) == len(values) else str(value)


def label(row: Mapping[str, Any], sizes: bool = True) -> str:
    """A run for readers: `Matryoshka 8x, K = 128, improved`. The published recipe and seed 0 are not named.

    Without `sizes`, expansion and K or threshold are left out: `Matryoshka, improved`.
    """
    values = axes(row)
    sparsity = f"K = {values.get('k')}" if values.get("threshold") is None else f"θ = {values['threshold']}"
    parts = [f"{values['arch']} {values['expansion']}x", sparsity] if sizes else [str(values["arch"])]
    known = isinstance(row.get("recipe"), str) and values.get("recipe") != "published"  # the published card says none
    parts += [str(values["recipe"])] if known else []
    parts += [f"{name} = {values[name]}" for name, usual in CONTROLS.items() if values.get(name) not in (None, usual)]
    seed = _plain(row.get("seed"))
    parts += [] if seed in (None, 0) else [f"seed {seed:g}"]
    return ", ".join(parts)


def _plain(value: Any) -> Hashable:
    """A table's value as a config holds it; a missing number is None."""
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    plain: Hashable = value.item() if hasattr(value, "item") else value
    return plain
