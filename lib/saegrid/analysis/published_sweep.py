"""The published table: the nine rows that the model card prints, and what their rounding implies. Free of torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib import resources
from typing import Any

import pandas as pd

from saegrid.experiment.results import typed

STEPS = 5_600
"""About how many training steps a published run took: ten epochs of 285,277 rows in batches of 512 are 5,571."""


def rows() -> pd.DataFrame:
    """The nine rows that the published model card prints, with `source="published"` and the derived `d_sae`.

    The published residual stream has `d_in` = 896.
    """
    df = pd.DataFrame(_text())
    numbers = df.columns.drop("arch")
    df[numbers] = df[numbers].apply(pd.to_numeric)
    names = [run_name(row) for row in df.to_dict("records")]
    return typed(df.assign(source="published", name=names, d_in=896, d_sae=df["expansion"].astype(int) * 896))


def run_name(row: Mapping[str, Any]) -> str:
    """The published file name of a row, without suffix: `BatchTopK_exp8x_k220`, `JumpReLU_exp8x_t0.5`."""
    sparsity = f"t{row['threshold']:g}" if row["arch"] == "JumpReLU" else f"k{row['k']:g}"
    return f"{row['arch']}_exp{row['expansion']:g}x_{sparsity}"


def bounds() -> pd.DataFrame:
    """Bounds on the published setting, from the rounding of each row's printed numbers.

    Columns, as `_low` and `_high`: `var` is MSE / NMSE, the pooled variance; `ce` is f * delta / (1 - f), the clean
    cross-entropy in nats if f = frac_rec is CE_clean / CE_spliced; `usual` is delta / (1 - f), the ablated minus the
    clean loss in nats if f were the field's fraction of loss recovered.
    """
    found = []
    for row in _text():
        mse, nmse, delta = (_rounding(row[name]) for name in ("val_mse", "nmse", "delta_loss"))
        frac = tuple(bound / 100 for bound in _rounding(row["frac_rec_pct"]))
        corners = [(f, d) for f in frac for d in delta]
        usual = [d / (1 - f) for f, d in corners]
        clean = [f * d / (1 - f) for f, d in corners]
        found.append(
            {"arch": row["arch"], "expansion": row["expansion"], "k": row["k"], "threshold": row["threshold"]}
            | {"var_low": mse[0] / nmse[1], "var_high": mse[1] / nmse[0]}
            | {"ce_low": min(clean), "ce_high": max(clean), "usual_low": min(usual), "usual_high": max(usual)}
        )
    df = pd.DataFrame(found)
    numbers = df.columns.drop("arch")
    df[numbers] = df[numbers].apply(pd.to_numeric)
    return typed(df)


def meet(df: pd.DataFrame, name: str) -> tuple[float, float]:
    """The intersection of the rows' bounds `{name}_low` and `{name}_high`; empty if low is above high."""
    return float(df[f"{name}_low"].max()), float(df[f"{name}_high"].min())


def _text() -> list[dict[str, str]]:
    text = resources.files("saegrid.analysis").joinpath("published_results.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _rounding(printed: str) -> tuple[float, float]:
    """The smallest and largest number that rounds to `printed`."""
    half = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    return float(printed) - half, float(printed) + half
