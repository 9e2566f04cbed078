"""The bibliography: entries of references.bib as text, and citations that read in both renderers."""

import re
from pathlib import Path

from saegrid.report import bibliography


def test_entries_are_read_with_their_accents(tmp_path):
    path = tmp_path / "a.bib"
    fields = ["title         = {On {SAEs}},", "year          = {2024},", "eprint        = {2401.00001},"]
    fields += ["author        = {G{\\'o}mez, Zo{\\\"e} Ann and\n                   Gon{\\c{c}}alves, Jo},"]
    path.write_text("% a comment\n\n@misc{gomez2024x,\n  " + "\n  ".join(fields) + "\n}\n")
    (entry,) = bibliography.read(path)
    assert entry["title"] == "On SAEs" and entry["key"] == "gomez2024x"
    assert bibliography.names(entry["author"]) == "Gómez, Z. A., Gonçalves, J."


def test_every_entry_is_listed_and_every_citation_leads_to_one():
    text = bibliography.references("references.bib")
    entries = bibliography.read("references.bib")
    assert len(entries) == Path("references.bib").read_text().count("\n@misc{") == text.count("<li id=")
    assert not re.search(r"[{}\\]", text.removeprefix("```{=html}"))
    assert text == Path("results/_references.md").read_text()
    cited = re.findall(r"arXiv:(\S+)\]\(#ref-(\w+)\)", Path("method.qmd").read_text())
    papers = {entry["key"]: entry["eprint"] for entry in entries}
    assert len(cited) > 5 and all(papers[key] == paper for paper, key in cited)
