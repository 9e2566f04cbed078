"""The texts of a released repository: its model card, built from parts of the report, and its Space's front matter.

Free of torch. Every number comes from the tidy table, through the functions that make the home page.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from saegrid.analysis import findings as claims
from saegrid.analysis import published_sweep, selection
from saegrid.analysis.numbers import COLUMNS, header
from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.run_config import EMBEDDED_DATASET, EMBEDDED_MODEL
from saegrid.experiment import finished_run
from saegrid.report.figures import captions, plots
from saegrid.report.pages import findings_page, home_page, trust_section
from saegrid.report.tables import Markdown, html_table, markdown, pipe_table
from saegrid.storage.hub_access import HUB_ID

BASE_MODELS = {EMBEDDED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of the embedded models, embedded in 4 bits. The embedded dataset is generated; no Hub has it."""
PICTURE = "frontier.png"
SWEEP = "jakelipner/sae-grid-search-layer12"
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
    """
    named = df.assign(name=df["run_id"].map(files))  # several runs may share a name
    best, y = selection.recommend(df), selection.cost(df)
    trust = "" if stable is None else trust_section.in_short(best, df, stable)
    named = selection.without_controls(named)
    own, published = claims.all_findings(df, prompts), claims.all_findings(published_sweep.rows())
    where = f"https://huggingface.co/spaces/{space}" if space else ""
    body = markdown(
        f"# {title}",
        f"{len(df)} sparse autoencoders, one for each point of a grid, trained on a language model's residual stream "
        "and spliced back into it." + (f" [The whole report]({where})." if where else ""),
        home_page.recommendation(named, prompts),
        *filter(None, [trust]),
        f"![{captions.frontier_alt(named, y)}]({PICTURE})",
        f"{COLUMNS[y].title} against L0, one mark a run; lower and further left is better.",
        "## The five published findings, tested again",
        f"They come from [{SWEEP}](https://huggingface.co/{SWEEP}), on Qwen2.5-0.5B-Instruct; the rows that its card "
        "prints are tested by the same functions.",
        findings_page.findings_table(own, published),
        "## Results",
        html_table(named, [*home_page.MAIN, "seed"], caption=f"All {len(named)} runs."),
        "All columns: `results_tidy.csv`; as the published sweep has them: `results.csv` and `results_full.csv`.",
        "## What was swept",
        home_page.setting_table(
            df.assign(model=df["model"].map(model_name), **{n: df[n].map(dataset) for n in ("dataset", "activations")})
        ),
        "## Architecture",
        "pre = encoder(x − b_pre); x_hat = decoder(z) + b_pre; decoder columns of unit norm. What z keeps of pre:",
        "\n".join(f"- **{name}**: {arch.kept}" for name, arch in ARCHITECTURES.items() if name in set(df["arch"])),
        "## Files",
        files_text(df, files),
        "## Load",
        load_text(best, files[best["run_id"]], repo),
        "## Limits",
        home_page.limits_text(df),
        "## Licence",
        "These SAEs are under the MIT licence. The language model and the dataset that they were trained on keep their "
        "own, which may restrict how an SAE is used.",
    )
    return f"---\n{front_matter(df, files, title)}\n---\n\n{plain(body)}"


def front_matter(df: pd.DataFrame, files: Mapping[str, str], title: str) -> str:
    """The card's YAML: base model, dataset, tags, and a `model-index` with the metrics of every run."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics = []
    for row in df.to_dict("records"):
        for name in finished_run.metrics_of(row):
            spliced = name in SPLICED
            source = "dataset" if spliced or not row["activations"] else "activations"
            task = "Next-token loss with the SAE spliced in" if spliced else "Reconstruction of the residual stream"
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


def hub_model(name: str) -> str | None:
    """The Hub id of a run's model; None for a local folder, whose path nobody else has."""
    local = os.path.exists(os.path.expanduser(name)) or not HUB_ID.fullmatch(name)
    return BASE_MODELS.get(name) or (None if local else name)


def model_name(name: str) -> str:
    """The name of a run's model in the card; for a local folder, its last path component."""
    return f"{BASE_MODELS[name]}, its weights in 4 bits" if name in BASE_MODELS else hub_model(name) or Path(name).name


def dataset(name: str) -> str:
    """The name of a run's dataset in the card: the Hub id, the generator, or the name of a local folder."""
    return name.partition(":")[2] if name == EMBEDDED_DATASET else Path(name).name if hub_model(name) is None else name


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
