"""The site before any run, and the checks of sources and of what was rendered."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from site_project import ROOT, copy_sources

from saegrid.report import site
from saegrid.report.pages import run_pages
from saegrid.report.site import SiteError


def text(root, page):
    return (root / "_site" / page).read_text(encoding="utf-8")


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed or about to be, as another machine gets it."""
    root = tmp_path_factory.mktemp("clone")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    run("git", "init", "--quiet", cwd=root)
    run("git", "add", "--all", cwd=root)
    return root


# --- before any run


def test_a_pristine_clone_has_all_that_its_pages_include(clone):
    for source in clone.glob("*.qmd"):
        for included in re.findall(r"\{\{< include (\S+) >\}\}", source.read_text(encoding="utf-8")):
            assert (clone / included).is_file(), f"{source.name}: {included}"


def test_a_pristine_clone_renders_its_committed_tables_says_what_is_missing_and_stays_clean(clone):
    """By Quarto where it is on PATH; it appends lines to .gitignore unless these are in it."""
    assert {"/.quarto/", "**/*.quarto_ipynb"} <= set((clone / ".gitignore").read_text().splitlines())
    quarto = shutil.which("quarto")
    said = run(quarto, "render", cwd=clone) if quarto else site.render(clone)
    assert "WARN" not in said
    assert site.check(clone / "_site") == []
    assert run("git", "ls-files", "--others", "--exclude-standard", cwd=clone) == ""
    assert run("git", "diff", cwd=clone) == ""
    for page, least in (("recipes", 3), ("speed", 5), ("method", 4)):
        assert text(clone, f"{page}.html").count("<table") >= least
        assert not re.search("Nothing to show yet|Not measured yet", text(clone, f"{page}.html"))
    for page in ("index.html", "report/findings.html", "report/runs/index.html"):
        assert "Nothing to show yet" in text(clone, page) and "make report" in text(clone, page)


def test_the_committed_parts_are_what_their_tables_give(clone):
    """All but the drawing of the figures, whose last digits may differ between machines."""
    parts = ["results/_published.md", "results/_recipes.md", "benchmarks/_speed.md"]
    before = [(clone / part).read_text(encoding="utf-8") for part in parts]
    run_pages.write_committed_parts(clone)
    run(sys.executable, clone / "benchmarks/page.py", cwd=clone)
    for part, old in zip(parts, before, strict=True):
        new = (clone / part).read_text(encoding="utf-8")
        assert new.count("<svg") == old.count("<svg")
        drop = partial(re.sub, "<svg.*?</svg>", "", flags=re.S)
        assert drop(new) == drop(old), f"{part}: make report writes it anew"


def test_the_hook_runs_without_packages_and_leaves_what_is_there(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/findings.ipynb").write_text("made")
    command = [sys.executable, "-S", "-E", "lib/prerender.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "report/findings.ipynb").read_text() == "made"
    assert (tmp_path / "index.qmd").stat().st_mtime < 10  # any workflow takes it for out of date
    cells = json.loads((tmp_path / "report/results.ipynb").read_text())["cells"]
    assert all(line.endswith("\n") for cell in cells for line in cell["source"][:-1])


def test_placeholders_are_the_pages_of_the_navigation_that_are_not_committed(tmp_path):
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert site.pages(ROOT) == {entry["href"]: entry["text"] for entry in config["website"]["navbar"]["left"]}
    copy_sources(tmp_path)
    made = set(site.prepare(tmp_path))
    assert made == {page for page in site.pages(ROOT) if page == "index.qmd" or page.startswith("report/")}
    assert config["project"]["pre-render"] == "lib/prerender.py"


def test_a_configured_address_gives_a_sitemap_previews_and_links_to_sources(tmp_path):
    copy_sources(tmp_path)
    path = tmp_path / "_quarto.yml"
    text = re.sub(r"# (site|repo)-url: \S+", r"\1-url: https://example.org/\1", path.read_text())
    text = text.replace("# repo-actions", "repo-actions")
    path.write_text(text)
    assert text.count("https://example.org") == 2
    site.render(tmp_path)
    page = (tmp_path / "_site/method.html").read_text()
    assert "https://example.org/site/method.html" in (tmp_path / "_site/sitemap.xml").read_text()
    assert "https://example.org/repo/blob/main/method.qmd" in page
    assert re.search(r'property="og:image" content="https://example.org/site/docs/home-light.webp"', page)


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
    (tmp_path / "_quarto.yml").write_text("project: [")
    with pytest.raises(SiteError, match="ended with code"):
        site.render(tmp_path)


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
    line = re.sub(r"line (\d+)", lambda found: f"line {int(found[1]) + 3}", fault)  # after the front matter
    assert faults == [f"index.qmd: {line}"]
    with pytest.raises(SiteError, match=re.escape(line)):
        site.render(tmp_path)


def test_faults_in_a_notebook_are_found(tmp_path):
    (tmp_path / "report").mkdir()
    output = {"output_type": "display_data", "data": {"text/markdown": ["::: {.a}\n", "x"]}}
    cells = [{"cell_type": "markdown", "source": ["fine"]}, {"cell_type": "code", "source": [], "outputs": [output]}]
    cells += [{"cell_type": "markdown", "source": "Quarto would lose\nthis line's end"}]
    (tmp_path / "report/page.ipynb").write_text(json.dumps({"cells": cells}))
    assert site.check_sources(tmp_path) == [
        "report/page.ipynb, cell 2: line 1: a div that is never closed",
        "report/page.ipynb, cell 3: its source is not a list of lines",
    ]


def test_the_sources_pass_the_linter(tmp_path):
    """Pages, and the Markdown of the notebooks' cells. Brackets are intervals: no page has links by reference."""
    copy_sources(tmp_path)
    site.prepare(tmp_path)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        (tmp_path / f"{path.stem}.qmd").write_text("\n\n".join(texts) + "\n")
    panache = Path(sys.executable).with_name("panache")
    ignored = ["undefined-references", "undefined-anchor"]  # the check of the rendered site looks at anchors
    run(panache, "lint", *(f"--ignore={rule}" for rule in ignored), *sorted(tmp_path.glob("*.qmd")), cwd=tmp_path)


# --- colours


def luminance(colour):
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink, ground):
    """WCAG's ratio of two colours; small text needs 4.5."""
    low, high = sorted((luminance(ink), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("ink", "ground"),
    [
        ("body-color", "body-bg"),
        ("body-color", "code-block-bg"),
        ("body-color", "body-secondary-bg"),
        ("body-color", "body-tertiary-bg"),
        ("body-emphasis-color", "body-bg"),
        ("body-emphasis-color", "body-tertiary-bg"),
        ("code-color", "code-bg"),
        ("code-color", "body-bg"),
        ("input-color", "input-bg"),
        ("link-color", "body-bg"),
        ("link-color", "body-tertiary-bg"),
        ("navbar-fg", "navbar-bg"),
        ("table-color", "body-bg"),
        ("text-muted", "body-bg"),
        ("text-muted", "body-tertiary-bg"),
    ],
)
def test_dark_text_can_be_read(ink, ground):
    theme = (ROOT / "lib/saegrid/report/theme/dark.scss").read_text()
    colours = dict(re.findall(r"^\$([a-z-]+): (#\w+);", theme, flags=re.M))
    assert contrast("#fff", "#000") == pytest.approx(21)
    assert contrast(colours[ink], colours[ground]) >= 4.5


def test_both_dark_themes_have_the_same_colours():
    theme = ROOT / "lib/saegrid/report/theme"
    scss = dict(re.findall(r"^\$(?:body-)?([a-z-]+): (#\w+);", (theme / "dark.scss").read_text(), flags=re.M))
    css = dict(re.findall(r"--bs-(?:body-)?([a-z-]+): (#\w+);", (theme / "dark.css").read_text()))
    shared = ["bg", "color", "emphasis-color", "secondary-bg", "tertiary-bg"]
    shared += ["link-color", "code-color", "border-color"]
    assert {name: scss[name] for name in shared} == {name: css[name] for name in shared}
