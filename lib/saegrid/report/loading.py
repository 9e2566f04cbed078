"""Code that loads an SAE, as the home page and a released model card print it: `templates/load_*.py.jinja`."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saegrid.config.architectures import ARCHITECTURES, KEEPS
from saegrid.config.run_config import SITES
from saegrid.report.tables import TEMPLATES, Markdown, markdown

CODE = TEMPLATES.overlay(autoescape=False, trim_blocks=True)


def from_run(best: pd.Series) -> Markdown:
    """Code that runs the recommended SAE from its run's folder: with this library, and with torch alone."""
    folder = f"runs/{best['run_id']}"
    return markdown(
        "From the folder that the runs lie in:",
        _code("saegrid", best, source=f'"{folder}")  # {best["name"]}'),
        "With torch and safetensors alone:",
        _code("torch", best, folder=folder),
    )


def from_release(best: pd.Series, file: str, repo: str = "") -> Markdown:
    """Code that loads the recommended SAE from a model repository: with this library, without it, and with SAELens.

    `file` is its path there, without suffix; `repo` the Hub id, empty for a local copy.
    """
    source = f"{repo}/{file}.pt" if repo else f"{file}.pt"
    return markdown(
        "With saegrid, the library of this work:",
        _code("saegrid", best, source=f'"{source}")'),
        "Without it, into the published class:",
        _code("published", best, file=file, repo=repo),
        "With SAELens:",
        _code("saelens", best, file=file, repo=repo),
    )


def _code(how: str, best: pd.Series, **values: Any) -> str:
    """A code block from a template."""
    arch, has_k = ARCHITECTURES[best["arch"]], not pd.isna(best["k"])
    cut = arch.cut(has_k)
    known = {
        "cut": cut,
        "keeps": KEEPS[cut],
        "batch_cut": arch.batch_cut,
        "rows": SITES[best["site"]].format(best["layer"]),
    }
    code = CODE.get_template(f"load_{how}.py.jinja").render(**best.to_dict() | known | values)
    return f"```python\n{code}\n```"
