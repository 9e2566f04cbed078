"""The bibliography, from `references.bib`. Pages cite with plain links to its entries, which both renderers read."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from saegrid.report.tables import Markdown, from_template

ACCENTS = {"'": "\u0301", "`": "\u0300", '"': "\u0308", "^": "\u0302", "~": "\u0303", "c": "\u0327"}
"""LaTeX accents as combining characters."""


def read(path: str | Path) -> list[dict[str, str]]:
    """The entries of a BibTeX file whose fields are in braces, by author and year; `key` is an entry's name."""
    entries = []
    for key, body in re.findall(r"^@\w+\{(\S+),\n(.*?)^\}", Path(path).read_text(encoding="utf-8"), re.M | re.S):
        fields = re.findall(r"^  (\w+)\s*= \{(.*?)\},$", body, re.M | re.S)
        entries.append({"key": key} | {name: _text(value) for name, value in fields})
    return sorted(entries, key=lambda entry: (entry["author"], entry["year"]))


def references(path: str | Path) -> Markdown:
    """All entries as a list; each has the id `ref-key`."""
    entries = [entry | {"names": names(entry["author"])} for entry in read(path)]
    return from_template("references.html", entries=entries)


def names(author: str) -> str:
    """`Gao, Leo and Hu, Ann and …` as `Gao, L., Hu, A., …`."""
    people = [person.split(", ") for person in author.split(" and ")]
    return ", ".join(f"{last}, {' '.join(f'{first[0]}.' for first in given.split())}" for last, given in people)


def _text(latex: str) -> str:
    """LaTeX's accents and braces as text on one line."""
    accented = re.sub(r"\{?\\(['`\"^~c])\{?(\w)\}?\}?", lambda found: found[2] + ACCENTS[found[1]], latex)
    return unicodedata.normalize("NFC", re.sub(r"\s+", " ", re.sub(r"[{}]", "", accented)))
