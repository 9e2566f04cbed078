"""The page about recipes, from committed tables (`results/recipes`, `results/peers`, …). Free of torch.

It does not depend on the report's grid: its own grids take much longer than the quick grid.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from saegrid.analysis import ablation, intervals, peers, scaling, selection
from saegrid.analysis.numbers import COLUMNS, change, counted, header, number
from saegrid.analysis.scaling import MEASURES
from saegrid.experiment import pca_table, results
from saegrid.report import layers
from saegrid.report.figures import plots
from saegrid.report.pages import ablation_section, peers_section, scaling_section
from saegrid.report.tables import Markdown, html_table, markdown

GRIDS = {
    "recipes": "Two recipes",
    "ablation": "What each choice buys",
    "scaling": "Scaling",
    "layers": "Other layers, other text",
}
"""Folders under `results/`, made by the grid files of the same names, and the titles of their sections."""

VARIED = ("n_train_rows", "expansion", "k")
SEEDS = "Intervals: 95%, t intervals over prompt templates and seeds, paired."


def page(root: str | Path = ".") -> Markdown:
    """All sections; a section without its tables says which command makes them."""
    sections = []
    for name, title in GRIDS.items():
        folder, made = Path(root) / "results" / name, f"Not measured yet: `make {name}` does it."
        measured = (folder / "results_tidy.csv").exists()
        if name == "layers" and not measured:  # it takes hours, and the other sections stand without it
            continue
        if measured:
            of_its_own = {"scaling": _scaling, "layers": _layers}
            made = of_its_own[name](folder) if name in of_its_own else _comparison(folder, name)
        sections += [f"## {title}", made]
    made = "Not measured yet: `make peer-quality` does it."
    folder = Path(root) / "results/peers"
    sections += ["## Beside other libraries", _peers(folder) if (folder / "runs.csv").exists() else made]
    return markdown(*sections)


def _peers(folder: Path) -> str:
    runs, prompts = peers.read(folder)
    found = peers.compared(runs, prompts)
    figures = []
    for y in (selection.cost(found), "fvu_no_sink"):
        text = f"{header(y)} over the realised L0, a line for each library and architecture; lower is better."
        figures.append(plots.figure(peers_section.curves(found, y=y), alt=text, caption=text))
    return markdown(
        peers_section.rules(found),
        peers_section.verdict(found),
        plots.side_by_side(figures),
        peers_section.table(found),
    )


def _scaling(folder: Path) -> str:
    df = selection.without_controls(results.read_tidy(folder))
    measure = selection.cost(df)
    panels = [("fvu_no_sink", "d_sae", "k"), (measure, "d_sae", "k")]
    panels += [(measure, "k", "n_train_rows"), ("dead_pct", "d_sae", "k")]
    figures = []
    for y, x, by in panels:
        text = f"{header(y)} over {header(x)}, a line for each {header(by)}; means over the other sizes."
        figures.append(plots.figure(scaling_section.curves(df, y=y, x=x, by=by), alt=text, caption=text))
    found, steps = scaling.exponents(df), scaling.steps(df)
    tables = [scaling_section.exponent_table(found, len(df)), scaling_section.step_table(steps)]
    return markdown(_what(df), scaling_section.verdict(found, steps), plots.side_by_side(figures), *tables)


def _layers(folder: Path) -> str:
    df, prompts = selection.without_controls(results.read_tidy(folder)), results.read_prompts(folder)
    where = f"{counted(df['layer'].nunique(), 'layer')} and {counted(df['dataset'].nunique(), 'text')}"
    text = f"Do this project's headlines hold elsewhere? {_what(df)} Each of {where} is judged by itself."
    return markdown(text, layers.section(df, prompts))


def _comparison(folder: Path, name: str) -> str:
    df, prompts = selection.without_controls(results.read_tidy(folder)), results.read_prompts(folder)
    caption = f"Means over {df['seed'].nunique()} seeds, from make {name}"
    if (ablation.named(df)["switched"] != "").any():
        return markdown(_what(df), *_switched(df, prompts, caption))
    table = ablation_section.recipe_means(df, prompts)
    keys = [key for key in ablation.setting(df) if table[key].nunique() > 1]
    columns = [*(["arch"] if "arch" in keys else []), "recipe", "seeds", *ablation.MEANS, *ablation_section.UNCERTAIN]
    said = [_what(df), claim(df, prompts), _beside_pca(table, pca_table.read(folder))]
    return markdown(*filter(None, said), html_table(table, columns, caption=f"{caption}."))


def _switched(df: pd.DataFrame, prompts: pd.DataFrame, caption: str) -> list[str]:
    """The gain from each choice of a recipe: in words, as a figure, and with the means in a table."""
    found, measure = ablation.beside(df, prompts), selection.cost(df)
    text = f"{COLUMNS[measure].title} with one choice of the recipe switched, less that of the whole recipe; bars are "
    text += "95% intervals of each."
    changes = [change(row.more, row.low, row.high) for row in found.itertuples()]
    changed = found[["recipe"]].assign(change=changes)
    table = ablation.by_recipe(df).merge(changed, how="left")
    means = [name for name in ablation.MEANS if name != "dead_pct_no_sink"]  # the column of changes needs the room
    columns = ["recipe", *means, "change"]
    return [
        ablation_section.verdict(found),
        plots.figure(ablation_section.forest(found, measure=measure), alt=text, caption=text),
        html_table(table, columns, caption=f"{caption}; “but” names the choice that differs."),
    ]


def _what(df: pd.DataFrame) -> str:
    one, seeds = df.iloc[0], df["seed"].nunique()
    kind = f"{one['arch']} runs" if df["arch"].nunique() == 1 else "runs"
    shown = {name: " and ".join(f"{value:,}" for value in sorted(df[name].unique())) for name in VARIED}
    read = " and ".join(str(layer) for layer in sorted(df["layer"].unique()))
    text = (
        f"{len(df)} {kind} on layer {read} of {one['model'].removeprefix('embedded:')}: "
        f"{shown['n_train_rows']} tokens, {one['epochs']} epochs, expansion {shown['expansion']}, K = {shown['k']}, "
        f"{counted(seeds, 'seed')}; judged on {one['n_val_rows']:,} held-out tokens and "
        f"{one['n_eval_prompts']} prompts."
    )
    return text if seeds == 1 else f"{text} {SEEDS}"


def _beside_pca(means: pd.DataFrame, pca: pd.DataFrame) -> str:
    """The loss of PCA with K components, and the settings that lose more; empty if it was not measured."""
    same = pca[pca["components"].isin(means["k"].unique())]
    if len(same) != 1 or means["k"].nunique() != 1:
        return ""
    row = same.iloc[0]
    measure = "kl" if selection.cost(pca) == selection.cost(means) == "kl" else "delta_loss"
    worse = means[means[measure] > row[measure]]
    names = ", ".join(f"{arch} ({recipe})" for arch, recipe in zip(worse["arch"], worse["recipe"], strict=True))
    return (
        f"PCA with {row['components']} components has an FVU without sinks of "
        f"{number(row['fvu_no_sink'], 'fvu_no_sink')} and a {MEASURES[measure]} of {number(row[measure], measure)} "
        "nats/token. " + (f"More is lost by {names}." if names else "Every setting here loses less.")
    )


def claim(df: pd.DataFrame, prompts: pd.DataFrame) -> str:
    """Cost and dead latents of `improved` relative to `published`, one sentence per architecture."""
    pure, measure = ablation.named(df), selection.cost(df)
    measured, lines = intervals.measured(prompts, measure), []
    for arch, rows in pure.groupby("arch", sort=False):
        groups = {recipe: rows[rows["recipe"] == recipe] for recipe in ("published", "improved")}
        if any(group.empty for group in groups.values()):
            continue
        mean = {recipe: group[measure].mean() for recipe, group in groups.items()}
        part, low, high, _ = intervals.ratio(measured, groups["improved"], groups["published"])
        dead = {recipe: group["dead_pct"] for recipe, group in groups.items()}
        lines.append(
            f"- **{arch}**: {MEASURES[measure]} {number(mean['published'], measure)} → "
            f"{number(mean['improved'], measure)} nats/token, "
            f"{100 * part:.1f}% of it [{100 * low:.1f}, {100 * high:.1f}]; dead latents "
            f"{number(dead['published'].mean(), 'dead_pct')}% → {number(dead['improved'].mean(), 'dead_pct')}% "
            f"(at most {number(dead['improved'].max(), 'dead_pct')}%)"
        )
    return "\n".join(["From `published` to `improved`:\n", *lines]) if lines else ""
