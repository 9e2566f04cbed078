"""Tables for the report: units in the header, missing values as a dash, best values not marked by colour alone.

Functions return Markdown that both renderers of the site read alike. HTML goes inside a raw Markdown block, never into
a notebook's `text/html` output, for which Quarto would load scripts from another host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from saegrid.analysis.numbers import COLUMNS, MISSING, Column, counted, number
from saegrid.analysis.selection import DENSE_SHARE_PCT, candidates

FILTER_HINT = "e.g. TopK 8x delta_loss&lt;1"
"""An example of a filter."""


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    def _repr_markdown_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<Markdown, {len(self)} characters>"


def html_table(
    df: pd.DataFrame,
    columns: Sequence[str],
    *,
    caption: str,
    links: str = "",
    mark_best: bool = True,
    tools: str = "",
) -> Markdown:
    """An accessible HTML table: one row per run; the first column is the row header.

    Args:
        df: tidy rows.
        columns: which columns, in order; empty columns are left out.
        caption: what the table shows.
        links: folder of the run pages relative to the page, such as `runs/`; empty: no links.
        mark_best: star the best value of each column with a direction, among the sparse runs
            (`selection.candidates`).
        tools: name of the CSV file; if given, readers with scripts can sort, filter and download the table.
    """
    columns = [name for name in columns if name in df and df[name].notna().any()]
    fit = candidates(df) if "l0" in df else df
    best = {name: _best(fit, name) for name in columns} if mark_best and len(df) > 1 else {}
    head = "".join(f'<th scope="col">{_head(name)}</th>' for name in columns)
    given = f' data-tools="{escape(tools)}" data-filter-hint="{FILTER_HINT}"' if tools and len(df) > 1 else ""
    body = []
    for row in df.to_dict("records"):
        cells = [_row_header(row, columns[0], links)]
        cells += [_cell(row[name], name, row[name] == best.get(name)) for name in columns[1:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    among = f", of runs that fire less than {DENSE_SHARE_PCT:g}% of their latents" if len(fit) < len(df) else ""
    starred = any(value is not None for value in best.values())
    note = f" ★ marks the best value of a column{among}." if starred else ""
    return html_block(
        f'<div class="table-scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n'
        f'<table class="table table-sm results" data-quarto-disable-processing="true"{given}>\n'
        f"<caption>{escape(caption)}{note}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody>\n</table>\n</div>"
    )


def beside(rows: pd.DataFrame, columns: Sequence[str], *, links: str = "") -> Markdown:
    """Own and published rows of the same settings (`selection.same_settings`), adjacent."""
    if rows.empty:
        return Markdown("This grid and the published table share no setting.\n")
    n = rows["name"].nunique()
    caption = f"{counted(n, 'setting')} of both sweeps: this grid's row, then the published one."
    return html_table(rows, columns, caption=caption, links=links, mark_best=False)


def run_metrics(row: Mapping[str, Any]) -> Markdown:
    """The numbers of one run, one per line, with units."""
    names = [name for name in COLUMNS if name in row and name not in ("name", "arch", "source", "recipe", "seed")]
    return pipe_table(
        ["Measure", "Value", "Unit"],
        [(COLUMNS[name].title, number(row[name], name), COLUMNS[name].unit or "1") for name in names],
    )


def run_files(folder: str | Path) -> Markdown:
    """The files of a run: name, size, first half of the SHA-256."""
    files = [path for path in sorted(Path(folder).iterdir()) if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if path.suffix != ".ipynb"]  # still being written
    rows = [(f"`{f.name}`", f"{f.stat().st_size:,}", f"`{sha256(f.read_bytes()).hexdigest()[:32]}`") for f in files]
    return pipe_table(["File", "Bytes", "SHA-256, first half"], rows)


def pipe_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Markdown:
    """A plain Markdown table of formatted text."""
    lines = ["| " + " | ".join(headers) + " |", "|" + " --- |" * len(headers)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return Markdown("\n".join(lines) + "\n")


def html_block(html: str) -> Markdown:
    """HTML as a raw block of Markdown, which both renderers leave unchanged."""
    return Markdown(f"```{{=html}}\n{html}\n```\n")


def markdown(*parts: str) -> Markdown:
    """Join blocks of Markdown."""
    return Markdown("\n\n".join(str(part).strip("\n") for part in parts) + "\n")


def _best(df: pd.DataFrame, name: str) -> Any:
    direction = COLUMNS.get(name, Column(name)).best
    return getattr(df[name], direction)() if direction else None


def _head(name: str) -> str:
    column = COLUMNS.get(name, Column(name))
    unit = f' <span class="unit">{escape(column.unit)}</span>' if column.unit not in ("", "1") else ""
    return escape(column.title) + unit


def _row_header(row: dict[str, Any], name: str, links: str) -> str:
    text = escape(number(row[name], name))
    if links and isinstance(row.get("run_id"), str):
        text = f'<a href="{escape(links)}{escape(row["run_id"])}.html">{text}</a>'
    return f'<th scope="row">{text}</th>'


def _cell(value: Any, name: str, is_best: bool) -> str:
    text = escape(number(value, name))
    if text == MISSING:
        return f'<td data-column="{name}" class="missing"><span aria-label="no value">{text}</span></td>'
    if isinstance(value, str):
        return f'<td data-column="{name}" class="text">{text}</td>'
    if is_best:
        text = f'<strong>{text}</strong><span class="star" role="img" aria-label="best">★</span>'
    return f'<td data-column="{name}" data-value="{value!r}">{text}</td>'
