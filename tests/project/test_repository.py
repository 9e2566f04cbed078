"""What a repository tells beside its code: one version everywhere, and every paper that it names."""

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

import saegrid

CHANGES = re.findall(r"^## \[(.+)\] - (\S+)$", Path("CHANGELOG.md").read_text(), re.M)
PAPER = re.compile(r"arxiv(?::|\.org/(?:abs|pdf)/)(\d{4}\.\d{4,5})", re.I)


def test_the_version_and_its_date_are_the_same_everywhere():
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    citation = yaml.safe_load(Path("CITATION.cff").read_text())
    assert project["version"] == saegrid.__version__ == citation["version"]
    assert CHANGES[0] == (citation["version"], citation["date-released"])
    assert project["license"] == citation["license"] == "MIT"


def test_the_references_are_the_papers_that_pages_docstrings_and_readme_name():
    names = ["git", "ls-files", "*.py", "*.qmd", "*.ipynb", "README.md"]
    files = subprocess.run(names, capture_output=True, text=True, check=True).stdout.splitlines()
    named = {paper for file in files for paper in PAPER.findall(Path(file).read_text(encoding="utf-8"))}
    text = Path("references.bib").read_text(encoding="utf-8")
    listed = re.findall(r"^  eprint        = \{(.+)\},$", text, re.M)
    assert sorted(named) == sorted(listed) == sorted(PAPER.findall(text))
    assert len(set(re.findall(r"^@misc\{(\w+),$", text, re.M))) == len(listed)
