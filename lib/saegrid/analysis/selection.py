"""Which runs may be called best, which one is recommended, and which settings two sweeps share."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saegrid.analysis.numbers import COLUMNS
from saegrid.config import settings
from saegrid.config.grid import L0_BUDGET
from saegrid.config.settings import CONTROLS
from saegrid.errors import ResultsError

DENSE_SHARE_PCT = 10.0
"""A run that fires at least this share of its latents is dense and can't be "best": the published card calls "firing
10-45% of its latents" not sparse. Fixed before the results."""
SLACK = 1.05
"""A run up to 5% over an L0 budget is within it: K is a target, L0 is measured."""


def without_controls(df: pd.DataFrame) -> pd.DataFrame:
    """The rows that are not controls. Only the table of controls and the tables of all runs show controls."""
    for name, usual in CONTROLS.items():
        df = df[df[name].isna() | (df[name] == usual)] if name in df else df
    return df


def recipes(df: pd.DataFrame) -> pd.Series:
    """Each row's recipe and the choices in which it differs (`improved but grad_clip = 0.0`); None where not known."""
    return pd.Series([settings.axes(row).get("recipe") for row in df.to_dict("records")], index=df.index, dtype=object)


def by_origin(df: pd.DataFrame, *without: str) -> dict[str, pd.DataFrame]:
    """The rows of each origin (`settings.origins`) by its label, in table order; one origin has the label "".

    What ranks, averages or compares runs takes one of these at a time. `without` names parameters to ignore.
    """
    rows = df.to_dict("records")
    keys = pd.Series([settings.origin(row, *without) for row in rows], index=df.index, dtype=object)
    return {name: df[[key == one for key in keys]] for one, name in settings.origins(rows, *without).items()} or {
        "": df
    }


def first_origin(df: pd.DataFrame) -> pd.DataFrame:
    """The rows of the table's first origin: what a page shows that has room for one."""
    return next(iter(by_origin(df).values()))


def candidates(df: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be called best: those that fire less than `DENSE_SHARE_PCT` of their latents. Never controls.

    The recommendation, the Pareto sets and the stars in tables share this rule. If no row is that sparse, or d_sae is
    unknown, all rows qualify. K replaces an L0 that was not printed.
    """
    df = without_controls(df)
    if "d_sae" not in df:
        return df
    l0 = df["l0"] if "k" not in df else df["l0"].fillna(pd.to_numeric(df["k"]).astype(float))
    sparse = df[100 * l0 / df["d_sae"] < DENSE_SHARE_PCT]
    return sparse if len(sparse) else df


COMPARED = ("kl", "delta_loss", "loss_recovered_mean", "fvu_no_sink", "dead_pct", "stable_pct")
"""Measures that controls are compared on."""
LOSSES = ("kl", "delta_loss", "loss_recovered_mean")
"""Measures that say nothing about an untrained language model: it predicts next to nothing, so it can't lose much."""


def beside_controls(df: pd.DataFrame, baseline: pd.DataFrame | None = None) -> pd.DataFrame:
    """Each setting that has a control, followed by its controls: means over seeds of the measures in `COMPARED`.

    PCA with K components is one more control where `baseline` (`experiment.pca_table`) has it. Columns: `name`,
    `control` (`freeze = decoder`; empty for the setting itself), `untrained` (whether the language model is), `seeds`,
    the measures, and `reached`: the measures on which a control is at least as good as its setting, and which therefore
    say nothing there.
    """
    records = df.to_dict("records")
    keyed = df.assign(rest=[settings.key(row, *CONTROLS) for row in records])
    labels = settings.origins(records)
    if len(labels) > 1:
        keyed["name"] = [f"{row['name']}, {labels[settings.origin(row)]}" for row in records]
    measures, found = [name for name in COMPARED if name in df], []
    for _, rows in keyed.groupby("rest", sort=False):
        plain = without_controls(rows)
        kinds = rows.drop(index=plain.index).groupby(list(CONTROLS), sort=False)
        if plain.empty or not len(kinds):
            continue
        own = plain[measures].mean()
        setting = {"name": plain["name"].iloc[0], "control": "", "untrained": False, "seeds": len(plain)}
        found.append(setting | own.to_dict() | {"reached": ()})
        controls = []
        for values, runs in kinds:
            said = [f"{n} = {v}" for (n, usual), v in zip(CONTROLS.items(), values, strict=True) if v != usual]
            told = {"name": runs["name"].iloc[0], "control": ", ".join(said), "seeds": len(runs)}
            told["untrained"] = runs["model_init"].iloc[0] == "random"
            controls.append(told | runs[measures].mean().to_dict())
        controls += [] if baseline is None else pca_control(baseline, plain.iloc[0], measures)
        found += [row | {"reached": _reached(row, own)} for row in controls]
    df = pd.DataFrame(found, columns=["name", "control", "untrained", "seeds", *measures, "reached"])
    return df.astype({"untrained": bool})


def pca_control(baseline: pd.DataFrame, plain: pd.Series, measures: list[str]) -> list[dict[str, Any]]:
    """PCA with as many components as a run's K, on the same rows; empty if it was not measured."""
    if pd.isna(plain["k"]):
        return []
    same = baseline[(baseline["components"] == plain["k"]) & (baseline["store_id"] == plain["store_id"])]
    told = {"name": f"PCA, {plain['k']} components", "control": "PCA", "untrained": False, "seeds": 1}
    return [told | {name: row[name] for name in measures if name in row} for row in same.to_dict("records")]


def _reached(control: dict[str, Any], own: pd.Series) -> tuple[str, ...]:
    apart = LOSSES if control["untrained"] else ()
    signs = {name: -1 if COLUMNS[name].best == "min" else 1 for name in own.index if name in control}
    signs = {name: sign for name, sign in signs.items() if name not in apart}
    return tuple(name for name, sign in signs.items() if sign * (control[name] - own[name]) >= 0)


def same_settings(own: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(own and other rows of every setting that both tables have, adjacent; the other rows without a match).

    A setting is architecture, expansion, K and threshold. Only the published recipe without another choice, and
    thresholds in activation units, match.
    """
    keys, own = ["arch", "expansion", "k", "threshold"], without_controls(own)
    if "recipe" in own:
        own = own[recipes(own) == "published"]
    if "threshold_unit" in own:
        own = own[own["threshold"].isna() | (own["threshold_unit"] == "absolute")]
    own_keys, other_keys = (
        [tuple("" if pd.isna(value) else value for value in row) for row in rows[keys].itertuples(index=False)]
        for rows in (own, other)
    )
    shared = [key for key in dict.fromkeys(other_keys) if key in set(own_keys)]
    both = pd.concat([own.assign(_key=own_keys), other.assign(_key=other_keys)], ignore_index=True)
    both = both[both["_key"].isin(shared)].assign(_order=lambda rows: rows["_key"].map(shared.index))
    both = both.sort_values("_order", kind="stable").drop(columns=["_key", "_order"])
    return both, other[[key not in shared for key in other_keys]]


def matched(ours: pd.DataFrame, theirs: pd.DataFrame, *axes: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs of runs that differ only along `axes`: row n of the first table and row n of the second have equal seeds.

    The column `rest` is their setting without these axes.
    """
    sides = []
    for df in (ours.reset_index(drop=True), theirs.reset_index(drop=True)):
        keys = [settings.key(row, *axes) for row in df.to_dict("records")]
        sides.append(df.assign(rest=pd.Series(keys, index=df.index, dtype=object)))
    on = ["rest", "seed"] if "seed" in ours else ["rest"]
    both = sides[0][on].reset_index().merge(sides[1][on].reset_index(), on=on)
    left, right = (side.loc[both[f"index_{n}"]].reset_index(drop=True) for side, n in zip(sides, "xy", strict=True))
    return left, right


def published_beside(own: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The published row of each own run whose setting both tables have (`same_settings`), by run id."""
    both, _ = same_settings(own, other)
    keys = ["arch", "expansion", "k", "threshold"]
    ours, theirs = both[both["source"] == "own"], both[both["source"] == "published"]
    return ours[["run_id", *keys]].merge(theirs.drop(columns="run_id"), on=keys).set_index("run_id")


def cost(df: pd.DataFrame) -> str:
    """The measure by which runs are ranked: `kl`, or `delta_loss` if a run has no KL.

    Near 0, KL tells runs apart better: it is never negative, and delta loss can be.
    """
    return "kl" if "kl" in df and len(df) and df["kl"].notna().all() else "delta_loss"


def is_within(l0: Any, budget: float) -> Any:
    """Whether an L0, or each of a column, is within a budget."""
    return l0 <= SLACK * budget


def recommend(df: pd.DataFrame, budget: float = L0_BUDGET) -> pd.Series:
    """The row with the lowest `cost` among the sparse ones (`candidates`) within an L0 budget.

    If none is within it, the row with the lowest L0. Raises `ResultsError` if all rows are controls.
    """
    rows = candidates(df)
    if rows.empty:
        raise ResultsError("results: every run is a control (freeze, model_init), so none can be recommended")
    affordable = rows[is_within(rows["l0"], budget)]
    return rows.nsmallest(1, "l0").iloc[0] if affordable.empty else affordable.nsmallest(1, cost(df)).iloc[0]


def fronts(df: pd.DataFrame, y: str) -> pd.DataFrame:
    """The Pareto set (`pareto`) of the sparse runs of each origin."""
    return pd.concat([pareto(candidates(rows), y) for rows in by_origin(df).values()])


def pareto(df: pd.DataFrame, y: str) -> pd.DataFrame:
    """The rows that no other row beats in both L0 (smaller is better) and the measure `y`, sorted by L0."""
    lower = COLUMNS[y].best == "min"
    rows = df.sort_values(["l0", y], ascending=[True, lower])
    best = rows[y].cummin() if lower else rows[y].cummax()
    return rows[(rows[y] == best) & ~best.duplicated()]
