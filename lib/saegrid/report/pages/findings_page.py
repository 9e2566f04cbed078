"""The five findings as a page: the claims, the rules, and sentences with each finding's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from saegrid.analysis import findings, published_sweep
from saegrid.analysis.findings import Finding
from saegrid.analysis.numbers import between, change, counted, listed, number, signed
from saegrid.analysis.origins.headlines import NOT_SIGNIFICANT
from saegrid.config import settings
from saegrid.report.figures.strips import Look, Mark, Row, strips
from saegrid.report.tables import Markdown, from_template, html_table, markdown

HERE, THERE = Look("this grid"), Look("published rows", shape="D", hollow=True)
SIGNS = {
    findings.HOLDS: ("✓", "holds"),
    findings.FAILS: ("✗", "fails"),
    NOT_SIGNIFICANT: ("~", "open"),
    findings.NOT_TESTABLE: ("○", "open"),
}


@dataclass(frozen=True)
class Claim:
    """A published claim, and how its finding is worded."""

    title: str
    text: str
    """The published sentence."""
    rule: str
    """The rule for the verdict, with its numbers."""
    effect: str
    """What the effect is; the finding's facts fill in its {names}."""
    sentence: Callable[[Finding], str]
    """The numbers that the verdict rests on."""


def _pairs(finding: Finding) -> str:
    facts = finding.facts
    if not facts["pairs"]:
        return "These rows hold no pair of BatchTopK and TopK at the same setting."
    return (
        f"Of {counted(facts['pairs'], 'matched pair')} BatchTopK has the lower MSE in {facts['val_mse']}, no more "
        f"dead latents in {facts['dead_pct']} and the lower delta loss in {facts['delta_loss']}: on average "
        f"{signed(finding.effect)} nats/token against TopK."
    )


def _dead(finding: Finding) -> str:
    small, enough = finding.facts["small"], finding.facts["enough"]
    both = f"{_dead_share(small)}; {_dead_share(enough)}." if len(small) and len(enough) else ""
    if finding.verdict != findings.NOT_TESTABLE:
        return f"At {findings.DEAD_EXPANSION}x, {both}"
    text = (
        f"These rows hold no K = {findings.SMALL_K} beside K of at least {findings.ENOUGH_K} at "
        f"{findings.DEAD_EXPANSION}x."
    )
    return f"{text} Nearest to it, at {findings.DEAD_EXPANSION}x: {both}" if both else text


def _dead_share(rows: pd.DataFrame) -> str:
    ks = " and ".join(f"{k}" for k in sorted(rows["k"].unique()))
    return f"K = {ks} leaves {between(rows['dead_pct'], '.1f')}% dead"


def _sweet(finding: Finding) -> str:
    best, rival = finding.facts["best"], finding.facts["rival"]
    if len(rival):
        return f"The best claimed run, {_described(best)}; the best other, {_described(rival)}."
    text = f"These rows hold no BatchTopK at K = {findings.SWEET_K} with 4x or 8x to compare."
    return f"{text} The best of BatchTopK and TopK here: {_described(best)}." if len(best) else text


def _described(rows: pd.DataFrame) -> str:
    row = rows.iloc[0].to_dict()
    return (
        f"{settings.label(row)}, has delta loss {number(row['delta_loss'], 'delta_loss')} nats/token, frac_rec "
        f"{number(row['frac_rec_pct'], 'frac_rec_pct')}% and {number(row['dead_pct'], 'dead_pct')}% dead"
    )


def _dense(finding: Finding) -> str:
    lowest = finding.facts["lowest"]
    if lowest.empty:
        return "These rows hold no JumpReLU with a fixed threshold."
    theta = number(lowest["threshold"].iloc[0], "threshold")
    if "theta_over_rms" in lowest and lowest["theta_over_rms"].notna().all():
        theta += f" ({between(lowest['theta_over_rms'], '.2g')} RMS of the pre-activations)"
    share = 100 * lowest["l0"] / lowest["d_sae"]
    return (
        f"At the smallest threshold, θ = {theta}, JumpReLU fires {between(share, '.1f')}% of its latents "
        f"(L0 {between(lowest['l0'], ',.0f')}), with frac_rec {between(lowest['frac_rec_pct'], '.1f')}% "
        f"and NMSE {between(lowest['nmse'], '.3g')}."
    )


def _large(finding: Finding) -> str:
    facts, parts = finding.facts, []
    if finding.verdict == findings.NOT_TESTABLE:
        parts.append(f"These rows hold no {findings.LARGE}x beside {findings.MEDIUM}x at the same K.")
    if facts["by_arch"]:
        told = " and ".join(_gap(arch, gap) for arch, gap in facts["by_arch"].items())
        sizes = f"From {facts['small']}x to {facts['large']}x"
        parts.append(f"{sizes} at matched K, delta loss moves by {told}; below 0 is a gain.")
        worse = [arch for arch, gap in facts["by_arch"].items() if gap.mean > findings.LITTLE_NATS]
        parts += [f"For {listed(worse)}, {facts['large']}x adds nothing: it loses more."] if worse else []
    return " ".join(parts)


def _gap(arch: str, gap: findings.Gap) -> str:
    n, low, high = len(gap.gaps), min(gap.gaps), max(gap.gaps)
    spread = "" if n == 1 else f", from {signed(low)} to {signed(high)}"
    return f"{signed(gap.mean)} nats/token for {arch} ({counted(n, 'pair')}{spread})"


CLAIMS: dict[int, Claim] = {
    1: Claim(
        "BatchTopK against TopK",
        "BatchTopK beats TopK at every configuration, on MSE and on dead latents.",
        "Holds if BatchTopK has the lower MSE and no more dead latents in every matched pair of runs.",
        "Delta loss, BatchTopK − TopK",
        _pairs,
    ),
    2: Claim(
        "Small K and dead latents",
        "K=64 at 8x leaves 57% of latents dead: K should be at least 128 to 220.",
        f"Holds if at {findings.DEAD_EXPANSION}x the runs with K = {findings.SMALL_K} leave at least "
        f"{findings.MOSTLY_DEAD_PCT:g}% dead, and those with K of at least {findings.ENOUGH_K} fewer (means over the "
        "runs).",
        "Delta loss, smaller K − larger K",
        _dead,
    ),
    3: Claim(
        "The sweet spot",
        "The sweet spot is BatchTopK, 4x or 8x, K=220: about 90-93% frac_rec, 13-21% dead.",
        "Holds if the lowest delta loss of all BatchTopK and TopK runs is BatchTopK, 4x or 8x, K = "
        f"{findings.SWEET_K}, with frac_rec of at least {findings.SWEET_FRAC_REC_PCT:g}% and at most "
        f"{findings.SWEET_DEAD_PCT:g}% dead.",
        "Delta loss, best claimed − best other",
        _sweet,
    ),
    4: Claim(
        "JumpReLU at low thresholds",
        "JumpReLU reconstructs almost perfectly, but by firing 10-45% of its latents: not sparse at low thresholds.",
        "Holds if at the smallest threshold every JumpReLU run has frac_rec of at least "
        f"{findings.NEAR_PERFECT_FRAC_REC_PCT:g}% and fires at least {findings.DENSE_SHARE_PCT:g}% of its latents.",
        "Delta loss at the smallest θ",
        _dense,
    ),
    5: Claim(
        "16x against 8x",
        "16x adds little over 8x at matched K.",
        f"Holds if for each architecture {findings.LARGE}x lowers the delta loss of {findings.MEDIUM}x by at most "
        f"{findings.LITTLE_NATS:g} nats/token on average over its pairs; no gain, or a higher loss, is little too. The "
        "effect is that of the architecture that gains most.",
        "Delta loss, {large}x − {small}x{of}",
        _large,
    ),
}
"""The claims by finding number."""


def sentence(finding: Finding) -> str:
    """The numbers that a finding's verdict rests on, in words."""
    return CLAIMS[finding.number].sentence(finding)


def effect_name(finding: Finding) -> str:
    """What a finding's effect is: `Delta loss, 16x − 8x`."""
    arch = finding.facts.get("arch")
    return CLAIMS[finding.number].effect.format(**finding.facts, of=f", {arch}" if arch else "")


def effect_text(finding: Finding) -> str:
    """Effect and interval of a finding: `+0.052 [+0.031, +0.070]`."""
    if finding.effect is None:
        return number(None)
    return signed(finding.effect) if finding.interval is None else change(finding.effect, *finding.interval)


def verdicts_text(own: list[Finding]) -> str:
    """How many findings hold, fail and can't be tested, in a sentence."""
    counts = {word: sum(finding.verdict == word for finding in own) for word in SIGNS}
    parts = []
    for word, count in counts.items():
        text = word.removesuffix("s") if count > 1 and word != findings.NOT_TESTABLE else word
        text = f"{'is' if count == 1 else 'are'} {word}" if word == findings.NOT_TESTABLE else text
        parts += [f"{count} {text}"] if count else []
    return f"On these rows, {', '.join(parts)}."


def steps_text(own: list[Finding]) -> str:
    """On how many training steps the verdicts rest, and the published ones; whether ours are undertrained."""
    known = [finding.steps for finding in own if finding.steps]
    if not known:
        return ""
    low, high = min(low for low, _ in known), max(high for _, high in known)
    text = f"These verdicts rest on runs of {_range(low, high)} training steps, the published ones on runs of about "
    text += f"{published_sweep.STEPS:,}."
    if low < published_sweep.STEPS / 2:
        text += (
            f" At {low / published_sweep.STEPS:.0%} of that, these runs are undertrained next to the published ones."
        )
    return text


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def others_text(finding: Finding) -> str:
    """The same test on other recipes, in words; empty if none of them allows it."""
    told = [
        f"With the recipe `{recipe}` it {other.verdict}. {sentence(other)}" for recipe, other in finding.others.items()
    ]
    return " ".join(told)


def _shown(own: Finding, published: Finding, page: str | None) -> dict[str, Any]:
    """A finding's texts for the templates."""
    claim, steps = CLAIMS[own.number], own.steps
    rests = f"{_range(*steps)} training steps" if steps else ""
    return {
        "title": f"{own.number}. {claim.title}",
        "href": None if page is None else f"{page}#finding-{own.number}",
        "claim": claim.text,
        "own": verdict(own),
        "theirs": verdict(published),
        "sentence": sentence(own),
        "effect": "" if own.effect is None else effect_text(own),
        "effect_name": effect_name(own),
        "their_effect": "" if published.effect is None else effect_text(published),
        "steps": rests,
        "others": " ".join(f"With the recipe {recipe} it {other.verdict}." for recipe, other in own.others.items()),
        "rests": f"{rests} here, about {published_sweep.STEPS:,} there." if rests else "",
    }


def key_findings(own: list[Finding], published: list[Finding], page: str | None = None) -> Markdown:
    """One bullet per finding: verdict, numbers, and the same on the published rows.

    `page` is the path of the findings page relative to this one; None: no links.
    """
    both = zip(own, published, strict=True)
    return from_template("key_findings.html", findings=[_shown(ours, theirs, page) for ours, theirs in both])


def figure(own: list[Finding], published: list[Finding]) -> Markdown:
    """Effect and verdict of every finding, on our rows and on the published ones; each leads to its section."""
    rows = []
    for ours, theirs in zip(own, published, strict=True):
        marks = [] if ours.effect is None else [Mark(HERE, ours.effect, ours.interval)]
        marks += [] if theirs.effect is None else [Mark(THERE, theirs.effect)]
        shown = _shown(ours, theirs, "")
        there = f"published: {SIGNS[theirs.verdict][0]} {shown['their_effect'] or theirs.verdict}"
        rows.append(
            Row(shown["title"], marks, shown["effect"], shown["effect_name"], there, shown["href"], shown["own"])
        )
    caption = (
        "Effect of each finding, with its 95% t interval over problem templates; the published rows allow none. A gap "
        f"below 0 is less loss. {verdicts_text(own)} {steps_text(own)}"
    )
    return strips(rows, axis="Delta loss, or a difference of two (nats/token)", caption=caption, origin=0.0)


def verdict(finding: Finding) -> dict[str, str]:
    """A verdict as sign, word and the name of its colour."""
    sign, mark = SIGNS[finding.verdict]
    return {"sign": sign, "mark": mark, "word": finding.verdict}


def finding_section(own: Finding, published: Finding, links: str = "") -> Markdown:
    """One finding in full: claim, verdict, numbers, rule, its rows, and the verdict on the published rows."""
    claim = CLAIMS[own.number]
    columns = ["name", "l0", "val_mse", "nmse", "dead_pct", "kl", "delta_loss", "frac_rec_pct"]
    parts = [
        f"> {claim.text}",
        f"**On this grid: {SIGNS[own.verdict][0]} {own.verdict}.** {sentence(own)}",
        f"**On the published rows: {SIGNS[published.verdict][0]} {published.verdict}.** {sentence(published)}",
        f"*Rule, fixed before the results.* {claim.rule}",
    ]
    if own.steps:
        parts[1] += (
            f" It rests on {_range(*own.steps)} training steps, the published one on about {published_sweep.STEPS:,}."
        )
    if own.effect is not None:
        interval = ", with its 95% interval" if own.interval else ""
        parts.insert(2, f"{effect_name(own)}: **{effect_text(own)}** nats/token{interval}.")
    if own.others:
        parts.append(f"**Other recipes.** {others_text(own)}")
    for finding, source in ((own, "this grid"), (published, "the published table")):
        if len(finding.evidence):
            caption = f"Finding {own.number}: rows of {source}."
            parts.append(html_table(finding.evidence, columns, caption=caption, links=links if finding is own else ""))
    return markdown(*parts)
