"""Seed stability and controls of a grid, as sentences, a figure and tables: what its latents may be trusted for."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, MISSING, bounds, counted, header, number
from saegrid.config import settings
from saegrid.config.settings import CONTROLS
from saegrid.report.figures import plots
from saegrid.report.figures.style import ABOVE, INK, MARKERS, PALETTE, log_axes, styled
from saegrid.report.tables import Markdown, html_table, markdown

SIZES = ("n_train_rows", "k", "d_sae")
"""What stability is drawn over, where it varies."""
FEW_PCT = 10.0
"""Below this share of stable latents, the text warns of reading single latents."""


def stability(stable: pd.DataFrame) -> Markdown:
    """How many latents are found again with another seed: sentences, a figure per size that varies, and a table."""
    plain = selection.without_controls(stable)
    if plain.empty:
        return Markdown("Every setting here has one seed: nothing says whether another seed finds the same latents.\n")
    table = stable.assign(stable_between=_bounds(stable))
    columns = ["name", "seeds", "pairs", "stable_pct", "stable_between", "stable_energy_pct", "matched_cosine"]
    columns += ["random_cosine", "start_cosine"]
    caption = (
        "Seed stability of each setting: means over all pairs of seeds. Two latents are the same if the cosines of "
        "their decoder and of their encoder rows are above 0.7."
    )
    parts = selection.by_origin(plain)
    if len(parts) > 1:
        said = "\n".join(
            f"- **{name.capitalize()}**: {_share(rows)} of the live latents" for name, rows in parts.items()
        )
        said = f"Found again with another seed:\n\n{said}"
        return markdown(said, html_table(table, columns, caption=caption, mark_best=False))
    figures = []
    for x in (name for name in SIZES if plain[name].nunique() > 1):
        text = f"{header('stable_pct')} over {header(x)}, a line per architecture; means over the other settings."
        figures.append(plots.figure(curves(plain, x=x), alt=text, caption=text))
    drawn = [plots.side_by_side(figures)] if figures else []
    return markdown(verdict(plain), *drawn, html_table(table, columns, caption=caption, mark_best=False))


def verdict(plain: pd.DataFrame) -> str:
    """The range of stability over the settings, what chance gives, and what follows for readers of latents."""
    high = plain.loc[plain["stable_pct"].idxmax()]
    found, chance = (number(plain[name].mean(), name) for name in ("matched_cosine", "random_cosine"))
    text = (
        f"**{_share(plain)} of the live latents are found again with another seed.** Matched one to one, the decoder "
        f"rows of two seeds have a mean cosine of {found}; as many random directions of the same width give {chance}. "
        f"Rows keep a cosine of {number(plain['start_cosine'].mean(), 'start_cosine')} with their random start. "
        "Rows of attention sinks, and the latents that are given the sinks' direction, are left out."
    )
    if high["stable_pct"] < FEW_PCT:
        text += (
            " So most of these latents are those of the seed, however well the SAE reconstructs: do not read a single "
            "latent as a property of the language model unless other seeds have it too."
        )
    return text


def _share(plain: pd.DataFrame) -> str:
    """The lowest and the highest stability, with the settings that have them."""
    low, high = (plain.loc[plain["stable_pct"].agg(end)] for end in ("idxmin", "idxmax"))
    least, most = (f"{number(row['stable_pct'], 'stable_pct')}%" for row in (low, high))
    return least if least == most else f"{least} ({low['name']}) to {most} ({high['name']})"


@styled
def curves(df: pd.DataFrame, *, x: str, ax: Axes | None = None) -> Axes:
    """Share of stable latents over a size, one line per architecture (means over the rest)."""
    rows = df[df[x].notna()].astype({x: float})
    for arch, group in rows.groupby("arch", sort=False):
        line = group.groupby(x)["stable_pct"].mean()
        ax.plot(line.index, line, color=PALETTE.get(arch, INK), marker=MARKERS.get(arch, "o"), label=arch)
    log_axes(ax, sorted(rows[x].unique()))
    ax.set_yscale("linear")
    ax.set_ylim(bottom=0)
    ax.set_xlabel(header(x))
    ax.set_ylabel(header("stable_pct"))
    ax.legend(ncols=3, **ABOVE)
    return ax


def in_short(best: pd.Series, df: pd.DataFrame, stable: pd.DataFrame, baseline: pd.DataFrame | None = None) -> str:
    """Stability and controls of one run's setting, for the recommendation; empty if neither was measured."""
    same = stable[[settings.key(row) == settings.key(best) for row in stable.to_dict("records")]]
    parts = [verdict(same)] if len(same) else []
    beside = df[[settings.key(row, *CONTROLS) == settings.key(best, *CONTROLS) for row in df.to_dict("records")]]
    found = selection.beside_controls(beside, baseline)
    if len(found):
        losses = found[(found["control"] != "") & ~found["control"].str.contains("model_init")]
        said, measure = reached_text(found), selection.cost(losses)
        for least in losses.nsmallest(1, measure).to_dict("records"):
            loss = f"{COLUMNS[measure].title} {number(least[measure], measure)} nats/token"
            said = f"The control that loses least is {least['control']}: {loss}. {said}"
        parts.append(said)
    return "\n\n".join(parts)


def controls(df: pd.DataFrame, baseline: pd.DataFrame | None = None) -> Markdown:
    """Each setting beside its controls, and the measures that a control reaches."""
    found = selection.beside_controls(df, baseline)
    if found.empty:
        return Markdown("No control was run here (parameters `freeze` and `model_init`).\n")
    measures = [name for name in selection.COMPARED if name in found and found[name].notna().any()]
    shown = found.assign(control=found["control"].replace("", MISSING)).astype({name: object for name in measures})
    for row, reached in enumerate(found["reached"]):
        for name in reached:
            shown.loc[row, name] = f"{number(found.loc[row, name], name)} ≈"
    caption = "Settings beside their controls, means over seeds; ≈ marks what a control reaches."
    if found["control"].str.contains("model_init").any():
        caption += " An untrained language model has no loss to lose, so its losses are not compared."
    return markdown(
        reached_text(found),
        html_table(shown, ["name", "control", "seeds", *measures], caption=caption, mark_best=False),
    )


def reached_text(found: pd.DataFrame) -> str:
    """Which measures a control reaches (`selection.beside_controls`), in a sentence; empty without controls."""
    if found.empty:
        return ""
    by_measure: dict[str, list[str]] = {}
    for row in found.to_dict("records"):
        for name in row["reached"]:
            by_measure.setdefault(name, []).append(row["control"])
    kinds = counted(int((found["control"] != "").sum()), "control")
    if not by_measure:
        return f"{kinds}, and none reaches its setting on any measure."
    parts = [f"{COLUMNS[name].title} ({', '.join(dict.fromkeys(those))})" for name, those in by_measure.items()]
    return f"A control reaches **{'; '.join(parts)}**: these measures say nothing about what was learnt."


def _bounds(stable: pd.DataFrame) -> list[str]:
    both = zip(stable["stable_pct_low"], stable["stable_pct_high"], strict=True)
    return [bounds(low, high, "stable_pct") for low, high in both]
