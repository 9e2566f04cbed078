"""Which runs may be called best, which one is recommended, and which settings two sweeps share."""

from __future__ import annotations

import pandas as pd

DENSE_SHARE_PCT = 10.0
"""A run that fires at least this share of its latents is dense and can't be "best": the published card calls "firing
10-45% of its latents" not sparse. Fixed before the results."""


def candidates(df: pd.DataFrame) -> pd.DataFrame:
    """The rows that may be called best: those that fire less than `DENSE_SHARE_PCT` of their latents.

    The recommendation, the Pareto sets and the stars in tables share this rule. If no row is that sparse, or d_sae is
    unknown, all rows qualify. K replaces an L0 that was not printed.
    """
    if "d_sae" not in df:
        return df
    l0 = df["l0"] if "k" not in df else df["l0"].fillna(pd.to_numeric(df["k"]).astype(float))
    sparse = df[100 * l0 / df["d_sae"] < DENSE_SHARE_PCT]
    return sparse if len(sparse) else df


def same_settings(own: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(own and other rows of every setting that both tables have, adjacent; the other rows without a match).

    A setting is architecture, expansion, K and threshold. Only the published recipe and thresholds in activation units
    match.
    """
    keys = ["arch", "expansion", "k", "threshold"]
    if "recipe" in own:
        own = own[own["recipe"] == "published"]
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


def cost(df: pd.DataFrame) -> str:
    """The measure by which runs are ranked: `kl`, or `delta_loss` if a run has no KL (it has both signs near 0)."""
    return "kl" if "kl" in df and len(df) and df["kl"].notna().all() else "delta_loss"


def recommend(df: pd.DataFrame) -> pd.Series:
    """The row with the lowest `cost` among the sparse ones (`candidates`)."""
    return candidates(df).nsmallest(1, cost(df)).iloc[0]


def pareto(df: pd.DataFrame, y: str, x: str = "l0", lower_is_better: bool = True) -> pd.DataFrame:
    """The rows that no other row beats in both `x` (smaller is better) and `y`, sorted by `x`."""
    rows = df.sort_values([x, y], ascending=[True, lower_is_better])
    best = rows[y].cummin() if lower_is_better else rows[y].cummax()
    return rows[(rows[y] == best) & ~best.duplicated()]
