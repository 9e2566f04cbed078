"""The house keeps its plan: imports go one way, the small library stays small, folders stay readable."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LIB = Path("lib/saegrid")
CORE_LINES, MODULES = 1500, 9


def test_imports_go_one_way_and_torch_stays_where_it_belongs():
    """The contracts of `[tool.importlinter]` in pyproject.toml."""
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


def test_the_small_library_is_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (LIB / "core").glob("*.py"))
    assert 0 < lines <= CORE_LINES


@pytest.mark.parametrize("folder", sorted(path.parent for path in LIB.rglob("__init__.py")), ids=str)
def test_a_folder_is_seen_at_a_glance(folder):
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MODULES, modules


def test_every_module_has_a_place_for_its_tests():
    """`tests/` has the folders of the library, and `project/` for what spans them."""
    assert {path.parent.name for path in Path("tests").glob("*/test_*.py")} <= {
        *(path.name for path in LIB.iterdir() if path.is_dir()),
        "project",
    }


def test_files_that_are_named_exist():
    """Paths of modules and tests in workflows, docs and docstrings follow a move."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".md", ".yml", ".toml", ".lock", "Makefile", "Snakefile")) and name != "CHANGELOG.md":
            for path in re.findall(r"\b(?:tests|lib/saegrid|benchmarks)/[\w/]+\.py\b", Path(name).read_text("utf-8")):
                assert Path(path).exists(), f"{name}: {path}"
