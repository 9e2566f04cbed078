"""The page about the library has every public function and class of `formats` and `core/`, and is rendered."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from site_project import copy_sources

from saegrid.report import library_page, site

MODULES = ["formats", *(f"core.{path.stem}" for path in Path("lib/saegrid/core").glob("[a-z]*.py"))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_is_there_with_its_docstring(name):
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", library_page.page("Library"), re.M | re.S))
    module = importlib.import_module(f"saegrid.{name}")
    own = [
        one
        for one in vars(module).values()
        if getattr(one, "__module__", "") == module.__name__ and hasattr(one, "__name__")
    ]
    public = [one for one in own if not one.__name__.startswith("_") and callable(one)]
    assert public
    for one in public:
        entry = sections[name].partition(f"\n### {one.__name__}\n")[2].partition("\n### ")[0]
        assert inspect.getdoc(one).split("\n")[0][:20] in entry.replace("\\", ""), one
        if inspect.isfunction(one):
            assert all(name in entry for name in [f"{one.__name__}(", *inspect.signature(one).parameters])


def test_it_is_rendered_as_text_and_code(tmp_path):
    copy_sources(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/library.qmd").write_text(library_page.page("Library"), encoding="utf-8")
    site.render(tmp_path)
    html = (tmp_path / "_site/report/library.html").read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>", "", html[html.index("<main") : html.index("</main")])
    assert "z = pre where pre &gt; theta, 0 elsewhere" in words and "**" not in words and "\\" not in words
    assert len(re.findall(r"<h3\b", html)) > 40 and re.search(r"<li>\s*(<p>)?d_in: width of the activations", html)
