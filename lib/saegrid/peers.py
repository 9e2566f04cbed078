"""This project's SAEs beside other libraries', at matched L0, as `benchmarks/peer_quality.py` found. Free of torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from saegrid import intervals
from saegrid.style import ABOVE, log_axes, styled
from saegrid.tables import Markdown, between, change, counted, header, html_table, number, signed

OWN = "saegrid"
KEYS = ["peer", "arch", "k", "rate", "seed"]
COMPARED = (
    ("fvu_no_sink", "an FVU without sinks", "fvu_eval", "More FVU"),
    ("delta_loss", "a delta loss", "delta_loss", "More delta loss"),
)
"""Measures, in words; what of theirs is compared on the prompts, with an interval; the title of its column."""
MEANS = ["l0_no_sink", "fvu_no_sink", "fvu_eval", "dead_pct_no_sink", "delta_loss"]
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
    """The runs of each contender's best learning rate, that of its first seed's lowest FVU without sinks on the
    validation rows, and their losses by prompt; both with a `run_id`.

    K without an SAE of this project are left out, and of a K the seeds that a contender does not have yet.
    """
    runs = pd.read_csv(folder / "runs.csv").dropna(subset="fvu_no_sink")
    prompts = pd.read_csv(folder / "prompts.csv", dtype={"template": "string"})
    runs, prompts = (
        df.assign(run_id=df.round({"rate": 6})[KEYS].astype(str).agg(" ".join, axis=1)) for df in (runs, prompts)
    )
    search = runs[runs["seed"] == runs["seed"].min()].groupby([*CONTENDER, "k"])
    chosen = runs.loc[search["fvu_no_sink"].idxmin(), [*CONTENDER, "k", "rate"]]
    chosen["tried"] = search["rate"].nunique().to_numpy()
    best = runs.merge(chosen)
    best = best[best["k"].isin(best.loc[best["peer"] == OWN, "k"])]
    have = best.groupby(["k", "seed"])["run_id"].transform("size")
    best = best[have == have.groupby(best["k"]).transform("max")]
    return best, prompts[prompts["run_id"].isin(best["run_id"])]


def compared(runs: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """One row a K and contender: means over seeds, and what it has more than this project's SAE at that K.

    That is the one of its architectures whose FVU without sinks is the lowest. `delta_loss_more` and `fvu_eval_more`
    are (difference, low, high): the bounds are its central 95% interval, over problem templates and seeds.
    """
    drawn, rows = {measure: intervals.draws(prompts, measure) for measure in intervals.MEASURES}, []
    for k, group in runs.groupby("k"):
        own = group[group["peer"] == OWN].groupby("arch")["fvu_no_sink"].mean().idxmin()
        base = group[(group["peer"] == OWN) & (group["arch"] == own)]
        for (peer, arch), those in group.groupby(CONTENDER, sort=False):
            means = those[MEANS].mean()
            more = {
                f"{name}_more": (means[name] - base[name].mean(), *intervals.difference(drawn[name], those, base))
                for name in drawn
            }
            rates = " and ".join(f"{rate:.2g}" for rate in sorted(those["rate"].unique()))
            row = {"k": k, "peer": peer, "arch": arch, "is_base": (peer, arch) == (OWN, own), "rates": rates}
            row |= {"tried": those["tried"].max(), "seeds": len(those)}
            rows.append(row | dict(means) | more)
    return pd.DataFrame(rows).sort_values(["k", "delta_loss"], ignore_index=True)


def rules(found: pd.DataFrame) -> str:
    """How the contenders were trained and measured."""
    tried, seeds = between(found["tried"], "d"), counted(found["seeds"].min(), "seed")
    return (
        "Trained by each library's released code (sparsify by the step inside its trainer) with its recommended "
        "settings, those in steps or tokens scaled to the run's length, at the same width, epochs and batch: the best "
        f"of {tried} learning rates by FVU on the validation rows, tried three times apart and at last between the "
        f"best and its better neighbour. Means over {seeds}, of which the first chose the learning rate. "
        "Attention sinks are left out of everybody's training rows (this project's recipe does so itself), out of "
        "every measure and out of the splice, and thresholds are calibrated to K without them. This project keeps the "
        "epoch of the lowest validation MSE, as it always does, the others the last. Intervals are a paired bootstrap "
        "over problem templates and seeds. All take as many rows to as many latents; the speed page has what a step "
        "takes in seconds."
    )


def table(found: pd.DataFrame) -> Markdown:
    """All contenders at each K, as a table of a page."""
    own = {"Contender": found["peer"] + " " + found["arch"], "K": found["k"].astype(str)}
    more = {
        head: found[f"{name}_more"].map(lambda more: " to ".join(map(signed, more[1:]))).mask(found["is_base"], "")
        for _, _, name, head in COMPARED
    }
    columns = [*own, "fvu_no_sink", "dead_pct_no_sink", "delta_loss", *more, "Rate"]
    own |= more | {"Rate": found["rates"]}
    caption = (
        "More: than this project's SAE of the lowest FVU at that K, on the prompts, 95% intervals. Rate: the best "
        "learning rate by the library's default."
    )
    return html_table(found.assign(**own), columns, caption=caption, mark_best=False)


def verdict(found: pd.DataFrame) -> str:
    """At each K, this project's SAE beside the best of the others', in FVU without sinks and in delta loss."""
    lines = []
    for k, group in found.groupby("k"):
        base, others = group[group["is_base"]].iloc[0], group[group["peer"] != OWN]
        if others.empty:
            continue
        told = []
        for name, words, on_prompts, _ in COMPARED:
            best = others.loc[others[name].idxmin()]
            told.append(
                f"{words} of {number(base[name], name)} against {number(best[name], name)} of the best other one "
                f"({best['peer']} {best['arch']}; {change(*best[f'{on_prompts}_more'])} on the prompts)"
            )
        lines.append(f"- K = {k}: {base['arch']} has {' and '.join(told)}.")
        absent = [" ".join(name) for name in LOOKS if name not in set(zip(group["peer"], group["arch"], strict=True))]
        if absent:
            lines[-1] += f" Not run: {', '.join(absent)}."
    return "\n".join(lines)


@styled
def curves(found: pd.DataFrame, *, y: str, ax: Axes | None = None) -> Axes:
    """A measure over the realised L0, one line a contender, both axes logarithmic."""
    for contender, (color, marker, line) in LOOKS.items():
        rows = found[(found["peer"] == contender[0]) & (found["arch"] == contender[1])].sort_values("l0_no_sink")
        if len(rows):
            ax.plot(rows["l0_no_sink"], rows[y], color=color, marker=marker, linestyle=line, label=" ".join(contender))
    log_axes(ax, sorted(found["k"].unique()))
    ax.set_xlabel(header("l0_no_sink"))
    ax.set_ylabel(header(y))
    ax.legend(ncols=2, **ABOVE)
    return ax
