"""The website: placeholders for missing pages, the renderer, and a check of its output.

Standard library only, so that `lib/prerender.py` runs under any Python 3 that the renderer finds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from saegrid import __version__
from saegrid.errors import SaegridError

HOME = (
    "Which sparse autoencoder?",
    "Sparse autoencoders on the residual stream of a real language model, one for each point of a grid, spliced back "
    "into it: which one to use, what it costs, and which findings of a published sweep hold.",
)
"""Title and description of the home page until there are runs."""
MISSING = """::: {.callout-important}
## Nothing to show yet

This part of the report comes from the runs of a grid, and there are none yet, or their tables are missing.
`make report` trains the quick grid, writes the tables and renders this site again.
:::
"""
FOOTER = "report/footer.html"
OLD = 1.0
"""Modification time of placeholders (1970), so that every workflow considers them out of date."""
_PAGE = re.compile(r"^ *- \{text: (.+), href: (.+)\}$", re.M)
_FETCHED = {
    **dict.fromkeys(
        ["script", "img", "iframe", "embed", "source", "track", "audio", "video", "input"], ("src", "srcset")
    ),
    **{"video": ("src", "poster"), "object": ("data",), "image": ("href", "xlink:href"), "use": ("href", "xlink:href")},
}
_FETCHED_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "modulepreload",
    "preconnect",
    "dns-prefetch",
    "manifest",
}
_CSS_REFERENCE = re.compile(r"""url\(\s*['"]?([^'")\s]+)|@import\s+['"]([^'"]+)""")
_SCRIPT_IMPORT = re.compile(r"""\b(?:import|from|fetch\(|importScripts\()\s*\(?['"]((?:https?:)?//[^'"]+)""")


class SiteError(SaegridError):
    """The site could not be rendered, or the rendered site breaks a rule of the report."""


def pages(root: str | Path = ".") -> dict[str, str]:
    """The pages of the site, {source: title}: the navigation in `_quarto.yml`, the one list of them."""
    return {page: title for title, page in _PAGE.findall((Path(root) / "_quarto.yml").read_text(encoding="utf-8"))}


def prepare(root: str | Path = ".") -> list[str]:
    """Write the pages' footer, and a placeholder for every missing page. Returns the placeholders.

    They are whole pages: Quarto expands includes before its pre-render step, so whatever a committed page includes must
    be committed too.
    """
    (Path(root) / "report").mkdir(exist_ok=True)
    (Path(root) / FOOTER).write_text(footer(root), encoding="utf-8")
    written = []
    for name, title in pages(root).items():
        path = Path(root) / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        front = front_matter(*HOME) if name == "index.qmd" else front_matter(title)
        page = (
            json.dumps(_notebook(("raw", front), ("markdown", MISSING))) if path.suffix == ".ipynb" else front + MISSING
        )
        path.write_text(page, encoding="utf-8")
        os.utime(path, (OLD, OLD))
        written.append(name)
    return written


def footer(root: str | Path) -> str:
    """What closes each page: version, commit, the day of rendering, licence."""
    made = [f"saegrid {__version__}"]
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"]
        made += [f"commit {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}"]
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        pass
    made += [f"rendered {date.today().isoformat()}", "MIT licence"]
    return f'<footer class="made">{" · ".join(made)}</footer>\n'


def front_matter(title: str, description: str = "") -> str:
    """The front matter of a page."""
    lines = {"title": title} | ({"description": description} if description else {})
    head = "".join(f"{name}: {json.dumps(text, ensure_ascii=False)}\n" for name, text in lines.items())
    return f"---\n{head}---\n\n"


def render(root: str | Path = ".") -> str:
    """Render the website: `quarto render` if Quarto is on PATH, else smalldocs. Returns a line that says which.

    Raises:
        SiteError: no renderer, the renderer failed, or `check_sources` or `check` found something.
    """
    root = Path(root)
    prepare(root)
    if faults := check_sources(root):
        raise SiteError(faults[0] + _more(faults))
    quarto = shutil.which("quarto")
    command = [quarto, "render"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render", ".", "--quiet"]
    name = "Quarto" if quarto else "smalldocs (Quarto is not on PATH)"
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SiteError(f"{name}: could not start: {error}") from None
    if done.returncode:
        last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        raise SiteError(f"{name} ended with code {done.returncode}: {' '.join(last)}")
    _write_search_script(root / "_site")
    problems = check(root / "_site")
    if problems:
        raise SiteError(f"_site: {problems[0]}{_more(problems)}")
    pages = len(list((root / "_site").rglob("*.html")))
    return f"rendered {pages} pages to _site/index.html with {name}"


def _write_search_script(folder: Path) -> None:
    """The search index as a script: browsers fetch no JSON from `file://` (the theme's links.html reads this)."""
    index = folder / "search.json"
    if index.exists():
        script = f"window.saegridSearch = {index.read_text(encoding='utf-8')};\n"
        index.with_suffix(".js").write_text(script, encoding="utf-8")


def check_sources(root: str | Path) -> list[str]:
    """Faults in the sources that one of the renderers would ignore: an unclosed or doubly closed div, an unclosed code
    block, a missing include, a cell that is not a list of lines."""
    root = Path(root)
    faults = []
    for path in sorted([*root.glob("*.qmd"), *root.glob("*/_*.md"), *(root / "report").rglob("*.qmd")]):
        faults += [f"{path.relative_to(root)}: {fault}" for fault in _faults(path.read_text(encoding="utf-8"), path)]
    for path in sorted((root / "report").rglob("*.ipynb")):
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"], 1):
            if not isinstance(cell["source"], list):  # Quarto would lose its line breaks
                faults.append(f"{path.relative_to(root)}, cell {n}: its source is not a list of lines")
            texts = ["".join(cell["source"])] if cell["cell_type"] == "markdown" else []
            outputs = (output.get("data", {}).get("text/markdown", "") for output in cell.get("outputs", []))
            texts += ["".join(text) for text in outputs]
            for text in texts:
                faults += [f"{path.relative_to(root)}, cell {n}: {fault}" for fault in _faults(text, path)]
    return faults


def _faults(text: str, path: Path) -> list[str]:
    """Faults in the Markdown of a page or cell at `path`."""
    faults, divs, fence = list[str](), list[int](), ""
    for n, line in enumerate(text.splitlines(), 1):
        code = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence:
            fence = "" if code and code[1].startswith(fence) and not line.strip(" `~") else fence
        elif code:
            fence = code[1]
        elif re.match(r" {0,3}:{3,}\s*$", line):
            faults += [] if divs else [f"line {n}: closes a div where none is open"]
            divs = divs[:-1]
        elif re.match(r" {0,3}:{3,}\s*[^:\s]", line):
            divs.append(n)
        elif include := re.match(r"\{\{< include (\S+) >\}\}", line):
            faults += [] if (path.parent / include[1]).is_file() else [f"line {n}: includes {include[1]}, not there"]
    faults += [f"line {n}: a div that is never closed" for n in divs]
    return faults + (["a code block that is never closed"] if fence else [])


def _more(problems: list[str]) -> str:
    return f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""


def check(site: str | Path) -> list[str]:
    """Faults in a rendered site: requests to other hosts, dead links and references."""
    site = Path(site).resolve()
    pages = {path: _read_page(path) for path in sorted(site.rglob("*.html"))}
    problems = [] if pages else ["no page was rendered"]
    for path, page in pages.items():
        where = path.relative_to(site)
        problems += [f"{where}: would fetch {url} from another host" for url in page.fetched if _is_external(url)]
        for url in [*page.links, *(url for url in page.fetched if not _is_external(url))]:
            problems += [f"{where}: {problem}" for problem in _broken(url, path, pages)]
    for path in sorted(site.rglob("*.css")):
        for url in _css_references(path.read_text(encoding="utf-8", errors="replace")):
            if _is_external(url):
                problems.append(f"{path.relative_to(site)}: would fetch {url} from another host")
    return problems


class _Page(HTMLParser):
    """What a page fetches when it is opened, its link targets, and its ids."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._inside = tag if tag in ("style", "script") else ""
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        for name in _FETCHED.get(tag, ()):
            parts = given.get(name, "").split(",") if name == "srcset" else [given.get(name, "")]
            self.fetched += [part.split()[0] for part in parts if part.strip() and not part.startswith("#")]
        self.fetched += [given["data-library"]] if "data-library" in given else []  # by the theme's charts.html
        self.fetched += [f"{given['data-chunks']}chunk-00.js"] if "data-chunks" in given else []  # and latents.html
        if tag == "link" and _FETCHED_LINKS & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))
        if tag in ("a", "area"):
            self.links += [given[name] for name in ("href", "xlink:href") if given.get(name)]
        self.fetched += _css_references(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.fetched += _css_references(data)
        elif self._inside == "script":
            self.fetched += _SCRIPT_IMPORT.findall(data)


def _read_page(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


def _css_references(css: str) -> list[str]:
    found = [first or second for first, second in _CSS_REFERENCE.findall(css)]
    return [url for url in found if not url.startswith(("data:", "#"))]


def _is_external(url: str) -> bool:
    parts = urlsplit(url.strip())
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss", "ftp")


def _broken(url: str, page: Path, pages: dict[Path, _Page]) -> list[str]:
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return []
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return [f"{url} leads nowhere"]
    fragment = unquote(parts.fragment)
    if fragment and fragment != "top" and target in pages and fragment not in pages[target].ids:
        return [f"{url} leads to no such place in the page"]
    return []


def _notebook(*cells: tuple[str, str]) -> dict:
    """A notebook of raw and Markdown cells, without outputs. A cell is a list of lines: Quarto reads only that."""
    entries = [
        {"id": f"cell-{n}", "cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        for n, (kind, source) in enumerate(cells)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": entries, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
