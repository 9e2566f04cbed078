"""The five findings as text of a page: verdicts, effects and the rows they rest on. Free of torch."""

from __future__ import annotations

from html import escape

from saegrid.analysis import findings as claims
from saegrid.analysis.findings import Finding
from saegrid.report.tables import Markdown, html_block, html_table, markdown

SIGNS = {claims.HOLDS: ("✓", "holds"), claims.FAILS: ("✗", "fails"), claims.NOT_TESTABLE: ("○", "open")}


def verdicts_text(own: list[Finding]) -> str:
    """How many findings hold, fail and can't be tested, in a sentence."""
    counts = {word: sum(finding.verdict == word for finding in own) for word in SIGNS}
    parts = []
    for word, count in counts.items():
        text = word.removesuffix("s") if count > 1 and word != claims.NOT_TESTABLE else word
        text = f"{'is' if count == 1 else 'are'} {word}" if word == claims.NOT_TESTABLE else text
        parts += [f"{count} {text}"] if count else []
    return f"On these rows, {', '.join(parts)}."


def findings_table(own: list[Finding], published: list[Finding], page: str | None = None) -> Markdown:
    """One row a finding: the claim, the verdict on our rows with the effect, the verdict on the published rows.

    `page` is the findings page as seen from this one, "" for this one itself; None: no links.
    """
    rows = []
    for ours, theirs in zip(own, published, strict=True):
        title = f"{ours.number}. {escape(ours.title)}"
        title = title if page is None else f'<a href="{page}#finding-{ours.number}">{title}</a>'
        rows.append(
            f'<tr><th scope="row" class="wrap">{title}<span class="claim">{escape(ours.claim)}</span></th>'
            f'<td class="text">{verdict(ours)}</td>'
            f'<td class="text">{escape(ours.effect_text)}<span class="claim">{escape(ours.effect_name)}</span></td>'
            f'<td class="text">{verdict(theirs)}{_their_effect(theirs)}</td></tr>'
        )
    heads = ["Published claim", "Verdict here", 'Effect, 95% interval <span class="unit">nats/token</span>']
    heads += ['On the published rows <span class="unit">nats/token</span>']
    caption = (
        "Verdicts on this grid's rows and on the published ones. Intervals by paired bootstrap over templates; the "
        "published rows allow none."
    )
    return html_block(
        f'<div class="table-scroll" role="region" tabindex="0" aria-label="The five findings">\n'
        f'<table class="table results" data-quarto-disable-processing="true">\n<caption>{caption}</caption>\n'
        + "<thead><tr>"
        + "".join(f'<th scope="col" class="text">{head}</th>' for head in heads)
        + "</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _their_effect(finding: Finding) -> str:
    """The effect on the published rows, which have no per-prompt losses and so no interval."""
    return "" if finding.effect is None else f'<span class="claim">{escape(finding.effect_text)}</span>'


def verdict(finding: Finding) -> str:
    """A verdict as HTML: sign, word and colour."""
    sign, mark = SIGNS[finding.verdict]
    return f'<span class="verdict verdict-{mark}"><span aria-hidden="true">{sign}</span> {finding.verdict}</span>'


def finding_section(own: Finding, published: Finding, links: str = "") -> Markdown:
    """One finding at length: claim, verdict, numbers, rule, the rows it rests on, and the published rows' verdict."""
    columns = ["name", "seed", "l0", "val_mse", "nmse", "dead_pct", "delta_loss", "frac_rec_pct"]
    parts = [
        f"> {own.claim}",
        f"**On this grid: {SIGNS[own.verdict][0]} {own.verdict}.** {own.sentence}",
        f"**On the published rows: {SIGNS[published.verdict][0]} {published.verdict}.** {published.sentence}",
        f"*Rule, fixed before the results.* {own.rule}",
    ]
    if own.effect is not None:
        interval = ", with its 95% interval" if own.interval else ""
        parts.insert(2, f"{own.effect_name}: **{own.effect_text}** nats/token{interval}.")
    for finding, source in ((own, "this grid"), (published, "the published table")):
        if len(finding.evidence):
            caption = f"Finding {own.number}: rows of {source}."
            parts.append(html_table(finding.evidence, columns, caption=caption, links=links if finding is own else ""))
    return markdown(*parts)
