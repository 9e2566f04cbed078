"""The page about recipes, from committed tables (`results/recipes`, `results/peers`, …). Free of torch.

It does not depend on the report's grid: its own grids take much longer than the quick grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from saegrid.analysis import ablation, intervals, peers, scaling, selection
from saegrid.analysis.numbers import change, counted, header, listed, number, plural
from saegrid.analysis.origins.headlines import headlines
from saegrid.analysis.scaling import MEASURES
from saegrid.experiment import pca_table, results
from saegrid.report import layers
from saegrid.report.figures import plots
from saegrid.report.pages import ablation_section, peers_section, scaling_section, trust_section
from saegrid.report.tables import Markdown, folded, html_table, markdown

VARIED = ("n_train_rows", "expansion", "k")
SEEDS = "Intervals: 95%, t intervals over prompt templates and seeds, paired."


@dataclass(frozen=True)
class Section:
    """A part of the page. `make` turns the folder of its table into a short answer (or "") and the body."""

    title: str
    anchor: str
    table: str
    """Under `results/`."""
    make: Callable[[Path], tuple[str, str]]
    made_by: str = ""
    """The make target that the page names while the table is missing; without one, the section is then left out."""


def page(root: str | Path = ".") -> Markdown:
    """A short answer per section, then all sections; one without its table says which command makes it."""
    short, parts = [], []
    for section in SECTIONS:
        path, answer = Path(root) / "results" / section.table, ""
        body = section.made_by and f"Not measured yet: `make {section.made_by}` does it."
        if path.exists():
            answer, body = section.make(path.parent)
        short += [f"- {answer} [More](#{section.anchor})"] if answer else []
        parts += [f"## {section.title} {{#{section.anchor}}}", body] if body else []
    return markdown(*(["## In short", "\n".join(short)] if short else []), *parts)


def _peers(folder: Path) -> tuple[str, str]:
    found, elsewhere = peers.at_each(folder)
    panels = [
        (peers_section.curves(found, y=y), f"{header(y)} over the realised L0; lower is better.")
        for y in (selection.cost(found), "fvu_no_sink")
    ]
    stand, every = peers_section.stand(found), folded("Every SAE at each K", peers_section.table(found))
    parts = [stand, plots.side_by_side(panels), peers_section.beside(found), every]
    if len(elsewhere):
        k = listed(map(str, sorted(elsewhere["k"].unique())))
        run = listed(dict.fromkeys(elsewhere["peer"] + " " + elsewhere["arch"]))
        said = f"Run there, at K = {k}: {run}. {peers_section.stand(elsewhere)}"
        parts += ["### At other layers and on other text", said]
        parts += [peers_section.beside(elsewhere), folded("Every SAE there", peers_section.table(elsewhere))]
    return f"**Other libraries**: {stand[0].lower()}{stand[1:]}", markdown(
        *parts, peers_section.rules(pd.concat([found, elsewhere]))
    )


def _scaling(folder: Path) -> tuple[str, str]:
    df = selection.without_controls(results.read_tidy(folder))
    measure = selection.cost(df)
    panels = [("fvu_no_sink", "d_sae"), (measure, "d_sae"), (measure, "n_train_rows"), ("dead_pct", "d_sae")]
    figures = [
        (scaling_section.curves(df, y=y, x=x, by="k"), f"{header(y)} over {header(x)}; means over the other sizes.")
        for y, x in panels
    ]
    found, steps = scaling.exponents(df), scaling.steps(df)
    tables = [scaling_section.exponent_table(found, len(df)) if len(found) else "", scaling_section.step_table(steps)]
    body = [_what(df), scaling_section.verdict(found, steps), plots.side_by_side(figures), *tables]
    factors = []
    for size, rows in steps[steps["measure"] == measure].groupby("size", sort=False):
        sizes = " → ".join(number(value, size) for value in [rows["small"].iloc[0], *rows["large"]])
        factors.append(f"{scaling.SIZES[size]} {sizes}: {', '.join(f'× {factor:.2f}' for factor in rows['factor'])}")
    return f"**Size**: each step multiplies {MEASURES[measure]} ({'; '.join(factors)}).", markdown(*body)


def _layers(folder: Path) -> tuple[str, str]:
    df, prompts = selection.without_controls(results.read_tidy(folder)), results.read_prompts(folder)
    where = f"{counted(df['layer'].nunique(), 'layer')} and {counted(df['dataset'].nunique(), 'text')}"
    text = f"Do this project's headlines hold elsewhere? {_what(df)} Each of {where} is judged by itself."
    short = " ".join(layers.verdicts(headlines(df, prompts)))
    return short and f"Elsewhere ({where}): {short}", markdown(text, layers.section(df, prompts))


def _recipes(folder: Path) -> tuple[str, str]:
    df, prompts = selection.without_controls(results.read_tidy(folder)), results.read_prompts(folder)
    table = ablation_section.recipe_means(df, prompts)
    keys = [key for key in ablation.setting(df) if table[key].nunique() > 1]
    columns = [*(["arch"] if "arch" in keys else []), "recipe", "seeds", *ablation.MEANS, *ablation_section.UNCERTAIN]
    said = [_what(df), claim(df, prompts), _beside_pca(table, pca_table.read(folder))]
    caption = f"Means over {df['seed'].nunique()} seeds, from “make recipes”."
    body = markdown(*filter(None, said), html_table(table, columns, caption=caption))
    measure = selection.cost(table)
    best = table.loc[table[measure].idxmin()]
    answer = f"**Take `{best['recipe']}` with {best['arch']}**: the lowest {MEASURES[measure]} of all, "
    answer += f"{number(best[measure], measure)} nats/token"
    same = table[(table["arch"] == best["arch"]) & (table["recipe"] != best["recipe"])]
    told = [f"{number(row[measure], measure)} with `{row['recipe']}`" for row in same.to_dict("records")]
    return f"{answer} ({'; '.join(told)})." if told else f"{answer}.", body


def _switched(folder: Path) -> tuple[str, str]:
    """The gain from each choice of a recipe: in words, as a figure, and with the means in a table."""
    df, prompts = selection.without_controls(results.read_tidy(folder)), results.read_prompts(folder)
    found, measure = ablation.beside(df, prompts), selection.cost(df)
    changes = [change(row.more, row.low, row.high) for row in found.itertuples()]
    table = ablation.by_recipe(df).merge(found[["recipe"]].assign(change=changes), how="left")
    means = [name for name in ablation.MEANS if name != "dead_pct_no_sink"]  # the column of changes needs the room
    caption = f"Means over {df['seed'].nunique()} seeds, from “make ablation”; “but” names the choice that differs."
    body = [
        _what(df),
        ablation_section.verdict(found),
        ablation_section.forest(found, measure=measure),
        html_table(table, ["recipe", *means, "change"], caption=caption),
    ]
    shown = [f"`{choice}`" for choice in found["choice"][found["p"] < intervals.LEVEL]]
    changed = f"only {listed(shown)} {'change' if len(shown) > 1 else 'changes'}" if shown else "none changes"
    answer = f"**Choices**: of {len(found)} switches, {changed} {MEASURES[measure]} measurably."
    return answer, markdown(*body)


def _what(df: pd.DataFrame) -> str:
    one, seeds = df.iloc[0], df["seed"].nunique()
    kind = f"{one['arch']} runs" if df["arch"].nunique() == 1 else "runs"
    shown = {name: listed(f"{value:,}" for value in sorted(df[name].unique())) for name in (*VARIED, "layer")}
    where = plural(df["layer"].nunique(), "layer")
    text = (
        f"{len(df)} {kind} on {where} {shown['layer']} of {one['model'].removeprefix('embedded:')}: "
        f"{shown['n_train_rows']} tokens, {one['epochs']} epochs, expansion {shown['expansion']}, K = {shown['k']}, "
        f"{counted(seeds, 'seed')}; judged on {one['n_val_rows']:,} held-out tokens and "
        f"{one['n_eval_prompts']} prompts."
    )
    text += f" {peers_section.SHARED}" if selection.cost(df) != "kl" else ""
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
        "nats/token. " + (f"These lose more: {names}." if names else "Every setting here loses less.")
    )


def claim(df: pd.DataFrame, prompts: pd.DataFrame) -> str:
    """Cost and dead latents of `improved` relative to `published`, one sentence per architecture."""
    pure, measure = ablation.named(df), selection.cost(df)
    measured, lines = intervals.measured(prompts, measure, df["run_id"]), []
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


SECTIONS = (
    Section("Two recipes", "two-recipes", "recipes/results_tidy.csv", _recipes, "recipes"),
    Section("What each choice gains", "choices", "ablation/results_tidy.csv", _switched, "ablation"),
    Section("Scaling", "scaling", "scaling/results_tidy.csv", _scaling, "scaling"),
    Section("Other layers, other text", "layers", "layers/results_tidy.csv", _layers),
    Section("Other libraries", "libraries", "peers/runs.csv", _peers, "peer-quality"),
    Section("Latents that replicate", "replicate", "stability/stability.csv", trust_section.replicated),
    Section("Known directions", "known-directions", "ground_truth/runs.csv", trust_section.known_directions),
    Section(
        "SAELens' synthetic benchmark", "synthetic", "ground_truth/synthsaebench.csv", trust_section.synthetic_benchmark
    ),
    Section("Sparse probes", "probes", "probes/probes.csv", trust_section.probes),
)
