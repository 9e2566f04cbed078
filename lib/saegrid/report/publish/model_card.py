"""The texts of a released repository: its model card, built from parts of the report, and its Space's front matter.

Free of torch. Every number comes from the tidy table, through the functions that make the home page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, header
from saegrid.config.grid import L0_BUDGET
from saegrid.experiment import finished_run
from saegrid.report import loading
from saegrid.report.figures import captions, plots
from saegrid.report.figures.style import STYLE
from saegrid.report.pages import home_page
from saegrid.report.pages.home_page import dataset, hub_model
from saegrid.report.tables import Markdown, markdown, pipe_table

PICTURE = "frontier.png"
SPLICED = (
    *("l0_eval", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl", "delta_loss", "frac_rec_pct"),
    *("loss_recovered_zero", "loss_recovered_mean"),
)
"""Metrics measured on the evaluation prompts; all others on the validation rows."""


def readme(
    df: pd.DataFrame,
    prompts: pd.DataFrame,
    files: Mapping[str, str],
    title: str,
    repo: str = "",
    space: str = "",
    stable: pd.DataFrame | None = None,
    budget: int = L0_BUDGET,
) -> str:
    """The model card: YAML front matter, then findings, tables, files, and code that runs as printed.

    Args:
        df: the tidy table.
        prompts: the runs' per-prompt sums.
        files: run id to its path in the repository, without suffix.
        title: the grid's title.
        repo: Hub id of the repository that the code loads from; empty: the code loads from its working directory.
        space: Hub id of the Space with the report.
        stable: stability of the grid's settings (`results.read_stability`).
        budget: most active latents per token of the recommended run.
    """
    named = df.assign(name=df["run_id"].map(files))  # several runs may share a name
    plain_runs = selection.without_controls(selection.first_origin(named))  # the figure and the code show one
    best = selection.recommend(selection.first_origin(df), budget)
    y = selection.cost(plain_runs)
    where = f"https://huggingface.co/spaces/{space}" if space else ""
    text = markdown(
        f"# {home_page.title(df)}",
        f"{len(df)} sparse autoencoders, one for each point of a grid ({title}), trained on a language model's "
        "activations and spliced back into it." + (f" [The whole report]({where})." if where else ""),
        home_page.body(
            named,
            prompts,
            budget=budget,
            figure=f"![{captions.frontier_alt(plain_runs, y)}]({PICTURE})\n\n{COLUMNS[y].title} against L0, one marker "
            "per run; lower and further left is better.",
            loading=loading.from_release(best, files[best["run_id"]], repo),
            files=files_text(df, files),
            stable=stable,
        ),
        "All columns: `results_tidy.csv`; as the published sweep has them: `results.csv` and `results_full.csv`.",
        "## Licence",
        "These SAEs are under the MIT licence. The language model and the dataset that they were trained on keep their "
        "own, which may restrict how an SAE is used.",
    )
    return f"---\n{front_matter(df, files, title)}\n---\n\n{plain(text)}"


def front_matter(df: pd.DataFrame, files: Mapping[str, str], title: str) -> str:
    """The card's YAML: base model, dataset, tags, and a `model-index` with the metrics of every run."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics = []
    for row in df.to_dict("records"):
        for name in finished_run.metrics_of(row):
            spliced = name in SPLICED
            source = "dataset" if spliced or not row["activations"] else "activations"
            task = "Next-token loss with the SAE spliced in" if spliced else "Reconstruction of activations"
            metrics.append(
                EvalResult(
                    task_type="text-generation" if spliced else "feature-extraction",
                    task_name=task,
                    dataset_type=dataset(row[source]),
                    dataset_name=dataset(row[source]),
                    dataset_revision=row[f"{source}_revision"] or None,
                    dataset_split="test" if spliced else "validation",
                    metric_type=name,
                    metric_name=f"{header(name)}, {files[row['run_id']]}",
                    metric_value=float(row[name]),
                    metric_args={"run_id": row["run_id"], "file": f"{files[row['run_id']]}.pt"},
                )
            )
    models = [hub_model(name) for name in df["model"].unique()]
    data = ModelCardData(
        base_model=[name for name in models if name] or None,
        datasets=sorted({dataset(name) for name in [*df["dataset"], *df["activations"]] if name}),
        license="mit",
        library_name="saegrid",
        tags=[
            "sparse-autoencoder",
            "mechanistic-interpretability",
            "saelens",
            *sorted(df["arch"].str.lower().unique()),
        ],
        model_name=title,
        eval_results=metrics,
    )
    return data.to_yaml()


def files_text(df: pd.DataFrame, files: Mapping[str, str]) -> Markdown:
    """The path of each run's SAE."""
    rows = []
    for run_id, name in df[["run_id", "name"]].itertuples(index=False):
        file = files[run_id]
        rows.append((name, f"[`{file}.pt`]({file}.pt)", f"`saelens/{file}`", f"`{run_id}`"))
    return markdown(
        "`{name}.pt` is a bare state dict for `load_state_dict`; `{name}.json` beside it says what the tensors do not: "
        "architecture, K, thresholds, and how it was trained. Of several runs with one published name, the grid's "
        "first lies at the top, and the others under `seed{seed}/` or their run id. `saelens/` has the same SAEs as "
        "SAELens folders, BatchTopK by its calibrated threshold; `site/` the report; `manifest.json` every file's size "
        "and SHA-256.",
        pipe_table(["SAE", "Published file", "SAELens folder", "Run"], rows),
    )


def space_readme(title: str, repo: str = "") -> str:
    """The README.md of the static Space that shows the report."""
    from huggingface_hub import SpaceCard, SpaceCardData

    data = SpaceCardData(title=title[:80], emoji="📈", sdk="static", app_file="index.html", pinned=False)
    if repo:
        data["models"] = [repo]
    return str(SpaceCard(f"---\n{data.to_yaml()}\n---\n\nThe report: `index.html`.\n"))


def plain(text: str) -> str:
    """The report's Markdown as plain Markdown: raw blocks as HTML, no fenced divs, each claim on its own line."""
    text = re.sub(r"^```\{=html\}\n(.*?)\n```$", r"\1", text, flags=re.S | re.M)
    text = re.sub(r"^:::.*\n", "", text, flags=re.M)
    return text.replace('<span class="claim">', '<br><span class="claim">')


def picture(df: pd.DataFrame) -> bytes:
    """The frontier as a PNG on white: Hub pages show no inline SVG."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        first = selection.without_controls(selection.first_origin(df))
        figure: Any = plots.frontier(first, y=selection.cost(first)).figure
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
