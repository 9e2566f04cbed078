"""The latents page: cards of single latents, the table that links to them, and the chunks that the page loads.

Free of torch: the content comes from `report/latents/latents.json`, which `saegrid latents` computes. Cards in the page
and in chunks come from the same function, and every string of the tokenizer is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.numbers import aligned, counted, number
from saegrid.config.grid import Grid
from saegrid.errors import SaegridError
from saegrid.experiment import results
from saegrid.experiment.latents import describe
from saegrid.report.figures import plots
from saegrid.report.tables import Markdown, from_template, html_block, markdown
from saegrid.storage.atomic import write_json, write_text

CHUNK = 20
"""Latents per chunk."""
GALLERY = 6
"""Latents shown in the page itself."""
SHOWN_TOKENS = 4
UNKNOWN = "the rows come from published files, whose tokens are not known."


def load(folder: str | Path) -> dict[str, Any]:
    """The described latents. Raises `SaegridError` if they are missing or damaged."""
    path = Path(folder) / "latents.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaegridError(f"{path}: {error.strerror}; `python -m saegrid latents GRID` makes it") from None
    except ValueError as error:
        raise SaegridError(f"{path}: not JSON: {error}") from None


def write_chunks(data: Mapping[str, Any], folder: str | Path) -> None:
    """Write the chunks `chunk-00.js`, …: scripts with finished cards, which a page opened from disk can load too
    (browsers fetch no JSON from `file://`). Deletes chunks of an earlier sample."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("chunk-*.js"):
        old.unlink()
    known = {entry["latent"] for entry in data["latents"]}
    for n, start in enumerate(range(0, max(1, len(data["latents"])), CHUNK)):
        part = {entry["latent"]: card(entry, data, known) for entry in data["latents"][start : start + CHUNK]}
        write_text(folder / f"chunk-{n:02d}.js", f"saegridLatents({json.dumps(part, ensure_ascii=False)})\n")


def introduction(data: Mapping[str, Any], runs: str) -> Markdown:
    """Which run, how many latents, and how they were sampled; `runs` is the folder of run pages."""
    share = 100 * data["n_alive"] / data["d_sae"]
    return Markdown(
        f"[{data['label']}]({runs}{data['run_id']}.ipynb), the recommended run, has {data['d_sae']:,} latents. "
        f"{data['n_alive']:,} of them ({share:.0f}%) fire on at least one of {data['n_val_rows']:,} validation rows. "
        f"Here are **{len(data['latents'])}**, spread evenly over the range from the rarest to the most frequent.\n"
    )


def how(data: Mapping[str, Any]) -> Markdown:
    """How each number on the page is computed, and its limitations."""
    apart = data["sinks"] == "apart" and data["n_sink_rows"]
    contexts = "Where it fires most, one context per prompt and none twice with the same last five tokens."
    if not data["tokens_known"]:
        contexts = f"None: {UNKNOWN}"
    given = "- Latents 0 and 1 were not learnt: they have the attention sinks' direction, up and down.\n"
    return Markdown(
        "## How this is made\n\n"
        f"- **Fires on.** The share of all {data['n_val_rows']:,} validation rows on which the latent is above 0; "
        "training saw none of them.\n"
        f"- **Contexts.** {contexts} "
        f"{data['n_sink_rows']:,} attention-sink rows (norm above 10 times the median, most of them first tokens) are "
        "left out: their norm would fill every list.\n"
        "- **Promotes and demotes.** The latent's decoder direction goes through the final norm's scale and the "
        "language model's head, and what the head says to a zero vector is taken off: logits, centred over the "
        "vocabulary, as if the residual stream at the end were this direction alone. This is the direct path only: the "
        f"blocks after layer {data['layer']}, which read the direction too, are left out. Read the order, not the "
        "size.\n"
        "- **Nearest directions.** Cosine between decoder directions, over all latents of the dictionary. Those in "
        "this sample have a link.\n"
        "- **Found again.** With how many runs that differ in their seed alone it is stable: matched one to one by "
        "decoder directions, the cosines of both decoder and encoder rows with its match are above 0.7.\n"
        "- Latents were sampled by how often they fire, not by how well they read.\n" + (given if apart else "")
    )


def firing(data: Mapping[str, Any]) -> Markdown:
    """A histogram of how often the run's latents fire; empty for data without their counts."""
    if not data.get("all_fired"):
        return Markdown("")
    counts = pd.DataFrame({"fired": data["all_fired"], "run_id": data["run_id"], "arch": data["arch"]})
    alive = counts["fired"][counts["fired"] > 0]
    dead = data["d_sae"] - len(alive)
    text = (
        f"How often the latents fire: the median live latent on {_percent(100 * alive.median() / data['n_val_rows'])}% "
        f"of the validation rows. {dead:,} of {data['d_sae']:,} are dead and left out."
    )
    return plots.figure(plots.firing_histogram(counts, n_rows=data["n_val_rows"]), alt=text, caption=text)


def browser(data: Mapping[str, Any], chunks: str) -> Markdown:
    """The table of all sampled latents next to the card of the chosen one.

    `chunks` is the folder of the chunks relative to the page. Without scripts it is a plain table.
    """
    rows, largest = [], aligned([entry["max_act"] for entry in data["latents"]], "max_act")
    decimals = max(0, len(str(data["n_val_rows"])) - 3)  # enough for one row
    for n, entry in enumerate(data["latents"]):
        peaks = _unique(context["tokens"][context["peak"]] for context in entry["contexts"])
        promoted, demoted = ([token for token, _ in entry[name]] for name in ("promoted", "demoted"))
        share = 100 * entry["fired"] / data["n_val_rows"]
        rows.append(
            {"latent": entry["latent"], "chunk": f"{n // CHUNK:02d}", "share": repr(share)}
            | {"percent": f"{share:.{decimals}f}", "max_act": repr(entry["max_act"]), "largest": largest[n]}
            | {"search": " ".join(_unique([*peaks, *promoted, *demoted])), "found": entry.get("found_again")}
            | {"peaks": _tokens(peaks[:SHOWN_TOKENS]), "promoted": _tokens(promoted[:SHOWN_TOKENS])}
        )
    caption = f"{len(data['latents'])} latents of {data['label']}, from rare to frequent."
    seeds = data.get("other_seeds", 0)
    return from_template("latents.html", chunks=chunks, caption=caption, seeds=seeds, rows=rows)


def gallery(data: Mapping[str, Any]) -> Markdown:
    """Cards of a few latents, evenly spaced in the sample, in the page itself."""
    entries = data["latents"]
    steps = sorted({round((n + 0.5) * len(entries) / GALLERY) for n in range(GALLERY)}) if entries else []
    return markdown(*(html_block(card(entries[min(n, len(entries) - 1)], data)) for n in steps))


def card(entry: Mapping[str, Any], data: Mapping[str, Any], known: set[int] | None = None) -> str:
    """One latent as an HTML article.

    `known`, if given, are the latents that the page can show: neighbours among them get links.
    """
    facts = f"of {data['n_val_rows']:,} validation rows"
    if entry["fired_on_sinks"]:
        facts += f", {entry['fired_on_sinks']:,} of them attention sinks"
    if entry["max_act"] > 0:
        facts += f" · largest activation {number(entry['max_act'], 'max_act')}"
        facts += f", mean where it fires {number(entry['mean_act'], 'max_act')}"
    if data.get("other_seeds"):
        facts += f" · found again with {entry['found_again']} of {counted(data['other_seeds'], 'other seed')}"
        if entry["match_cosine"] is not None:
            facts += f" (cosine with its match {number(entry['match_cosine'], 'cosine')})"
    none = "" if entry["contexts"] else "It fires on attention sinks only, the first tokens of the prompts."
    shown = {
        "latent": entry["latent"],
        "share": _percent(100 * entry["fired"] / data["n_val_rows"]),
        "facts": facts,
        "none": none if data["tokens_known"] else UNKNOWN.capitalize(),
        "contexts": [_context(context, entry["max_act"]) for context in entry["contexts"]],
        "near": [
            {"latent": other, "cosine": number(cosine, "cosine"), "dead": not fired}
            | {"href": f"#latent-{other}" if known and other in known else ""}
            for other, cosine, fired in entry["neighbours"]
        ],
    }
    for name in ("promoted", "demoted"):
        effects = [f"{value:+.1f}".replace("-", "−") for _, value in entry[name]]
        shown[name] = list(zip(_tokens([token for token, _ in entry[name]]), effects, strict=True))
    return from_template("latent.html", c=shown).html


def _context(context: Mapping[str, Any], most: float) -> dict[str, Any]:
    """Consecutive tokens, shaded by the latent's activation where it fires, the largest one framed and numbered."""
    pieces = [
        {"text": _visible(token), "act": number(act, "max_act") if act > 0 else "", "peak": n == context["peak"]}
        | {"level": f"{act / most:.2f}" if act > 0 else ""}
        for n, (token, act) in enumerate(zip(context["tokens"], context["acts"], strict=True))
    ]
    return {"whole": context["whole"], "pieces": pieces, "act": pieces[context["peak"]]["act"]}


def _tokens(tokens: Sequence[str]) -> list[str]:
    """Single tokens: a leading space becomes a middle dot, to make it visible; a run of spaces is counted."""
    visible = (re.sub(" {3,}", lambda run: f"·×{len(run[0])}", _visible(token)) for token in tokens)
    return [(f"·{text[1:]}" if text.startswith(" ") else text) or "∅" for text in visible]


def _visible(token: str) -> str:
    return token.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")


def _percent(share: float) -> str:
    return f"{share:#.2g}" if share < 9.95 else f"{share:.0f}"


def _unique(tokens: Any) -> list[str]:
    return list(dict.fromkeys(tokens))


def make(grid: Grid, root: str | Path = ".") -> Path:
    """Describe the latents of a grid's recommended run; writes `report/latents/`. Returns that folder.

    Raises `SaegridError` if the tables, the run or its activation store are missing.
    """
    root = Path(root)
    best = selection.recommend(selection.first_origin(results.read_tidy(root / grid.results_dir)), grid.l0_budget)
    first = grid.runs()[0]
    runs = root / first.runs_dir
    seeds = [runs / run_id for run_id in grid.other_seeds(best["run_id"])]
    data = describe(runs / best["run_id"], root / first.store_dir, other_seeds=seeds)
    folder = root / "report" / "latents"
    write_chunks(data, folder)
    write_json(folder / "latents.json", data)
    return folder
