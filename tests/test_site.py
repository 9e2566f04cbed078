"""The website, rendered from synthetic runs through the executed notebooks and opened in Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import reseal

from saegrid import pages, results, site
from saegrid.results import ResultsError
from saegrid.site import SiteError
from saegrid.tables import number

ROOT = Path(__file__).parents[1]
SOURCES = ["_quarto.yml", "index.qmd", "method.qmd", "reproduce.qmd", "notebooks", "lib"]
NOTEBOOKS = ["findings", "results", "frontier"]


def copy_sources(root):
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, root / name)


def execute(root, grid, name):
    (root / "report").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "papermill", f"notebooks/{name}.ipynb", f"report/{name}.ipynb"]
    command += ["-r", "results_dir", grid.results_dir, "-r", "runs_dir", "runs", "--no-progress-bar"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def built(fake_grid, _fake_runs, tmp_path_factory):
    """A project folder with everything that `make report` leaves: tables, executed notebooks, pages, `_site`."""
    root = tmp_path_factory.mktemp("site") / "project"
    shutil.copytree(_fake_runs, root)
    copy_sources(root)
    results.make(fake_grid, root)
    for name in NOTEBOOKS:
        execute(root, fake_grid, name)
    pages.make(fake_grid, root)
    assert "pages to _site/index.html with" in site.render(root)
    return root


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium on PATH")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=chromium, args=options)
        yield instance
        instance.close()


def html_pages(root):
    return sorted((root / "_site").rglob("*.html"))


def text(root, page):
    return (root / "_site" / page).read_text(encoding="utf-8")


# --- what is rendered


def test_every_page_is_there_and_every_run_has_one(built, fake_grid):
    rendered = {str(path.relative_to(built / "_site")) for path in html_pages(built)}
    assert {"index.html", "method.html", "reproduce.html", "report/runs/index.html"} <= rendered
    assert {f"report/{name}.html" for name in NOTEBOOKS} <= rendered
    assert {f"report/runs/{run.run_id}.html" for run in fake_grid.runs()} <= rendered


def test_links_resolve_and_nothing_is_fetched_from_another_host(built):
    assert site.check(built / "_site") == []


def test_the_downloads_are_the_tables(built, fake_grid):
    for name in ("results.csv", "results_full.csv", "results_tidy.csv"):
        assert (built / "_site/report/data" / name).read_bytes() == (built / fake_grid.results_dir / name).read_bytes()


def test_home_is_light_and_names_the_recommendation(built):
    home = text(built, "index.html")
    assert len(home) < 1_500_000
    assert "Recommended:" in home
    assert home.count('class="verdict') == 10
    assert "<figure" in home
    assert "Nothing to show yet" not in home


def test_run_pages_link_their_neighbours_and_lose_bars_and_widgets(built, fake_grid):
    run = next(run for run in fake_grid.runs() if run.name == "BatchTopK_exp8x_k128")
    page = text(built, f"report/runs/{run.run_id}.html")
    others = {r.name: r.run_id for r in fake_grid.runs()}
    for name in ("TopK_exp8x_k128", "BatchTopK_exp4x_k128", "BatchTopK_exp8x_k64"):
        assert f'href="{others[name]}.html"' in page
    assert f'href="{others["TopK_exp4x_k64"]}.html"' not in page  # differs along two axes
    assert "100%|" not in page
    assert "widget-view" not in page
    assert "<td>html</td>" in page
    assert re.search(r"<img[^>]* alt=\"Training of BatchTopK, K = 128, 8x, seed 0", page)


def test_pages_of_runs_that_are_no_longer_in_the_grid_go(built, fake_grid, tmp_path):
    df = results.read_tidy(built / fake_grid.results_dir)
    pages.write_run_pages(df, built / "runs", tmp_path)
    pages.write_run_pages(df.head(2), built / "runs", tmp_path)
    assert len(list(tmp_path.glob("*.ipynb"))) == 2


def test_method_shows_the_arithmetic(built):
    page = text(built, "method.html")
    assert "[47.460, 47.584]" in page
    assert "[3.201, 3.215]" in page


# --- numbers: nothing is cached in prose


def test_a_changed_number_changes_the_pages(built, fake_grid, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(built, root)
    run = fake_grid.runs()[0]
    path = root / "runs" / run.run_id / "metrics.json"
    row = json.loads(path.read_text())
    old = number(row["delta_loss"], "delta_loss")
    path.write_text(json.dumps(row | {"delta_loss": 0.0123}))
    reseal(path.parent)
    results.make(fake_grid, root)
    execute(root, fake_grid, "results")
    pages.make(fake_grid, root)
    site.render(root)
    for page in ("report/results.html", "index.html", "report/runs/index.html"):
        cells = re.findall(rf"{run.run_id}\.html.*?</tr>", text(root, page), flags=re.S)
        rows = [cell for cell in cells if 'data-column="delta_loss"' in cell]
        assert rows
        assert all('data-value="0.0123"' in cell and old not in cell for cell in rows)
    assert f"{run.run_id}.html" in re.search(r"Recommended:.*?</p>", text(root, "index.html"), flags=re.S)[0]


def test_a_deleted_run_stops_the_report_with_one_line(built, fake_grid, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(built, root)
    run = fake_grid.runs()[0]
    (root / "runs" / run.run_id / "metrics.json").unlink()
    with pytest.raises(ResultsError, match=run.run_id):
        results.make(fake_grid, root)
    (root / "runs" / run.run_id / "train.ipynb").unlink()
    with pytest.raises(ResultsError, match=f"{run.run_id}/train.ipynb"):
        pages.make(fake_grid, root)


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
    for source in ("index.qmd", "method.qmd", "reproduce.qmd"):
        named |= set(re.findall(r"\{\{< include (\S+) >\}\}", (ROOT / source).read_text()))
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
    (tmp_path / "index.html").write_text('<a href="gone.html">x</a><a href="#nowhere">y</a>')
    assert len(site.check(tmp_path)) == 2
    (tmp_path / "style.css").write_text('@import "https://fonts.example/css";')
    assert len(site.check(tmp_path)) == 3


def test_an_empty_site_and_a_failing_renderer_are_told(tmp_path):
    assert site.check(tmp_path) == ["no page was rendered"]
    with pytest.raises(SiteError, match="ended with code"):
        site.render(tmp_path)  # no _quarto.yml


@pytest.mark.skipif(
    not shutil.which("quarto") and os.environ.get("REQUIRE_QUARTO") != "1", reason="Quarto is not on PATH"
)
def test_quarto_renders_the_same_pages(built):
    assert "with Quarto" in site.render(built)
    assert site.check(built / "_site") == []


# --- in the browser


def open_page(browser, path, scheme="light", width=1280):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.requests, page.problems = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_pages_open_offline_without_errors_and_fit(built, browser, scheme, width):
    runs = [path for path in html_pages(built) if path.parent.name == "runs"]
    for path in [path for path in html_pages(built) if path not in runs] + runs[:3]:
        page = open_page(browser, path, scheme, width)
        page.wait_for_timeout(200)  # smalldocs marks the theme 50 ms after loading
        assert not [url for url in page.requests if not url.startswith(("file:", "data:"))], path
        assert not page.problems, path
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 384
        assert dark == (scheme == "dark"), path
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_issue(built, browser, scheme):
    from axe_playwright_python.sync_playwright import Axe

    found = []
    names = ["index.html", "method.html", "reproduce.html", *(f"report/{name}.html" for name in NOTEBOOKS)]
    run = next(path for path in html_pages(built) if path.parent.name == "runs" and path.name != "index.html")
    for path in [*(built / "_site" / name for name in names), built / "_site/report/runs/index.html", run]:
        page = open_page(browser, path, scheme)
        page.wait_for_timeout(150)  # smalldocs marks the theme 50 ms after loading
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:120] for node in violation["nodes"][:2]]
                found.append((path.name, violation["id"], nodes))
        page.context.close()
    assert not found


def test_numbers_on_the_page_are_those_of_results_full(built, fake_grid, browser):
    full = pd.read_csv(built / fake_grid.results_dir / "results_full.csv").set_index("run_id")
    page = open_page(browser, built / "_site/report/results.html")
    seen = page.evaluate(
        """() => [...document.querySelectorAll('table.results tbody tr')].flatMap(row => {
            const link = row.querySelector('th a')?.getAttribute('href');
            const cells = [...row.querySelectorAll('td[data-value]')];
            return link ? cells.map(cell => [link, cell.dataset.column, cell.dataset.value, cell.innerText]) : [];
        })"""
    )
    page.context.close()
    checked = set()
    for href, column, value, shown in seen:
        if column in results.METRICS:
            expected = full.loc[href.removeprefix("runs/").removesuffix(".html"), column]
            assert float(value) == expected
            assert shown.strip("★ ") == number(expected, column)
            checked.add((href, column))
    assert len(checked) == len(full) * len(results.METRICS)


def test_a_mark_in_the_frontier_leads_to_its_run(built, browser):
    page = open_page(browser, built / "_site/report/frontier.html")
    mark = page.locator("figure.plot svg a").last  # drawn last, so on top
    assert "L0" in mark.get_attribute("aria-label")
    target = mark.get_attribute("href")
    mark.click(force=True)
    page.wait_for_url(f"**/{target}")
    assert page.locator("h1").inner_text()
    page.context.close()


def test_home_reads_without_scripts(built, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((built / "_site/index.html").as_uri())
    assert "Recommended" in page.inner_text("main")
    assert page.locator("figure.plot svg").is_visible()
    context.close()
