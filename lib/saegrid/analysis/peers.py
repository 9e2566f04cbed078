"""This project's SAEs and other libraries' at matched L0, from `benchmarks/peer_quality.py`. Free of torch."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from saegrid.analysis import intervals
from saegrid.analysis.selection import cost

OWN = "saegrid"
KEYS = ["layer", "dataset", "peer", "arch", "k", "rate", "seed"]
COMPARED = {"fvu_no_sink": "fvu_eval", "kl": "kl", "delta_loss": "delta_loss"}
"""Measures that contenders are compared on (KL only if all have it), each with the measure on the prompts that gives
the interval."""
YOUNGER = ["kl", "stable_pct", "matched_cosine"]
"""Measures that an older table does not have."""
MEANS = ["l0_no_sink", "fvu_no_sink", "fvu_eval", "dead_pct_no_sink", "delta_loss", *YOUNGER]
WHERE, CONTENDER = ["layer", "dataset"], ["peer", "arch"]


def at_each(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`compared` at the layer and text with the most K, and at all others, which `where` then names."""
    runs, prompts = read(folder)
    parts = [(where, compared(rows, prompts)) for where, rows in runs.groupby(WHERE, sort=False)]
    (_, most), *others = sorted(parts, key=lambda part: -part[1]["k"].nunique())
    named = []
    for (layer, dataset), found in others:
        place = f"layer {layer}, {dataset.removeprefix('embedded:')}"
        named.append(found.assign(where=f"{place}, " + found["where"] if found["k"].nunique() > 1 else place))
    return most, pd.concat(named, ignore_index=True) if named else most.head(0)


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs at each contender's best learning rate and their losses per prompt; both with a `run_id`.

    The best learning rate gives the lowest FVU without sinks on the validation rows with the first seed. K without an
    SAE of this project are left out, and for each K the seeds that a contender does not have yet; by layer and text.
    """
    runs = pd.read_csv(folder / "runs.csv").dropna(subset="fvu_no_sink")
    prompts = pd.read_csv(folder / "prompts.csv", dtype={"template": "string"})
    runs, prompts = (
        df.assign(run_id=df.round({"rate": 6})[KEYS].astype(str).agg(" ".join, axis=1)) for df in (runs, prompts)
    )
    at_k, mine = [*WHERE, "k"], runs["peer"] == OWN
    runs = runs[mine.groupby([runs[name] for name in at_k]).transform("any")]
    search = runs[runs["seed"] == runs["seed"].min()].groupby([*at_k, *CONTENDER])
    chosen = runs.loc[search["fvu_no_sink"].idxmin(), [*at_k, *CONTENDER, "rate"]]
    chosen["tried"] = search["rate"].nunique().to_numpy()
    best = runs.merge(chosen)
    best["have"] = best.groupby([*at_k, "seed"])["run_id"].transform("size")
    best = best[best["have"] == best.groupby(at_k)["have"].transform("max")].drop(columns="have")
    return best, prompts[prompts["run_id"].isin(best["run_id"])]


def compared(runs: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """One row per K and contender, of one layer and text: means over seeds, and differences from this project's SAE.

    This project's SAE is its architecture with the lowest FVU without sinks. `delta_loss_more`, `fvu_eval_more` and, if
    all runs have a KL, `kl_more` are `intervals.Estimate`s, over problem templates and seeds.
    """
    runs, rows = runs.assign(**{name: runs.get(name, math.nan) for name in YOUNGER}), []
    names = [name for name in COMPARED.values() if name != "kl" or cost(runs) == "kl"]
    measured = {name: intervals.measured(prompts, name, runs["run_id"]) for name in names}
    for k, group in runs.groupby("k"):
        own = group[group["peer"] == OWN].groupby("arch")["fvu_no_sink"].mean().idxmin()
        base = group[(group["peer"] == OWN) & (group["arch"] == own)]
        for (peer, arch), those in group.groupby(CONTENDER, sort=False):
            means = those[MEANS].mean()
            more = {f"{name}_more": intervals.difference(measured[name], those, base) for name in names}
            rates = " and ".join(f"{rate:.2g}" for rate in sorted(those["rate"].unique()))
            row = {"where": f"K = {k}", "k": k, "peer": peer, "arch": arch, "is_base": (peer, arch) == (OWN, own)}
            row |= {"rates": rates, "tried": those["tried"].max(), "seeds": len(those)}
            rows.append(row | dict(means) | more)
    return pd.DataFrame(rows).sort_values(["k", cost(runs)], ignore_index=True)


def against_best(found: pd.DataFrame) -> pd.DataFrame:
    """This project's SAE beside the best of the others (`compared`): one row per `where` and measure of `COMPARED`.

    Columns: `where`, `k`, `measure`, `arch` (this project's), `own`, `peer`, `their_arch`, `theirs`, and the difference
    on the prompts: `more` (theirs minus own), its 95% interval `low` and `high`, and `p`, adjusted for all rows (Holm).
    """
    rows = []
    for (where, k), group in found.groupby(["where", "k"], sort=False):
        base, others = group[group["is_base"]].iloc[0], group[group["peer"] != OWN]
        for measure, on_prompts in COMPARED.items():
            if len(others) and f"{on_prompts}_more" in found:
                best = others.loc[others[measure].idxmin()]
                theirs = (best["peer"], best["arch"], best[measure])
                rows.append((where, k, measure, base["arch"], base[measure], *theirs, *best[f"{on_prompts}_more"]))
    names = ["where", "k", "measure", "arch", "own", "peer", "their_arch", "theirs", "more", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=names)
    return table.assign(p=intervals.holm(table["p"]))
