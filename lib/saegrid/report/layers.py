"""What changes over layers, texts, sites and models: parts of the layers page, the home page and the recipes page."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from saegrid.analysis import intervals, published_sweep, selection
from saegrid.analysis.budget import by_budget
from saegrid.analysis.findings import FAILS, HOLDS, NOT_TESTABLE, Finding, all_findings
from saegrid.analysis.numbers import COLUMNS, bounds, change, listed, number, signed
from saegrid.analysis.origins import headlines as claims
from saegrid.analysis.origins.headlines import NOT_SIGNIFICANT, Headline, Held, findings_by_origin, headlines
from saegrid.analysis.origins.layers import hardest
from saegrid.analysis.scaling import MEASURES
from saegrid.config import settings
from saegrid.config.grid import L0_BUDGET
from saegrid.report.figures import over_layers
from saegrid.report.pages import findings_page
from saegrid.report.pages.findings_page import CLAIMS, SIGNS
from saegrid.report.tables import Markdown, from_template, markdown, pipe_table

TITLES = {
    "topk_loses_less": "With the published recipe, TopK loses less than BatchTopK",
    "improved_is_far_better": f"The improved recipe leaves less than {claims.FEW_DEAD_PCT:g}% of BatchTopK's latents "
    "dead, at a tenth of the loss or less",
    "matryoshka_loses_least": "Matryoshka with the improved recipe loses least of all settings here",
}
"""The project's headlines, as `analysis/origins/headlines.py` names them."""


def words(df: pd.DataFrame) -> str:
    """What varies between the origins of these rows: `layer and text`."""
    names = {"dataset": "text", "activations": "text", "text": "text form", "layer": "layer", "site": "site"}
    varied = [names.get(name, name.replace("_", " ")) for name in settings.varying(df.to_dict("records"))]
    return listed(dict.fromkeys(varied or ["layer"]))


def section(df: pd.DataFrame, prompts: pd.DataFrame, pages: str = "", level: str = "###") -> Markdown:
    """All parts: the headlines in words, claims by origin, the hardest layers, and each measure over layers.

    `level` is that of the headings inside.
    """
    found = headlines(df, prompts)
    parts = [_bullets(found), claims_table(df, prompts, found, pages), exceptions(found, df)]
    if df["layer"].nunique() > 1:
        parts += [f"{level} Which layer is hardest?", hardest_text(df), f"{level} Over layers", over_layers.figures(df)]
    return markdown(*filter(None, parts))


# --- the headlines


def verdicts(found: list[Headline]) -> list[str]:
    """At how many origins each headline holds, is not significant and fails: a sentence per testable headline."""
    told = []
    for headline in found:
        counts = {word: len(headline.where(word)) for word in (HOLDS, NOT_SIGNIFICANT, FAILS)}
        if known := sum(counts.values()):
            parts = [f"holds at {counts[HOLDS]} of {known}"]
            parts += [f"{word} at {counts[word]}" for word in (NOT_SIGNIFICANT, FAILS) if counts[word]]
            told.append(f"**{TITLES[headline.name]}**: {', '.join(parts)}.")
    return told


def _bullets(found: list[Headline]) -> str:
    return "\n".join(f"- {sentence}" for sentence in verdicts(found))


def exceptions(found: list[Headline], df: pd.DataFrame) -> str:
    """Where a headline is not significant or fails, with the number behind it; empty if all hold."""
    rows = [
        (TITLES[headline.name], origin, headline.held[origin].verdict, _told(headline, origin))
        for headline in found
        for origin in by_text(df)
        if headline.held[origin].verdict in (NOT_SIGNIFICANT, FAILS)
    ]
    return pipe_table(["Headline", "Where", "Verdict", "By how much, with its own 95% interval"], rows) if rows else ""


def _told(headline: Headline, origin: str) -> str:
    """The number behind a verdict."""
    held, cost = headline.held[origin], MEASURES[headline.measure]
    if held.told is None:
        return ""
    if headline.name == "improved_is_far_better":
        share, low, high = (100 * end for end in held.told[:3])
        dead = number(held.facts["dead_pct"], "dead_pct")
        within = f" [{low:.1f}, {high:.1f}]" if held.told.interval else ""
        return f"{share:.1f}% of the {cost}{within}, {dead}% dead"
    text = f"{change(*held.told[:3])} nats/token of {cost}"
    return f"{text} against {held.facts['rival']}" if held.facts.get("rival") else text


def claims_table(df: pd.DataFrame, prompts: pd.DataFrame | None, found: list[Headline], pages: str = "") -> Markdown:
    """Published findings and this project's headlines by origin: a row per claim, a column per origin.

    `pages` is the folder of the origins' own pages, relative to this one; empty: no links.
    """
    origins = list(by_text(df))
    findings, rows = findings_by_origin(df, prompts), []
    for number_ in CLAIMS:
        by_origin = {name: those[number_ - 1] for name, those in findings.items()}
        verdicts = {name: finding.verdict for name, finding in by_origin.items()}
        small = {name: "" if one.effect is None else signed(one.effect, 2) for name, one in by_origin.items()}
        rows.append(_row(f"Finding {number_}: {CLAIMS[number_].title}", verdicts, small))
    for headline in found:
        verdicts = {name: held.verdict for name, held in headline.held.items()}
        rows.append(
            _row(TITLES[headline.name], verdicts, {n: _short(headline, held) for n, held in headline.held.items()})
        )
    untested = [row["title"] for row in rows if not row["of"]]
    cost = COLUMNS[selection.cost(df)].title
    caption = (
        f"Which claim holds at which {words(df)}: ✓ holds, ~ not significant, ✗ fails, ○ not testable. In small type: "
        f"the effect in nats/token, of delta loss for a finding and of {cost} for a headline; for the improved recipe, "
        f"its share of the published one's {cost}. The comparisons of a headline are corrected for all columns (Holm, "
        f"{intervals.LEVEL:.0%}); “not significant” points the headline's way, but may be chance."
    )
    caption += f" These runs do not test: {'; '.join(untested)}." if untested else ""
    groups, heads = _heads(df, pages)
    return from_template(
        "claims_by_origin.html", caption=caption, groups=groups, heads=heads, origins=origins,
        rows=[row for row in rows if row["of"]],
    )  # fmt: skip


def _row(title: str, verdicts: dict[str, str], small: dict[str, str]) -> dict[str, Any]:
    known = [verdict for verdict in verdicts.values() if verdict != NOT_TESTABLE]
    cells = {}
    for name, word in verdicts.items():
        sign, mark = SIGNS[word]
        cells[name] = {"sign": sign, "mark": mark, "word": word, "small": small[name]}
    return {"title": title, "holds": known.count(HOLDS), "of": len(known), "cells": cells}


def _short(headline: Headline, held: Held) -> str:
    if held.told is None:
        return ""
    percent = headline.name == "improved_is_far_better"
    return f"{100 * held.told.value:.0f}%" if percent else signed(held.told.value, 2)


def by_text(df: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each origin by its label, those of one text together, its layers in order."""
    texts = list(selection.by_origin(df, "layer").values())
    rank = {run_id: n for n, rows in enumerate(texts) for run_id in rows["run_id"]}
    parts = selection.by_origin(df).items()
    return dict(sorted(parts, key=lambda part: (rank[part[1]["run_id"].iloc[0]], part[1]["layer"].iloc[0])))


def _heads(df: pd.DataFrame, pages: str) -> tuple[list[tuple[str, int]], list[dict[str, str]]]:
    """Heads of the columns, one per origin (`by_text`): its layer, below its text, if both vary."""
    texts = {name: len(selection.by_origin(rows)) for name, rows in selection.by_origin(df, "layer").items()}
    layered = df["layer"].nunique() > 1 and len(texts) > 1
    heads = [
        {
            "text": str(rows["layer"].iloc[0]) if layered else name,
            "href": f"{pages}{slug(name)}.html" if pages else "",
        }
        for name, rows in by_text(df).items()
    ]
    return [(f"{name}: layer", n) for name, n in texts.items()] if layered else [], heads


def slug(origin: str) -> str:
    """The name of an origin's page."""
    return re.sub(r"[^0-9A-Za-z]+", "-", origin).strip("-")


# --- the published findings


def findings_overview(own: dict[str, list[Finding]], df: pd.DataFrame, prompts: pd.DataFrame | None) -> Markdown:
    """Verdicts on this grid's rows: a figure of the five findings, or all claims by origin if there are several."""
    if len(own) == 1:
        return findings_page.figure(own[""], all_findings(published_sweep.rows()))
    more = "[How each measure moves](layers.qmd), and which layer is hardest."
    return markdown(claims_table(df, prompts, headlines(df, prompts), "layers/"), more)


def finding_sections(own: dict[str, list[Finding]], links: str = "") -> Markdown:
    """All findings in full, each under its heading."""
    parts = []
    for n, claim in CLAIMS.items():
        parts += [f"### Finding {n}: {claim.title} {{#finding-{n}}}", finding_section(own, n, links)]
    return markdown(*parts)


def finding_section(own: dict[str, list[Finding]], n: int, links: str = "") -> Markdown:
    """The `n`th finding in full; of several origins, the verdict and numbers of each."""
    published = all_findings(published_sweep.rows())[n - 1]
    if len(own) == 1:
        return findings_page.finding_section(own[""][n - 1], published, links)
    alike: dict[str, list[str]] = {}
    for origin, those in own.items():
        finding = those[n - 1]
        parts = [f"{SIGNS[finding.verdict][0]} {finding.verdict}.", findings_page.sentence(finding)]
        if finding.effect is not None:
            effect = findings_page.effect_text(finding)
            parts.append(f"{findings_page.effect_name(finding)}: **{effect}** nats/token.")
        parts.append(findings_page.others_text(finding))
        alike.setdefault(" ".join(filter(None, parts)), []).append(origin.capitalize())
    lines = [f"- **{'Everywhere' if len(alike) == 1 else '; '.join(where)}**: {text}" for text, where in alike.items()]
    return markdown(
        f"> {CLAIMS[n].text}",
        f"*Rule, fixed before the results.* {CLAIMS[n].rule}",
        "\n".join(lines),
        f"**On the published rows: {SIGNS[published.verdict][0]} {published.verdict}.** "
        f"{findings_page.sentence(published)}",
    )


# --- the recommended runs


def recommended(
    df: pd.DataFrame, prompts: pd.DataFrame | None, budget: int, pages: str = "", runs: str = ""
) -> Markdown:
    """The recommended run at each origin within an L0 budget: its cost, and how many settings are as good."""
    measure, rows, over = selection.cost(df), [], False
    sizes = len(df[["expansion", "k", "threshold"]].drop_duplicates()) > 1
    for origin, those in by_text(df).items():
        best = selection.recommend(those, budget)
        over |= not selection.is_within(best["l0"], budget)
        choice = next((c for c in by_budget(those, prompts, (budget,)) if c.best["run_id"] == best["run_id"]), None)
        interval = "" if choice is None or not choice.interval else bounds(*choice.interval, measure)
        names = ("l0", "delta_loss", "loss_recovered_mean", "dead_pct")
        rows.append(
            {
                "origin": origin,
                "href": f"{pages}{slug(origin)}.html" if pages else "",
                "run": settings.label(best, sizes),
            }
            | {"run_href": f"{runs}{best['run_id']}.html" if runs else "", "cost": number(best[measure], measure)}
            | {"interval": interval, "values": [number(best[name], name) for name in names if name != measure]}
            | {"alike": "" if choice is None or choice.interval is None else f"{len(choice.alike)} of {choice.others}"}
        )
    heads = [COLUMNS[name] for name in ("l0", "delta_loss", "loss_recovered_mean", "dead_pct") if name != measure]
    sparsest = ", or the sparsest where none is within it" if over else ""
    return from_template(
        "recommended.html",
        caption=f"The run with the lowest {MEASURES[measure]} within an L0 of {budget}{sparsest}, with its 95% "
        "interval; “as good”: other settings that can't be distinguished from it (Holm over all of them).",
        where=words(df).capitalize(), cost=COLUMNS[measure],
        heads=[(column.title, "" if column.unit == "1" else column.unit) for column in heads], rows=rows,
    )  # fmt: skip


# --- over layers


def hardest_text(df: pd.DataFrame) -> str:
    """The layer with the highest cost, and with the highest FVU, of each architecture and recipe."""
    told = []
    for (measure, text), rows in hardest(df).groupby(["measure", "text"], sort=False):
        layers = [
            f"layer {layer} for {_listed(those['line'], rows['line'])} ({number(those['mean'].min(), measure)}"
            + (f" to {number(those['mean'].max(), measure)})" if len(those) > 1 else ")")
            for layer, those in rows.groupby("layer", sort=True)
        ]
        where = f" on {text}" if text else ""
        told.append(f"- By {COLUMNS[measure].title}{where}: {'; '.join(layers)}.")
    return "\n".join(told)


def _listed(some: pd.Series, every: pd.Series) -> str:
    return "each architecture and recipe" if len(some) == len(every) > 1 else ", ".join(some)


def overview(
    df: pd.DataFrame, prompts: pd.DataFrame | None, budget: int = L0_BUDGET, pages: str = "", runs: str = ""
) -> Markdown:
    """The home page's answer for a grid of several origins: which run at each, and which claim holds where."""
    found = headlines(df, prompts)
    return markdown(
        f"## At each {words(df)}",
        "Each is judged by itself: no ranking, mean or interval goes across.",
        "### Recommendation", recommended(df, prompts, budget, pages, runs),
        "### What holds where", *filter(None, [_bullets(found)]),
        claims_table(df, prompts, found, pages),
    )  # fmt: skip
