"""The page about recipes, from tables kept in the repository (`results/recipes`, `results/ablation`). Free of torch.

It does not depend on the grid of the report that it stands in: these grids take longer than a quick look.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from saegrid import ablation, intervals, results
from saegrid.tables import Markdown, html_table, markdown, number

GRIDS = {"recipes": "Two recipes", "ablation": "What each choice buys"}
"""Folders under `results/`, made by the grid files of the same names, and the titles of their sections."""


def page(root: str | Path = ".") -> Markdown:
    """All sections; one whose tables are missing says by which command they are made."""
    return markdown(*(_section(Path(root) / "results" / name, name, title) for name, title in GRIDS.items()))


def _section(folder: Path, name: str, title: str) -> str:
    if not (folder / "results_tidy.csv").exists():
        return f"## {title}\n\nNot measured yet: `make {name}` does it."
    df, prompts = results.read_tidy(folder), results.read_prompts(folder)
    table = ablation.by_recipe(df, prompts)
    keys = [key for key in ablation.SETTING if table[key].nunique() > 1]
    columns = [*(["arch"] if "arch" in keys else []), "recipe", "seeds", *ablation.MEANS, *ablation.BETWEEN]
    caption = f"Means over seeds, made by `make {name}`; “but” names the choice that differs from the recipe."
    return markdown(
        f"## {title}", _what(df), claim(df, prompts), html_table(table, columns, caption=caption, mark_best=True)
    )


def _what(df: pd.DataFrame) -> str:
    one = df.iloc[0]
    return (
        f"{len(df)} runs on layer {one['layer']} of {one['model'].removeprefix('embedded:')}: "
        f"{one['n_train_rows']:,} tokens, {one['epochs']} epochs, {one['expansion']}x, K = {one['k']}, "
        f"{df['seed'].nunique()} seeds; judged on {one['n_val_rows']:,} held-out tokens and {one['n_eval_prompts']} "
        "prompts. Intervals: 95%, by a paired bootstrap over prompt templates and seeds; few seeds make them narrower "
        "than they should be."
    )


def claim(df: pd.DataFrame, prompts: pd.DataFrame) -> str:
    """What `improved` makes of `published`'s delta loss and dead latents, in a sentence for each architecture."""
    pure = ablation.named(df)
    drawn, lines = intervals.draws(prompts), []
    for arch, rows in pure.groupby("arch", sort=False):
        groups = {recipe: rows[rows["recipe"] == recipe] for recipe in ("published", "improved")}
        if any(group.empty for group in groups.values()):
            continue
        mean = {recipe: group["delta_loss"].mean() for recipe, group in groups.items()}
        over = {recipe: intervals.over_seeds(drawn, list(group["run_id"])) for recipe, group in groups.items()}
        low, high = intervals.central(100 * over["improved"] / over["published"])
        dead = {recipe: group["dead_pct"] for recipe, group in groups.items()}
        lines.append(
            f"- **{arch}**: delta loss {number(mean['published'], 'delta_loss')} → "
            f"{number(mean['improved'], 'delta_loss')} nats/token, "
            f"{100 * mean['improved'] / mean['published']:.1f}% of it [{low:.1f}, {high:.1f}]; dead latents "
            f"{number(dead['published'].mean(), 'dead_pct')}% → {number(dead['improved'].mean(), 'dead_pct')}% "
            f"(at most {number(dead['improved'].max(), 'dead_pct')}%)"
        )
    return "\n".join(["From `published` to `improved`:\n", *lines]) if lines else ""
