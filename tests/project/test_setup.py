"""The lock files, environment.yml and pyproject.toml name the same versions."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
PINNED = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]


def locked():
    lines = "".join(Path(name).read_text() for name in ("requirements.lock", "requirements-no-deps.lock")).splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def test_every_dependency_is_pinned_and_locked():
    for requirement in PINNED:
        assert re.fullmatch(r"==[0-9.]+", str(requirement.specifier)), requirement
        assert locked()[canonicalize_name(requirement.name)] == str(requirement.specifier)


def test_the_lock_has_no_local_version_and_no_hash():
    for name in ("requirements.lock", "requirements-no-deps.lock"):
        text = "\n".join(line for line in Path(name).read_text().splitlines() if not line.startswith("#"))
        assert "+" not in text and "--hash" not in text and "@" not in text


def test_the_conda_environment_is_the_same():
    dependencies = yaml.safe_load(Path("environment.yml").read_text())["dependencies"]
    pip = next(part["pip"] for part in dependencies if isinstance(part, dict))
    conda = {canonicalize_name(r.name): r.specifier for r in map(Requirement, pip)}
    assert conda == {canonicalize_name(r.name): r.specifier for r in PINNED}
    assert "quarto" in dependencies


def test_optional_parts_are_not_in_the_core():
    core = {canonicalize_name(requirement.name) for requirement in PINNED} | set(locked())
    assert not core & {"quarto-cli"}


def test_what_the_report_and_the_workflow_import_is_free_of_torch():
    modules = ["config.grid", "experiment.results", "analysis.findings", "report.figures.plots", "report.tables"]
    modules += ["report.pages.home_page", "report.site", "data.language_model", "report.publish.upload"]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'saegrid.{name}')\n"
    code += "    assert 'torch' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_code_and_notebooks_are_clean():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    notebooks = sorted(map(str, Path("notebooks").glob("*.ipynb")))
    done = subprocess.run(
        [sys.executable, "-m", "nbstripout", "--verify", *notebooks], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
