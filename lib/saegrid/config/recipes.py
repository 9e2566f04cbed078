"""Recipes: named sets of training choices, free of torch.

A parameter left at "recipe" or -1 takes its recipe's value; any other value overrides that choice alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saegrid.config.architectures import ARCHITECTURES

RECIPES: dict[str, dict[str, Any]] = {
    "published": {
        **{"b_pre_init": "zero", "encoder_init": "kaiming", "act_scale": "none", "sinks": "keep"},
        **{"aux_coef": 0.0, "dead_window": 0.05, "encoder_tie": 0.0},
        **{"lr": 1e-4, "lr_schedule": "cosine", "warmup": 0.0, "grad_clip": 0.0, "project_grad": False},
    },
    "improved": {
        **{"b_pre_init": "centre", "encoder_init": "decoder", "act_scale": "unit", "sinks": "apart"},
        **{"aux_coef": 1 / 32, "dead_window": 0.05, "encoder_tie": 3.0},
        **{"lr": 2e-3, "lr_schedule": "linear", "warmup": 0.05, "grad_clip": 1.0, "project_grad": True},
    },
}
"""The published sweep's choices, and those of later research. `run_config.py` explains each choice."""

BANDWIDTH, L0_COEF = 0.3, 0.1
"""For JumpReLU's trained thresholds, on rows with a mean square of 1 (measured: LOG.md)."""

THETA_TIE = 10.0
"""Weight decay of JumpReLU's trained thetas towards their mean, in units of their learning rate (measured: LOG.md)."""

L1_COEF = 1.0
"""Initial L1 weight of ReLU and Gated on rows with a mean square of 1; the loss divides it by d_in."""

SHUFFLE_ROWS = 131_072
"""Streamed rows that are shuffled together; a store shuffles as many."""

YOUNGER = {
    **{"freeze": "none", "model_init": "trained", "device": "auto"},
    **{"recipe": "published", "prefixes": 0, "theta_tie": 0.0},
    **{"bandwidth": BANDWIDTH, "l0_coef": L0_COEF, "l1_coef": L1_COEF},
    **{"dataset_config": "", "dataset_split": "", "text_field": "", "context": 0, "skip_tokens": ""},
    **{"rows": "stored", "shuffle_rows": SHUFFLE_ROWS},
} | {
    name: RECIPES["published"][name]
    for name in ("act_scale", "sinks", "aux_coef", "dead_window", "encoder_tie", "lr_schedule", "warmup")
}
"""Parameters added after the first tables, with the values that earlier runs used: those keep their ids and rows."""


def choices(run: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values for a run, from `recipe`, `arch` and `k`; with `theta_tie` if thetas are trained (JumpReLU).

    An unknown recipe raises nothing here; `RunConfig` refuses it.
    """
    recipe, k = run.get("recipe"), run.get("k")
    arch = ARCHITECTURES.get(str(run.get("arch")))
    tied = arch is not None and arch.has_tied_thetas(isinstance(k, (int, float)) and k > 0)
    known = RECIPES[recipe if isinstance(recipe, str) and recipe in RECIPES else "published"]
    return known | {"theta_tie": THETA_TIE if tied else 0.0}


def resolve(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with the recipe's value for each choice left to it (absent, "recipe" or -1)."""
    said = choices(parameters).items()
    return parameters | {name: value for name, value in said if _is_left(parameters.get(name, -1))}


def switched(run: Mapping[str, Any]) -> str:
    """Choices in which a run differs from its recipe, such as `grad_clip = 0.0`; empty if there are none."""
    return ", ".join(f"{name} = {run[name]}" for name, value in choices(run).items() if run[name] != value)


def described(run: Mapping[str, Any]) -> str:
    """A run's recipe in words: `improved`, or `improved but grad_clip = 0.0` if choices were overridden."""
    differs = switched(run)
    return f"{run['recipe']} but {differs}" if differs else run["recipe"]


def _is_left(value: Any) -> bool:
    return value == "recipe" or (value == -1 and not isinstance(value, bool))
