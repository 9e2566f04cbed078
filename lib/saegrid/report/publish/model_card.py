"""The texts of a released repository: its model card, built from parts of the report, and its Space's front matter.

Free of torch. Every number comes from the tidy table, through the functions that make the home page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, header
from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.grid import L0_BUDGET
from saegrid.experiment import finished_run
from saegrid.report.figures import captions, plots
from saegrid.report.pages import home_page
from saegrid.report.pages.home_page import dataset, hub_model
from saegrid.report.tables import Markdown, markdown, pipe_table

PICTURE = "frontier.png"
SPLICED = (
    *("l0_eval", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl", "delta_loss", "frac_rec_pct"),
    *("loss_recovered_zero", "loss_recovered_mean"),
)
"""Metrics measured on the evaluation prompts; all others on the validation rows."""
CUTS = {
    "k": "None",
    "inference_threshold": 'cfg["inference_threshold"]',
    "threshold": 'cfg["threshold"]',
    "theta": 'state.pop("threshold")',
}
"""How to get a released file's threshold, per rule that decides which pre-activations are kept."""
PUBLISHED_CLASS = '''\
import json

import torch
from huggingface_hub import hf_hub_download
from torch import nn


class PublishedSAE(nn.Module):
    """pre = encoder(x - b_pre); z = the pre-activations that are kept, 0 elsewhere; x_hat = decoder(z) + b_pre."""

    def __init__(self, d_in, d_sae, k=0, threshold=None, batch=False):
        super().__init__()
        self.k, self.threshold, self.batch = k, threshold, batch
        self.b_pre = nn.Parameter(torch.zeros(d_in))
        self.encoder = nn.Linear(d_in, d_sae)
        self.decoder = nn.Linear(d_sae, d_in)

    def encode(self, x):
        """Latent activations (N, d_sae) of rows x (N, d_in)."""
        pre = self.encoder(x - self.b_pre)
        if self.threshold is not None:  # JumpReLU; BatchTopK by its calibrated threshold: each row for itself
            return pre * (pre > self.threshold)
        kept = pre.reshape(1, -1) if self.batch else pre  # without one, BatchTopK cuts over the whole batch
        top = kept.topk(int(len(pre) * self.k) if self.batch else self.k)
        return torch.zeros_like(kept).scatter(1, top.indices, top.values.relu()).reshape(pre.shape)

    def forward(self, x):
        return self.decoder(self.encode(x)) + self.b_pre
'''


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
    plain_runs, best = selection.without_controls(named), selection.recommend(df, budget)
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
            figure=f"![{captions.frontier_alt(plain_runs, y)}]({PICTURE})\n\n{COLUMNS[y].title} against L0, one mark "
            "per run; lower and further left is better.",
            loading=load_text(best, files[best["run_id"]], repo),
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


def load_text(best: pd.Series, file: str, repo: str = "") -> Markdown:
    """Code that loads the recommended SAE: with this library, without it, and with SAELens."""
    source = f"{repo}/{file}.pt" if repo else f"{file}.pt"
    x, own = home_page.rows_code(best), home_page.own_code(best, f'"{source}")')
    fetched = [f'hf_hub_download("{repo}", "{file}.{kind}")' if repo else f'"{file}.{kind}"' for kind in ("json", "pt")]
    used = PUBLISHED_CLASS if repo else PUBLISHED_CLASS.replace("from huggingface_hub import hf_hub_download\n", "")
    arch = ARCHITECTURES[best["arch"]]
    theta, batch = CUTS[arch.cut(not pd.isna(best["k"]))], ", batch=True" if arch.batch_cut else ""
    class_code = (
        f"{used}\n\nwith open({fetched[0]}) as sidecar:\n    cfg = json.load(sidecar)\n"
        f"state = torch.load({fetched[1]}, weights_only=True)\n"
        f'sae = PublishedSAE(cfg["d_in"], cfg["d_sae"], cfg["k"], {theta}{batch})\n'
        f"sae.load_state_dict(state)\n{x}\nx_hat = sae(x)"
    )
    folder = f'snapshot_download("{repo}", allow_patterns="saelens/{file}/*")' if repo else '"."'
    lens = "from huggingface_hub import snapshot_download\n" if repo else ""
    lens += f'from sae_lens import SAE\n\nfolder = {folder}\nsae = SAE.load_from_disk(f"{{folder}}/saelens/{file}")'
    return markdown(
        "With saegrid, the library of this work:",
        f"```python\n{own}\n```",
        "Without it, into the published class:",
        f"```python\n{class_code}\n```",
        "With SAELens:",
        f"```python\n{lens}\n```",
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
    with plt.rc_context(plots.STYLE):
        figure = plots.frontier(selection.without_controls(df), y=selection.cost(df)).figure
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
