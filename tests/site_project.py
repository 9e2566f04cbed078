"""A project folder as `make report` leaves it, with synthetic runs, for the website tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from saegrid.analysis import selection
from saegrid.config import settings
from saegrid.experiment import results
from saegrid.report import assemble, site
from saegrid.report.pages import latents_page
from saegrid.storage.atomic import write_json

ROOT = Path(__file__).parents[1]
PAGES = site.pages(ROOT)
SOURCES = ["_quarto.yml", *(page for page in PAGES if "/" not in page and page != "index.qmd"), "notebooks", "lib"]
SOURCES += ["references.bib", "docs/home-light.webp", "benchmarks/_speed.md", "results/ablation"]
SOURCES += [f"results/_{name}.md" for name in ("published", "recipes", "references")]
NOTEBOOKS = [Path(page).stem for page in PAGES if page.endswith(".ipynb")]
HOSTILE = ["$x$", "{{< include gone.md >}}", "</script><script>document.title='broken'</script>", '"><b>', "&lt;"]
"""Token strings that must be rendered as text."""


def copy_sources(root):
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, root / name)


def execute(root, grid, *names):
    """Execute notebooks into `report/`, in one process with one kernel per notebook."""
    code = "import json, sys; sys.modules['rfc3987_syntax'] = None  # as workflow/run_papermill.py\n"
    code += "from saegrid.config.grid import Grid\nfrom saegrid.report import assemble\n"
    code += "assemble.execute(Grid(**json.loads(sys.argv[1])), sys.argv[2:])"
    env = os.environ | {"PYTHONPATH": str(ROOT / "lib"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, grid.model_dump_json(), *names]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def build(root, grid):
    """Make tables, latents, executed notebooks, pages and `_site` in a folder with runs."""
    copy_sources(root)
    results.make(grid, root)
    write_latents(root, grid)
    execute(root, grid)
    assemble.make(grid, root)
    return site.render(root)


def write_latents(root, grid):
    """Write described latents with numbers from formulas and some hostile tokens."""
    best = selection.recommend(results.read_tidy(root / grid.results_dir))
    words = [" the", " of", "\n", "7", *HOSTILE]
    latents = []
    for n in range(45):
        tokens = [words[(n + i) % len(words)] for i in range(12)] + [f" word{n}"]
        contexts = [{"tokens": tokens, "acts": [0.0] * 11 + [1.0, 3.0 + n], "peak": 12, "whole": False}]
        near = [[100 + (n + step) % 45, 0.5 - 0.1 * step, 4] for step in range(1, 5)] + [[7, -0.2, 0]]
        pairs = [[f" up{n}", 2.0], *([word, 1.0] for word in words)]
        latents.append(
            {"latent": 100 + n, "fired": n + 1, "fired_on_sinks": n % 2, "mean_act": 2.0, "max_act": 3.0 + n}
            | {"contexts": contexts, "promoted": pairs, "demoted": [[" down", -1.0]], "neighbours": near}
        )
    facts = {name: best[name] for name in ("run_id", "name", "arch", "model", "sinks")}
    facts |= {"label": settings.label(best)}
    facts |= {name: int(best[name]) for name in ("layer", "d_sae", "n_val_rows")}
    fired = [0] * (facts["d_sae"] - 60) + list(range(1, 61))
    data = facts | {"all_fired": fired, "n_alive": 60, "n_sink_rows": 2, "tokens_known": True, "latents": latents}
    latents_page.write_chunks(data, root / "report/latents")
    write_json(root / "report/latents/latents.json", data)
