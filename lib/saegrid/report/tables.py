"""Tables for the report: units in the header, missing values as a dash, best values not marked by colour alone.

Functions return Markdown that both renderers of the site read alike. HTML goes inside a raw Markdown block, never into
a notebook's `text/html` output, for which Quarto would load scripts from another host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from saegrid.analysis.numbers import COLUMNS, MEANINGS, MISSING, Column, aligned, counted, number
from saegrid.analysis.selection import DENSE_SHARE_PCT, by_origin, candidates, without_controls
from saegrid.config import settings
from saegrid.config.architectures import ARCHITECTURES

TEMPLATES = Environment(loader=PackageLoader("saegrid.report"), autoescape=True, undefined=StrictUndefined)

FORMATTED = re.compile(r"[+−]?\d[\d,.]*%?x?( to .*| \[.*| ≈)?")
"""A number, or a number with its interval, as text."""


class Markdown(str):
    """Text that a notebook shows as Markdown."""

    html = ""
    """What a raw block holds (`html_block`)."""

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
    curves: pd.DataFrame | None = None,
) -> Markdown:
    """An accessible HTML table: one row per run; the first column is the row header.

    Args:
        df: tidy rows.
        columns: which columns, in order; empty ones are left out.
        caption: what the table shows.
        links: folder of the run pages relative to the page, such as `runs/`; empty: no links.
        mark_best: star the best value of each column with a direction, among the sparse runs
            (`selection.candidates`).
        tools: name of the CSV file; if given, readers with scripts can sort, filter and download the table.
        curves: learning curves (`finished_run.load_curves`); if given, the last column draws each run's.
    """
    columns = [
        name for name in columns if name in df and any(not (pd.isna(value) or value == "") for value in df[name])
    ]
    best, note = best_values(df, columns) if mark_best else ({}, "")
    heads, body = [head(name) for name in columns], cells(df, columns[1:], best)
    if curves is not None:
        heads.append(
            (
                "Learning curve",
                "validation MSE",
                "Validation MSE after each epoch, logarithmic, each run on its own scale.",
            )
        )
        for row, drawn in zip(body, sparks(df, curves), strict=True):
            row.append(drawn)
    return from_template(
        "table.html",
        caption=caption,
        note=note,
        tools=tools if len(df) > 1 else "",
        groups=[],
        heads=heads,
        rows=list(zip(headers(df, columns[0], links), body, strict=True)),
    )


def head(name: str) -> tuple[str, str, str]:
    """Title, unit and meaning of a column."""
    return COLUMNS.get(name, Column(name)).title, _unit(name), MEANINGS.get(name, "")


def sparks(df: pd.DataFrame, curves: pd.DataFrame) -> list[dict[str, Any]]:
    """A cell per run with its small learning curve, logarithmic and on a scale of its own."""
    found = []
    for row in df.to_dict("records"):
        losses = curves.loc[curves["run_id"] == row["run_id"], "val_mse"].to_numpy()
        level = np.log(losses.clip(1e-12))
        down = 24 * (level.max() - level) / (np.ptp(level) or 1.0)
        right = np.linspace(0, 100, len(level))
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(right, down, strict=True))
        color = ARCHITECTURES[row["arch"]].color
        found.append({"column": "curve", "words": False, "points": points, "value": float(losses[-1]), "color": color})
    return found


def best_values(df: pd.DataFrame, columns: Sequence[str]) -> tuple[dict[str, set], str]:
    """The rows (by index) with the best value of each column that has a direction, and the caption's note on the stars.

    Best is among the sparse runs of one origin (`selection.by_origin`), controls left out.
    """
    best: dict[str, set] = {name: set() for name in columns}
    parts, dense, controls = by_origin(df), False, False
    for rows in parts.values():
        plain = without_controls(rows)
        fit = candidates(plain) if "l0" in rows else plain
        dense, controls = dense or len(fit) < len(plain), controls or len(plain) < len(rows)
        for name in columns:
            value = _best(fit, name) if len(rows) > 1 else None
            best[name] |= set() if value is None else set(fit.index[fit[name] == value])
    conditions = ["are not controls"] * controls + [f"fire less than {DENSE_SHARE_PCT:g}% of their latents"] * dense
    among = f", of runs that {' and '.join(conditions)}" if conditions else ""
    where = " for each source of rows" if len(parts) > 1 else ""
    starred = any(best.values())
    return best, f" ★ marks the best value of a column{where}{among}." if starred else ""


def headers(df: pd.DataFrame, name: str = "name", links: str = "") -> list[dict[str, str]]:
    """Row headers: a run by its setting, its name in small type, both leading to its page if there are links."""
    rows, found = df.to_dict("records"), []
    origins = settings.origins([row for row in rows if isinstance(row.get("model"), str)])  # published rows name none
    for row in rows:
        is_run = name == "name" and not pd.isna(row.get("arch")) and not pd.isna(row.get("expansion"))
        text, run_id = (
            (_named(row, origins.get(settings.origin(row), "")), row["name"])
            if is_run
            else (number(row[name], name), "")
        )
        href = f"{links}{row['run_id']}.html" if links and isinstance(row.get("run_id"), str) else ""
        found.append({"text": text, "id": run_id, "href": href})
    return found


def _named(row: Mapping[str, Any], origin: str) -> str:
    return f"{settings.label(row)}, {origin}" if origin else settings.label(row)


def cells(
    df: pd.DataFrame,
    columns: Sequence[str],
    best: Mapping[str, set] | None = None,
    theirs: Mapping[tuple[int, str], str] | None = None,
) -> list[list[dict[str, Any]]]:
    """The cells of each row, numbers of a column with the same decimals.

    `best` has the index of each column's best rows, `theirs` a value in small type for (row number, column).
    """
    best, theirs, texts = best or {}, theirs or {}, {name: aligned(df[name], name) for name in columns}
    return [
        [
            {
                "column": name,
                "text": texts[name][n],
                "value": "" if isinstance(row[name], str) else repr(row[name]),
                "missing": texts[name][n] == MISSING,
                "words": isinstance(row[name], str) and not FORMATTED.fullmatch(row[name] or "0"),
                "best": df.index[n] in best.get(name, ()),
                "theirs": theirs.get((n, name), ""),
            }
            for name in columns
        ]
        for n, row in enumerate(df.to_dict("records"))
    ]


def from_template(name: str, /, **values: Any) -> Markdown:
    """A template of `report/templates`, filled in, as a raw block. Blank lines would end HTML in a model card."""
    lines = TEMPLATES.get_template(name).render(**values).splitlines()
    return html_block("\n".join(line.strip() for line in lines if line.strip()))


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
        [(COLUMNS[name].title, number(row[name], name), _unit(name)) for name in names if not pd.isna(row[name])],
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
    block = Markdown(f"```{{=html}}\n{html}\n```\n")
    block.html = html
    return block


def folded(summary: str, content: str) -> Markdown:
    """Content that opens on a click on its summary."""
    return markdown(html_block(f"<details>\n<summary>{escape(summary)}</summary>"), content, html_block("</details>"))


def markdown(*parts: str) -> Markdown:
    """Join blocks of Markdown."""
    return Markdown("\n\n".join(str(part).strip("\n") for part in parts) + "\n")


def _best(df: pd.DataFrame, name: str) -> Any:
    direction = COLUMNS.get(name, Column(name)).best
    return getattr(df[name], direction)() if direction else None


def _unit(name: str) -> str:
    unit = COLUMNS.get(name, Column(name)).unit
    return "" if unit == "1" else unit
