"""The website, rendered from synthetic runs through the executed notebooks and opened in Chromium."""

import csv
import io
import json
import os
import re
import shutil
from datetime import date

import pandas as pd
import pytest
from site_project import HOSTILE, NOTEBOOKS, build, execute
from synthetic_runs import reseal

import saegrid
from saegrid.analysis import numbers, selection
from saegrid.analysis.numbers import number
from saegrid.errors import ResultsError
from saegrid.experiment import finished_run, results
from saegrid.experiment.mend import mend
from saegrid.report import assemble, site
from saegrid.report.figures import captions
from saegrid.report.pages import run_pages


@pytest.fixture(scope="module")
def built(fake_grid, _fake_runs, tmp_path_factory):
    """A project folder with everything that `make report` leaves: tables, executed notebooks, pages, `_site`."""
    root = tmp_path_factory.mktemp("site") / "project"
    shutil.copytree(_fake_runs, root)
    made = build(root, fake_grid)
    assert "pages to _site/index.html with" in made
    (root / "made").write_text(made)
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


def kinds_of_pages(root):
    """Every page but the run pages, which are made by one function: of them, three."""
    pages = html_pages(root)
    runs = [path for path in pages if path.parent.name == "runs" and path.name != "index.html"]
    return [path for path in pages if path not in runs] + runs[::8]


def text(root, page):
    return (root / "_site" / page).read_text(encoding="utf-8")


def leads_to(page, run_id):
    """Whether the text of a run's page links another run's; Quarto writes the whole way, smalldocs the file's name."""
    return re.search(rf'href="(\.\./\.\./report/runs/|\./)?{run_id}\.html"', page)


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
        assert leads_to(page, others[name])
    assert not leads_to(page, others["TopK_exp4x_k64"])  # differs along two axes
    assert "100%|" not in page
    assert "widget-view" not in page
    assert "<td>html</td>" in page
    assert re.search(r"<img[^>]* alt=\"Training of BatchTopK, K = 128, 8x, seed 0", page)


def test_every_notebook_is_written_in_lines(built):
    """Quarto loses the line ends of a cell that is one text."""
    written = sorted((built / "report").rglob("*.ipynb"))
    assert len(written) > len(NOTEBOOKS)
    for path in written:
        for cell in json.loads(path.read_text())["cells"]:
            assert isinstance(cell["source"], list), path
            assert not any("\n" in line[:-1] for line in cell["source"]), path


def test_pages_of_runs_that_are_no_longer_in_the_grid_go(built, fake_grid, tmp_path):
    df = results.read_tidy(built / fake_grid.results_dir)
    run_pages.write_run_pages(df, built / "runs", tmp_path)
    run_pages.write_run_pages(df.head(2), built / "runs", tmp_path)
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
    path.write_text(json.dumps(row | {"delta_loss": 0.0123, "kl": 0.0098}))
    reseal(path.parent)
    results.make(fake_grid, root)
    execute(root, fake_grid, "results")
    assemble.make(fake_grid, root)
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
    notebook = root / "runs" / run.run_id / "train.ipynb"
    notebook.unlink()
    with pytest.raises(ResultsError, match=f"{run.run_id}/train.ipynb: No such file.*mend"):
        assemble.make(fake_grid, root)
    notebook.with_name("train.ipynb.sha256").unlink()  # as after a run without the workflow
    assert any(f"{run.run_id}/train.ipynb: No such file" in line for line in mend(fake_grid, root))
    assert notebook.with_name("metrics.json.aside").exists()
    with pytest.raises(ResultsError, match=run.run_id):
        results.make(fake_grid, root)


def test_a_damaged_notebook_stops_the_report_and_is_made_again(built, fake_grid, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(built, root)
    run = fake_grid.runs()[0]
    notebook = root / "runs" / run.run_id / "train.ipynb"
    notebook.write_text(notebook.read_text().replace("0", "1", 1))
    with pytest.raises(ResultsError, match=f"{run.run_id}/train.ipynb: damaged .*mend"):
        assemble.make(fake_grid, root)
    assert any(f"{run.run_id}/train.ipynb: damaged" in line for line in mend(fake_grid, root))
    assert not notebook.with_name("metrics.json").exists() and notebook.with_name("metrics.json.aside").exists()
    assert not any(run.run_id in line for line in mend(fake_grid, root))


@pytest.mark.skipif(
    not shutil.which("quarto") and os.environ.get("REQUIRE_QUARTO") != "1", reason="Quarto is not on PATH"
)
def test_quarto_renders_the_same_pages(built):
    assert "with Quarto" in site.render(built)
    assert site.check(built / "_site") == []


# --- in the browser


@pytest.fixture
def open_page(built, browser):
    """A page of the site in a window; what it requests and what goes wrong on it is written down."""
    contexts = []

    def opened(path, scheme="light", width=1280, scripts=True):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, java_script_enabled=scripts
        )
        contexts.append(context)
        page = context.new_page()
        page.requests, page.problems = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto((built / "_site" / path).as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()


def settled(page, scheme):
    """Wait until the renderer has marked the theme, 50 ms after loading."""
    page.wait_for_function("dark => (document.querySelector('.quarto-dark') !== null) === dark", arg=scheme == "dark")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)])
def test_every_page_opens_offline_without_errors_and_fits(built, open_page, scheme, width):
    """All of them on a light phone, of the others each kind."""
    page = open_page("index.html", scheme, width)
    for path in html_pages(built) if (scheme, width) == ("light", 390) else kinds_of_pages(built):
        page.goto(path.as_uri())
        settled(page, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 384
        assert dark == (scheme == "dark"), path
    assert not [url for url in page.requests if not url.startswith(("file:", "data:"))]
    assert not page.problems


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_issue(built, open_page, scheme):
    from axe_playwright_python.sync_playwright import Axe

    found = []
    page = open_page("index.html", scheme)
    for path in kinds_of_pages(built):
        page.goto(path.as_uri())
        settled(page, scheme)
        if path.name == "frontier.html":
            page.wait_for_selector("figure.live")
        if path.name == "latents.html":
            page.wait_for_selector(".latent-shown article")
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:120] for node in violation["nodes"][:2]]
                found.append((path.name, violation["id"], nodes))
    assert not found


def test_a_run_page_is_laid_out_and_marks_its_entry_in_the_navigation(built, fake_grid, open_page):
    run = fake_grid.runs()[0]
    notebook = json.loads((built / "runs" / run.run_id / "train.ipynb").read_text())
    headings = re.findall(r"^## (.*)$", "\n".join("".join(cell["source"]) for cell in notebook["cells"]), flags=re.M)
    page = open_page(f"report/runs/{run.run_id}.html")
    assert [heading.strip() for heading in page.locator("main h2:visible").all_inner_texts()] == headings
    assert not re.search(r"^(title:|## |---)", page.inner_text("main"), flags=re.M)
    assert page.locator(".navbar .nav-link.active").all_inner_texts() == ["Runs"]
    assert open_page("report/findings.html").locator(".navbar .nav-link.active").all_inner_texts() == ["Findings"]


def test_links_of_static_figures_are_text_to_scripts(open_page):
    """Quarto's navigation calls `href.replace` of every link, and puts the result in its place."""
    page = open_page("index.html")
    links = page.evaluate(
        """() => [...document.querySelectorAll('a[href]')].map(link => {
            link.href = link.href.replace('x.html', 'x.html');
            return [typeof link.href, link.href];
        })"""
    )
    assert {kind for kind, _ in links} == {"string"} and not page.problems
    assert sum("/report/runs/" in target for _, target in links) > 20


def test_a_phone_shows_captions_whole_and_heads_above_their_rows(open_page):
    page = open_page("report/results.html", width=390)
    for caption in page.locator("table.results caption").all():
        box, around = caption.bounding_box(), caption.locator("xpath=../..").bounding_box()
        assert box["x"] >= around["x"] and box["x"] + box["width"] <= around["x"] + around["width"] + 1
        assert caption.evaluate("caption => getComputedStyle(caption).textAlign") in ("left", "start")
    page = open_page("report/latents.html", width=390)
    page.wait_for_selector(".latent-shown article")
    page.locator(".latents .table-scroll").evaluate(
        "list => { list.scrollTop = 100; list.scrollIntoView({ block: 'center' }); }"
    )
    on_top = page.locator(".latents thead th").first.evaluate(
        """head => {
            const box = head.getBoundingClientRect();
            return head.contains(document.elementFromPoint(box.left + 10, box.bottom - 10));
        }"""
    )
    assert on_top


def test_numbers_on_the_page_are_those_of_results_full(built, fake_grid, open_page):
    full = pd.read_csv(built / fake_grid.results_dir / "results_full.csv").set_index("run_id")
    page = open_page("report/results.html")
    seen = page.evaluate(
        """() => [...document.querySelectorAll('table.results tbody tr')].flatMap(row => {
            const link = row.querySelector('th a')?.getAttribute('href').split('/').pop();
            const cells = [...row.querySelectorAll('td[data-value]')];
            return link ? cells.map(cell => [link, cell.dataset.column, cell.dataset.value, cell.innerText,
                cell.closest('table').caption.innerText]) : [];
        })"""
    )
    checked, of_column = set(), {}
    for href, column, value, shown, table in seen:
        if column in finished_run.METRICS:
            expected = full.loc[href.removesuffix(".html"), column]
            assert float(value) == expected
            decimals = len(shown.strip("★ ").partition(".")[2])
            unsigned = shown.strip("★ ").replace(",", "").replace("−", "-")
            assert float(unsigned) == pytest.approx(expected, abs=0.5 * 10**-decimals + 1e-12)
            of_column.setdefault((table, column), set()).add(decimals)
            checked.add((href, column))
    assert len(checked) == len(full) * len(finished_run.METRICS)
    assert all(len(decimals) == 1 for decimals in of_column.values())


def test_a_point_of_the_frontier_shows_its_run_and_leads_there(built, fake_grid, open_page):
    df = results.read_tidy(built / fake_grid.results_dir)
    page = open_page("report/frontier.html")
    figure = page.locator("figure.live").first
    marks = figure.locator(".chart path[role=link]")
    labels = {f"{row['name']}: {captions.point(row, 'kl')}" for row in df.to_dict("records")}
    assert {mark.get_attribute("aria-label") for mark in marks.all()} == labels
    assert not figure.locator("> svg").is_visible()  # the static picture is there for print
    mark = marks.last
    row = df[df["name"] == mark.get_attribute("aria-label").split(":")[0]].iloc[0]
    mark.hover(force=True)
    tip = page.locator("#vg-tooltip-element")
    tip.wait_for(state="visible")
    assert row["name"] in tip.inner_text() and number(row["delta_loss"], "delta_loss") in tip.inner_text()
    mark.click(force=True)
    page.wait_for_url(f"**/runs/{row['run_id']}.html")
    page.go_back()
    mark = page.locator(".chart path[role=link]").last
    mark.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/runs/{row['run_id']}.html")
    assert page.locator("h1").inner_text() == run_pages.title(row)


def test_print_and_readers_without_scripts_get_the_static_frontier(open_page):
    page = open_page("report/frontier.html", scripts=False)
    assert page.locator("figure.plot > svg").first.is_visible()
    assert page.locator("figure.plot > svg a").first.get_attribute("href").startswith("runs/")
    page = open_page("report/frontier.html")
    page.wait_for_selector("figure.live")
    page.emulate_media(media="print")
    assert page.locator("figure.plot > svg").first.is_visible()
    assert not page.locator(".chart").first.is_visible()


def shown(page, column):
    return page.locator(
        f'table[data-tools="splice-losses"] tbody tr:visible [data-column="{column}"]'
    ).all_inner_texts()


def test_a_table_sorts_filters_and_downloads(built, fake_grid, open_page):
    df = results.read_tidy(built / fake_grid.results_dir)
    page = open_page("report/results.html")
    table = page.locator('table[data-tools="splice-losses"]')
    head = table.locator("th", has_text="Delta loss")
    head.locator("button").focus()
    for key, order in (("Enter", "ascending"), ("Space", "descending")):
        page.keyboard.press(key)
        assert head.get_attribute("aria-sort") == order
        column = df["delta_loss"].sort_values(ascending=order == "ascending")
        assert [text.strip("★ ") for text in shown(page, "delta_loss")] == [number(v, "delta_loss") for v in column]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    assert [text.strip("★ ") for text in shown(page, "delta_loss")] == [number(v, "delta_loss") for v in df.delta_loss]
    page.locator(".table-tools input").first.fill("topk_exp8x l0<100")
    kept = df[df["name"].str.contains("TopK_exp8x") & (df["l0"] < 100)]
    assert len(shown(page, "delta_loss")) == len(kept) > 0
    assert page.locator(".table-tools output").first.inner_text() == f"{len(kept)} of {len(df)} rows"
    with page.expect_download() as download:
        page.locator(".table-tools .csv").first.click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    assert download.value.suggested_filename == "splice-losses.csv"
    assert [row["Run"] for row in rows] == list(kept["name"])
    assert [float(row["Delta loss nats/token"]) for row in rows] == list(kept["delta_loss"])


def test_heads_say_what_they_mean_on_hover_and_focus(open_page):
    page = open_page("index.html")
    term = page.locator("th a.term", has_text="Delta").first
    assert term.get_attribute("href").endswith("method.html#measures")
    tip = page.get_by_role("tooltip")
    term.hover()
    assert tip.inner_text() == numbers.MEANINGS["delta_loss"]
    page.keyboard.press("Escape")
    assert not page.locator("#meaning").is_visible()
    page = open_page("report/results.html")
    page.locator("th button", has_text="frac_rec").first.focus()
    assert page.get_by_role("tooltip").inner_text() == numbers.MEANINGS["frac_rec_pct"]


def test_a_reference_shows_the_number_of_its_figure_and_reads_without_scripts(open_page):
    assert open_page("recipes.html").locator("a.ref").inner_text() == "Figure 1"
    assert open_page("recipes.html", scripts=False).locator("a.ref").inner_text() == "the figure"


def test_one_measure_of_the_frontier_is_shown_at_a_time(open_page):
    page = open_page("report/frontier.html")
    page.wait_for_selector(".chooser figure.live")
    figures = page.locator(".chooser > figure")
    assert figures.count() == 6 and page.locator(".chooser > figure:visible").count() == 1
    page.get_by_label("Measure").select_option("Loss recovered (mean)")
    page.wait_for_selector(".chooser figure.live:nth-of-type(3)")
    assert page.locator(".chooser > figure:visible").get_attribute("data-name") == "Loss recovered (mean)"
    assert page.locator("figcaption .number").all_inner_texts()[5:7] == ["Figure 1. ", "Figure 2. "]


def test_a_page_from_disk_is_searched_and_has_its_neighbours_and_its_footer(built, open_page):
    page = open_page("report/findings.html")
    page.locator(".smalldocs-search input, #quarto-search input").first.fill("residual stream")
    if "with Quarto" not in (built / "made").read_text():  # Quarto's own search needs a server
        page.wait_for_selector(".search-result")
        assert page.locator(".search-result").count() > 1
    near = page.locator("nav.page-navigation a")
    assert near.all_inner_texts() == ["← Home", "Frontier →"]
    made = page.locator("footer.made").inner_text()
    assert saegrid.__version__ in made and date.today().isoformat() in made and "MIT" in made
    assert page.locator("link[rel=icon]").get_attribute("href").endswith("favicon.svg")
    assert not page.problems


def test_runs_are_listed_with_their_curves(built, fake_grid, open_page):
    page = open_page("report/runs/index.html")
    lines = page.locator("td.curve polyline").evaluate_all("lines => lines.map(line => line.getAttribute('points'))")
    assert len(lines) == len(fake_grid.runs()) and all(len(line.split()) == 10 for line in lines)
    assert all(line.startswith("0.0,0.0 ") and line.endswith("100.0,24.0") for line in lines)  # they fall all the time


def test_a_latent_opens_from_its_piece_and_tokens_are_found(open_page):
    page = open_page("report/latents.html")
    page.wait_for_selector(".latent-shown article")
    assert len([url for url in page.requests if "chunk-" in url]) == 1  # the other pieces are not loaded yet
    page.locator(".latents input").fill("word7")
    rows = page.locator(".latents tbody tr:visible")
    assert [row.get_attribute("data-latent") for row in rows.all()] == ["107"]
    page.locator(".latents tbody tr:visible a").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.textContent === 'Latent 107'")
    assert page.url.endswith("#latent-107")
    card = page.locator(".latent-shown")
    assert card.locator("strong", has_text="word7").get_attribute("title") == number(10.0, "max_act")
    for text in HOSTILE:
        assert text in card.inner_text()
    card.locator("dl a").first.click()
    page.wait_for_function("document.activeElement.textContent === 'Latent 108'")
    page.go_back()
    page.wait_for_function("document.activeElement.textContent === 'Latent 107'")
    page.locator(".latents input").fill("")
    page.locator(".latent-shown nav a").last.click()
    page.wait_for_function("document.activeElement.textContent === 'Latent 108'")
    assert not page.problems and page.title() != "broken"
    page = open_page("report/latents.html")
    page.goto(f"{page.url}#latent-141")
    page.reload()
    page.wait_for_function("document.querySelector('.latent-shown h3')?.textContent === 'Latent 141'")


def test_pages_read_without_scripts(built, fake_grid, open_page):
    best = selection.recommend(results.read_tidy(built / fake_grid.results_dir))
    page = open_page("index.html", scripts=False)
    assert best["name"] in page.inner_text("main")
    assert page.locator("figure.plot svg").is_visible()
    assert not page.locator(".table-tools").count()
    page = open_page("report/latents.html", scripts=False)
    assert page.locator("tr[data-latent]").count() == 45
    assert page.locator("article.latent").count() == 6
    assert "word3" in page.inner_text("main")
