"""Commands and servers as users run them, and the processor time of commands."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = ["lib", "benchmarks", "docs", "notebooks", "params", "workflow", "_quarto.yml", "references.bib"]
SOURCES += [path.name for path in ROOT.glob("*.qmd")]
"""What the workflow reads."""


def checkout(folder, **grids):
    """The sources in a folder of their own, with further grids in `params/`."""
    folder.mkdir(exist_ok=True)
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, folder / name)
    for name, grid in grids.items():
        (folder / "params" / f"{name}.yaml").write_text(yaml.safe_dump(grid))
    return folder


def called(arguments, **options):
    """(process, seconds): processor time, because wall-clock time depends on the machine's load."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def papermill(notebook, output, *parameters, **options):
    """(process, seconds) of a notebook executed with parameters of the form `name=value`."""
    words = [word for parameter in parameters for word in ("-p", *parameter.split("=", 1))]
    files = [f"notebooks/{notebook}.ipynb", str(output)]
    return called([sys.executable, "-m", "papermill", *files, *words, "--no-progress-bar"], **options)


def in_another_process(environment, code):
    """Run code with other environment variables, which the Hub's client reads at import."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = forked.python(["-c", code], Path.cwd(), clean | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def peers_python() -> str:
    """The peers' Python; skips with a line that says how to make it."""
    python = os.environ.get("SAEGRID_PEERS_PYTHON") or str(ROOT / ".venv-peers/bin/python")
    if not Path(python).exists():
        pytest.skip(f"no {python}: `make peers` makes the environment with sae-lens, dictionary-learning and sparsify")
    return python
