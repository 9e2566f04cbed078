"""This project's SAEs beside other libraries', at matched L0, as `benchmarks/peer_quality.py` found. Free of torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from saegrid import intervals
from saegrid.style import ABOVE, log_axes, styled
from saegrid.tables import Markdown, change, header, html_table, number

OWN = "saegrid"
KEYS = ["peer", "arch", "k", "rate", "seed"]
CONTENDER = ["peer", "arch"]
LOOKS = {
    ("saegrid", "BatchTopK"): ("#d55e00", "o", "-"),
    ("saegrid", "JumpReLU"): ("#009e73", "^", "-"),
    ("saegrid", "Matryoshka"): ("#8d5a2b", "D", "-"),
    ("sae-lens", "BatchTopK"): ("#3a86c8", "o", "--"),
    ("sae-lens", "TopK"): ("#3a86c8", "s", ":"),
    ("sae-lens", "Matryoshka"): ("#3a86c8", "D", "-."),
    ("dictionary_learning", "BatchTopK"): ("#b5609a", "o", "--"),
    ("dictionary_learning", "TopK"): ("#b5609a", "s", ":"),
    ("dictionary_learning", "Matryoshka"): ("#b5609a", "D", "-."),
    ("sparsify", "TopK"): ("#7b7f87", "s", ":"),
}
"""Colour by library, mark by architecture."""


def read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs of each contender's best learning rate, that of the lowest FVU without sinks on the validation rows,
    and their losses by prompt; both with a `run_id`. K without an SAE of this project are left out."""
    runs = pd.read_csv(folder / "runs.csv").dropna(subset="fvu_no_sink")
    prompts = pd.read_csv(folder / "prompts.csv", dtype={"template": "string"})
    runs, prompts = (
        df.assign(run_id=df.round({"rate": 6})[KEYS].astype(str).agg(" ".join, axis=1)) for df in (runs, prompts)
    )
    runs["tried"] = runs.groupby([*CONTENDER, "k", "seed"])["rate"].transform("nunique")
    best = runs.loc[runs.groupby([*CONTENDER, "k", "seed"])["fvu_no_sink"].idxmin()]
    best = best[best["k"].isin(best.loc[best["peer"] == OWN, "k"])]
    return best, prompts[prompts["run_id"].isin(best["run_id"])]


def compared(runs: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """One row a K and contender: means over seeds, and its delta loss less that of this project's SAE at that K.

    That is the one of its architectures whose FVU without sinks is the lowest. `low` and `high` are the difference's
    central 95% interval, over problem templates and seeds.
    """
    drawn, rows = intervals.draws(prompts), []
    for k, group in runs.groupby("k"):
        own = group[group["peer"] == OWN].groupby("arch")["fvu_no_sink"].mean().idxmin()
        base = group[(group["peer"] == OWN) & (group["arch"] == own)]
        for (peer, arch), those in group.groupby(CONTENDER, sort=False):
            means = those[["l0", "l0_eval", "fvu_no_sink", "dead_pct", "delta_loss"]].mean()
            low, high = intervals.difference(drawn, those, base)
            more = means["delta_loss"] - base["delta_loss"].mean()
            rates = " and ".join(f"{rate:.2g}" for rate in sorted(those["rate"].unique()))
            row = {"k": k, "peer": peer, "arch": arch, "is_base": (peer, arch) == (OWN, own), "rates": rates}
            row["tried"] = those["tried"].min()
            rows.append(row | dict(means) | {"more": more, "low": low, "high": high})
    return pd.DataFrame(rows).sort_values(["k", "delta_loss"], ignore_index=True)


def table(found: pd.DataFrame) -> Markdown:
    """All contenders at each K, as a table of a page."""
    tried = " to ".join(str(count) for count in sorted({found["tried"].min(), found["tried"].max()}))
    own = {
        "Contender": found["peer"] + " " + found["arch"],
        "Delta loss more than this project's": [
            "" if row.is_base else change(row.more, row.low, row.high) for row in found.itertuples()
        ],
        "Learning rate by its default": found["rates"],
    }
    name, *others = own
    columns = [name, "k", "l0", "fvu_no_sink", "dead_pct", "delta_loss", *others]
    caption = (
        "Each library's own trainer and settings on the same rows, epochs and width: the best of "
        f"{tried} learning rates, about three times apart, by FVU without sinks on the validation rows. Thresholds are "
        "calibrated to K there, and attention sinks are among the rows, for all alike. 95% intervals by a paired "
        "bootstrap over problem templates."
    )
    return html_table(found.assign(**own), columns, caption=caption, mark_best=False)


def verdict(found: pd.DataFrame) -> str:
    """At each K, this project's SAE beside the best of the others', in FVU without sinks and in delta loss."""
    lines = []
    for k, group in found.groupby("k"):
        base, others = group[group["is_base"]].iloc[0], group[group["peer"] != OWN]
        if others.empty:
            continue
        fvu, loss = (others.loc[others[name].idxmin()] for name in ("fvu_no_sink", "delta_loss"))
        lines.append(
            f"- K = {k}: {base['arch']} has an FVU without sinks of {number(base['fvu_no_sink'], 'fvu_no_sink')} "
            f"against {number(fvu['fvu_no_sink'], 'fvu_no_sink')} of the best other one ({fvu['peer']} "
            f"{fvu['arch']}), and a delta loss of {number(base['delta_loss'], 'delta_loss')} against "
            f"{number(loss['delta_loss'], 'delta_loss')} ({loss['peer']} {loss['arch']}, {_more(loss)})."
        )
    return "\n".join(lines)


@styled
def curves(found: pd.DataFrame, *, y: str, ax: Axes | None = None) -> Axes:
    """A measure over the realised L0, one line a contender, both axes logarithmic."""
    for contender, (color, marker, line) in LOOKS.items():
        rows = found[(found["peer"] == contender[0]) & (found["arch"] == contender[1])].sort_values("l0")
        if len(rows):
            ax.plot(rows["l0"], rows[y], color=color, marker=marker, linestyle=line, label=" ".join(contender))
    log_axes(ax, sorted(found["k"].unique()))
    ax.set_xlabel(header("l0"))
    ax.set_ylabel(header(y))
    ax.legend(ncols=2, **ABOVE)
    return ax


def _more(row: pd.Series) -> str:
    words = f"{abs(row['more']):.3f} nats/token {'more' if row['more'] >= 0 else 'less'}"
    return f"{words} [{row['low']:.3f}, {row['high']:.3f}]".replace("[-", "[−").replace(", -", ", −")
