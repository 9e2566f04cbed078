"""Parts that the home page and the released model card share: budgets, the card's result tables, class, naming.

Free of torch: the class is the source file's text.
"""

from __future__ import annotations

import ast
from importlib import resources
from typing import Any

import pandas as pd

from saegrid.analysis import published_sweep, selection
from saegrid.analysis.budget import BUDGETS, Choice, Price, by_budget
from saegrid.analysis.numbers import COLUMNS, MEANINGS, between, bounds, change, counted, number, signed
from saegrid.config import settings
from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.grid import L0_BUDGET
from saegrid.report.tables import Markdown, best_values, cells, folded, from_template, headers, markdown

AS_PUBLISHED = {
    "val_mse": "Val MSE",
    "nmse": "NMSE",
    "dead_pct": "Dead %",
    "delta_loss": "Delta Loss",
    "frac_rec_pct": "Frac Rec %",
}
"""Columns of the published card's tables, with its heads."""
OWN = {"kl": "KL", "loss_recovered_mean": "Loss rec.", "fvu_no_sink": "FVU", "stable_pct": "Stable %"}
"""Columns that the published card lacks."""
SETTINGS = {"expansion": "Exp", "k": "K", "threshold": "Threshold", "l0": "L0"}
PRINTED = {"l0": ".0f", "val_mse": ".4f", "nmse": ".6f", "dead_pct": ".1f", "delta_loss": ".3f", "frac_rec_pct": ".1f"}
"""Decimals of the published card."""
METHODS = ("__init__", "encode", "decode", "forward")
"""Methods of the base class that the card shows."""


# --- budgets


def budget_cards(
    df: pd.DataFrame, prompts: pd.DataFrame | None = None, budget: int = L0_BUDGET, links: str = ""
) -> Markdown:
    """One card per L0 budget: the best run, its cost, what is as good, and when to choose otherwise."""
    measure = selection.cost(df)
    budgets = tuple(sorted({*BUDGETS, budget}))
    choices = {choice.budget: choice for choice in by_budget(df, prompts, budgets)}
    cards, before = [], None
    for limit in budgets:
        card: dict[str, Any] = {"budget": limit, "chosen": limit == budget, "none": ""}
        choice = choices.get(limit)
        if choice is None:
            cards.append(card | {"none": "No run of this grid is this sparse."})
        elif before is not None and before.best["run_id"] == choice.best["run_id"]:
            cards.append(card | {"none": f"As for L0 {before.budget}: no denser run within this budget costs less."})
        else:
            cards.append(card | _told(choice, before, measure, links))
            before = choice
    return from_template("budgets.html", cards=cards)


def _told(choice: Choice, before: Choice | None, measure: str, links: str) -> dict[str, Any]:
    best, column = choice.best, COLUMNS[measure]
    within = "" if choice.interval is None else bounds(*choice.interval, measure)
    facts = f"L0 {number(best['l0'], 'l0')} of {number(best['d_sae'], 'd_sae')} latents, "
    facts += f"{number(best['dead_pct'], 'dead_pct')}% dead, "
    facts += f"loss recovered {number(best['loss_recovered_mean'], 'loss_recovered_mean')}."
    names = "; ".join(f"{settings.label(price.run)} ({_more(price)})" for price in choice.alike)
    alone = "It is the only setting within this budget." if choice.others == 0 else "Every other setting costs more."
    alone = alone if choice.interval or not choice.others else ""
    return {
        "label": settings.label(best),
        "id": best["name"],
        "href": f"{links}{best['run_id']}.html" if links else "",
        "cost": number(best[measure], measure),
        "unit": f"{column.unit} of {column.title}" if measure == "kl" else f"{column.unit}, {column.title.lower()}",
        "interval": within and f"95% interval {within}",
        "facts": facts,
        "alike": f"Not distinguishable from it: {names}." if names else alone,
        "otherwise": _otherwise(choice, before, measure),
    }


def _otherwise(choice: Choice, before: Choice | None, measure: str) -> list[str]:
    """When another run is the better choice, with its price."""
    reasons = []
    if before is not None and choice.sparser is not None:
        reasons.append(
            f"to read single latents: fewer per token, L0 up to {before.budget}, cost {_more(choice.sparser)}"
        )
    if choice.smaller is not None:
        label = settings.label(choice.smaller.run)
        reasons.append(f"for a dictionary of half the size or less: {label}, {_more(choice.smaller)}")
    if choice.exact is not None:
        reasons.append(f"for exactly K latents in each row: {settings.label(choice.exact.run)}, {_more(choice.exact)}")
    return reasons


def _more(price: Price) -> str:
    return signed(price.more) if price.interval is None else change(price.more, *price.interval)


# --- results


def result_tables(df: pd.DataFrame, links: str = "") -> Markdown:
    """The published card's two tables, the published value in small type below ours, then what the field trusts."""
    by_l0 = df["arch"].map(lambda name: ARCHITECTURES[name].takes_threshold or ARCHITECTURES[name].l1)
    best, note = best_values(df, [name for name in (*AS_PUBLISHED, *OWN) if name in df])
    theirs = selection.published_beside(df, published_sweep.rows())
    tables = []
    for rows, given in ((df[~by_l0], ["expansion", "k"]), (df[by_l0], ["expansion", "threshold", "l0"])):
        if len(rows):
            family = "TopK family" if given[1] == "k" else " and ".join(dict.fromkeys(rows["arch"]))
            tables.append(_result_table(rows, family, given, best, note, theirs, links))
    return markdown(
        *tables,
        "Delta Loss and KL are nats/token; Frac Rec is CE clean / CE spliced, as published; loss rec. is the share of "
        f"the loss recovered against the mean, FVU leaves attention sinks out ({between(df['sink_pct'], '.2f')}% "
        "of the rows), stable latents are found with another seed.",
    )


def _result_table(
    df: pd.DataFrame,
    family: str,
    given: list[str],
    best: dict[str, set],
    note: str,
    theirs: pd.DataFrame,
    links: str,
) -> Markdown:
    own = [name for name in OWN if name in df and df[name].notna().any()]
    columns = [*given, *AS_PUBLISHED, *own]
    heads = [({**SETTINGS, **AS_PUBLISHED, **OWN}[name], "", MEANINGS.get(name, "")) for name in columns]
    small = {
        (n, name): format(theirs.loc[run_id, name], PRINTED[name]).replace("-", "−")
        for n, run_id in enumerate(df["run_id"])
        for name in columns
        if run_id in theirs.index and name in PRINTED and not pd.isna(theirs.loc[run_id, name])
    }
    caption = f"{family}: {counted(len(df), 'run')}."
    caption += " Small: the published value of the same setting, on Qwen2.5-0.5B-Instruct." if small else ""
    body = cells(df, columns, best, small)
    for row, shown in zip(df.to_dict("records"), body, strict=True):
        shown[0]["text"] += "x"
        if given[1] == "threshold" and pd.isna(row["threshold"]):  # a trained or penalised one, for a K
            shown[1] |= {"text": f"for K\u00a0=\u00a0{row['k']}", "words": True, "missing": False}
    titles = headers(df, links=links)
    for row, head in zip(df.to_dict("records"), titles, strict=True):
        head["text"] = settings.label(row, sizes=False)
    return from_template(
        "table.html",
        caption=caption,
        note=note,
        tools="",
        groups=[("", 1 + len(given)), ("As the published card", len(AS_PUBLISHED)), ("What the field trusts", len(own))]
        if own
        else [],
        heads=[("SAE", "", ""), *heads],
        rows=list(zip(titles, body, strict=True)),
    )


# --- the class, files, training


def architecture_text(df: pd.DataFrame) -> Markdown:
    """What each architecture of the grid keeps, and the classes from `saegrid/core/sae.py`."""
    used = [arch for arch in ARCHITECTURES.values() if arch.name in set(df["arch"])]
    return markdown(
        "pre = encoder(x − b_pre); x_hat = decoder(z) + b_pre; decoder rows of unit norm. What z keeps of pre:",
        "\n".join(f"- **{arch.name}**: {arch.kept}" for arch in used),
        folded(
            "The classes, from lib/saegrid/core/sae.py (of the base class, the methods that make a reconstruction)",
            f"```py\n{class_source([arch.name for arch in used])}\n```",
        ),
    )


def class_source(names: list[str]) -> str:
    """The source of the base class, shortened to `METHODS`, and of the named classes with their bases."""
    text = resources.files("saegrid.core").joinpath("sae.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    wanted: list[str] = []
    for name in names:
        chain = [name]
        while (base := ast.unparse(classes[chain[0]].bases[0])) in classes:
            chain.insert(0, base)
        wanted += [one for one in chain if one not in wanted]
    found = []
    for name in wanted:
        node = classes[name]
        spans = [(node.lineno, node.end_lineno)]
        if name == "SAE":
            spans = [(node.lineno, node.body[0].end_lineno)]
            spans += [
                (n.lineno, n.end_lineno) for n in node.body if isinstance(n, ast.FunctionDef) and n.name in METHODS
            ]
        found.append("\n\n".join("\n".join(lines[start - 1 : end]) for start, end in spans))
    return "\n\n\n".join(found)


def naming_text() -> Markdown:
    """How a released file's name is made."""
    return Markdown(
        "`{architecture}_exp{expansion}x_k{K}.pt`, and `JumpReLU_exp{expansion}x_t{threshold}.pt` for a given "
        "threshold, as published: `BatchTopK_exp8x_k220.pt` is a BatchTopK with d_sae = 8 · d_in and K = 220. Another "
        "recipe follows: `BatchTopK_exp8x_k64_improved.pt`. A run id adds the seed and a hash "
        "of all parameters.\n"
    )
