"""The site before any run, and the checks of sources and of what was rendered."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from site_project import ROOT, copy_sources

from saegrid import site
from saegrid.site import SiteError


def text(root, page):
    return (root / "_site" / page).read_text(encoding="utf-8")


# --- before any run


def test_before_any_run_the_site_says_what_is_missing(tmp_path):
    copy_sources(tmp_path)
    site.render(tmp_path)
    for page in ("index.html", "method.html", "report/findings.html", "report/runs/index.html"):
        assert "Nothing to show yet" in text(tmp_path, page)
        assert "make report" in text(tmp_path, page)


def test_the_hook_runs_without_packages_and_leaves_what_is_there(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/findings.ipynb").write_text("made")
    command = [sys.executable, "-S", "-E", "lib/prerender.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "report/findings.ipynb").read_text() == "made"
    assert (tmp_path / "report/_home.md").stat().st_mtime < 10  # any workflow takes it for out of date


def test_placeholders_are_what_the_config_and_the_sources_name():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    named = {entry["href"] for entry in config["website"]["navbar"]["left"]}
    for source in ROOT.glob("*.qmd"):
        named |= set(re.findall(r"\{\{< include (\S+) >\}\}", source.read_text()))
    assert {name for name in named if not (ROOT / name).exists() or name.startswith("report/")} == set(
        site.PLACEHOLDERS
    )
    assert config["project"]["pre-render"] == "lib/prerender.py"


# --- the check itself


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://example.org/a.png">',
        '<img srcset="a.png 1x, https://example.org/b.png 2x">',
        "<style>@import url('https://fonts.example/css');</style>",
        '<div style="background: url(https://example.org/a.png)"></div>',
        "<script type='module'>import x from 'https://cdn.example/x.mjs'</script>",
        '<svg><image xlink:href="https://example.org/a.png"/></svg>',
    ],
)
def test_requests_to_other_hosts_are_found(tmp_path, html):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(f"<html><body>{html}</body></html>")
    assert any("from another host" in problem for problem in site.check(tmp_path)), html


def test_links_to_other_hosts_are_allowed_and_dead_links_are_found(tmp_path):
    (tmp_path / "index.html").write_text('<h2 id="a">x</h2><a href="https://example.org">x</a><a href="#a">y</a>')
    assert site.check(tmp_path) == []
    (tmp_path / "index.html").write_text('<div data-library="gone.js"></div><div data-chunks="gone/"></div>')
    assert len(site.check(tmp_path)) == 2
    (tmp_path / "index.html").write_text('<a href="gone.html">x</a><a href="#nowhere">y</a>')
    assert len(site.check(tmp_path)) == 2
    (tmp_path / "style.css").write_text('@import "https://fonts.example/css";')
    assert len(site.check(tmp_path)) == 3


def test_an_empty_site_and_a_failing_renderer_are_told(tmp_path):
    assert site.check(tmp_path) == ["no page was rendered"]
    with pytest.raises(SiteError, match="ended with code"):
        site.render(tmp_path)  # no _quarto.yml


# --- the sources


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("::: {.callout-note}\ntext\n", "line 1: a div that is never closed"),
        (":::: {.a}\n::: {.b}\n:::\n", "line 1: a div that is never closed"),
        ("text\n\n:::\n", "line 3: closes a div where none is open"),
        ("{{< include gone.md >}}\n", "line 1: includes gone.md, not there"),
        ("```python\nx = 1\n", "a code block that is never closed"),
        ("::: {.a}\n```\n:::\n```\n:::\n", None),
        ("````\n```\n::: {.a}\n````\n", None),
        ("{{< include there.md >}}\n", None),
    ],
)
def test_faults_of_a_source_are_found_and_stop_the_rendering(tmp_path, source, fault):
    copy_sources(tmp_path)
    (tmp_path / "there.md").write_text("text")
    (tmp_path / "index.qmd").write_text(f"---\ntitle: x\n---\n{source}")
    site.prepare(tmp_path)
    faults = site.check_sources(tmp_path)
    if fault is None:
        assert not faults
        return
    line = re.sub(r"line (\d+)", lambda found: f"line {int(found[1]) + 3}", fault)  # behind the front matter
    assert faults == [f"index.qmd: {line}"]
    with pytest.raises(SiteError, match=re.escape(line)):
        site.render(tmp_path)


def test_faults_in_a_notebook_are_found(tmp_path):
    (tmp_path / "report").mkdir()
    output = {"output_type": "display_data", "data": {"text/markdown": ["::: {.a}\n", "x"]}}
    cells = [{"cell_type": "markdown", "source": "fine"}, {"cell_type": "code", "source": "", "outputs": [output]}]
    (tmp_path / "report/page.ipynb").write_text(json.dumps({"cells": cells}))
    assert site.check_sources(tmp_path) == ["report/page.ipynb, cell 2: line 1: a div that is never closed"]


def test_the_sources_pass_the_linter(tmp_path):
    """Pages, and the Markdown of the notebooks' cells; includes are there once the placeholders are."""
    copy_sources(tmp_path)
    site.prepare(tmp_path)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        (tmp_path / f"{path.stem}.qmd").write_text("\n\n".join(texts) + "\n")
    panache = Path(sys.executable).with_name("panache")
    sources = sorted(str(path) for path in tmp_path.glob("*.qmd"))
    done = subprocess.run([panache, "lint", *sources], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
