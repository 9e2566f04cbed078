"""The text of the home page, in the form of a model card, and the generated parts of other pages.

Every number is formatted from the tables. The functions return self-contained Markdown, so that the same body can go
to a model repository.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

import pandas as pd

from saegrid.analysis import findings as claims
from saegrid.analysis import intervals, published_sweep, selection
from saegrid.analysis.numbers import COLUMNS, MISSING, between, bounds, counted, listed, number, plural
from saegrid.analysis.scaling import MEASURES
from saegrid.config import settings
from saegrid.config.grid import L0_BUDGET
from saegrid.config.run_config import EMBEDDED_MODEL
from saegrid.report import card, layers, loading
from saegrid.report.figures import captions, plots
from saegrid.report.pages import findings_page, trust_section
from saegrid.report.pages.ablation_section import recipe_section
from saegrid.report.tables import Markdown, folded, from_template, html_table, markdown, pipe_table
from saegrid.storage.hub_access import HUB_ID

BASE_MODELS = {EMBEDDED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub ids of the embedded models, embedded in 4 bits. The embedded dataset is generated; no Hub has it."""
SWEEP = "jakelipner/sae-grid-search-layer12"


def title(df: pd.DataFrame) -> str:
    """Model and layer: `Sparse autoencoders on SmolLM2-135M-Instruct, layer 12`."""
    models = dict.fromkeys(Path(BASE_MODELS.get(name, name)).name for name in df["model"])
    return escape(f"Sparse autoencoders on {listed(models)}, {_layers(df)}", quote=False)


def model_card(
    df: pd.DataFrame,
    prompts: pd.DataFrame | None = None,
    *,
    budget: int = L0_BUDGET,
    links: str = "",
    baseline: pd.DataFrame | None = None,
    stable: pd.DataFrame | None = None,
) -> Markdown:
    """The home page's body: `body` with the interactive site's links, its figure and its run folders.

    Args:
        df: the tidy table.
        prompts: the runs' per-prompt sums, for the intervals.
        budget: most active latents per token of the recommended run.
        links: the report's folder relative to the page, such as `report/`; empty: a card without links.
        baseline: losses of PCA (`saegrid.experiment.pca_table`).
        stable: stability of the grid's settings (`results.read_stability`).
    """
    best = selection.recommend(selection.first_origin(df), budget)
    figure = "" if len(selection.by_origin(df)) > 1 else frontier(df, links, baseline)
    return body(
        df, prompts, budget=budget, links=links, figure=figure, loading=loading.from_run(best), files=files_text(best),
        stable=stable, baseline=baseline,
    )  # fmt: skip


def frontier(df: pd.DataFrame, links: str, baseline: pd.DataFrame | None = None) -> Markdown:
    """The static frontier of the measure that ranks; `links` as in `model_card`."""
    plain = selection.without_controls(df)
    y = selection.cost(plain)
    ax = plots.frontier(plain, y=y, links=f"{links}runs/" if links else "", baseline=baseline)
    caption = captions.frontier_caption(plain, y, baseline=baseline)
    more = f" [Interactive, and against other measures]({links}frontier.ipynb)." if links else ""
    return markdown(
        plots.figure(ax, alt=captions.frontier_alt(plain, y), caption=caption),
        f"The line joins the runs that no other beats in both L0 and {COLUMNS[y].title}.{more}",
    )


def body(
    df: pd.DataFrame,
    prompts: pd.DataFrame | None,
    *,
    budget: int,
    figure: str,
    loading: str,
    files: str,
    links: str = "",
    baseline: pd.DataFrame | None = None,
    stable: pd.DataFrame | None = None,
) -> Markdown:
    """A model card in the published card's order: findings, recommendation, results, class, loading, files, training.

    `figure`, `loading` and `files` differ between the site and a model repository; the rest is as in `model_card`. For
    a grid of several origins, `layers.overview` takes the place of findings, recommendation and results: each has its
    own page (`origin_page`).
    """
    if len(selection.by_origin(df)) > 1:
        runs, pages = (f"{links}{folder}/" if links else "" for folder in ("runs", "layers"))
        more = f"[How each measure moves]({links}layers.qmd), and which layer is hardest." if links else ""
        answers = [layers.overview(selection.without_controls(df), prompts, budget, pages, runs), more]
    else:
        answers = _answers(df, prompts, budget, figure, links, baseline, stable)
    df = selection.without_controls(df)
    return markdown(
        swept_text(df),
        *filter(None, answers),
        "## SAE Architecture",
        card.architecture_text(df),
        "## Loading SAEs",
        loading,
        "## File naming",
        card.naming_text(),
        files,
        "## Training details",
        setting_table(
            df.assign(model=df["model"].map(model_name), **{n: df[n].map(dataset) for n in ("dataset", "activations")})
        ),
        "## Limitations",
        limits_text(df),
    )


def origin_page(
    df: pd.DataFrame,
    prompts: pd.DataFrame | None,
    budget: int,
    links: str,
    baseline: pd.DataFrame | None = None,
    stable: pd.DataFrame | None = None,
) -> Markdown:
    """One origin of several by itself: findings, recommendation, budgets, frontier and results as on a home page."""
    figure = frontier(df, links, baseline)
    return markdown(swept_text(df), *filter(None, _answers(df, prompts, budget, figure, links, baseline, stable)))


def _answers(
    df: pd.DataFrame,
    prompts: pd.DataFrame | None,
    budget: int,
    figure: str,
    links: str,
    baseline: pd.DataFrame | None,
    stable: pd.DataFrame | None,
) -> list[str]:
    """Findings, recommendation, budgets and results of one origin's runs."""
    best = selection.recommend(df, budget)
    trust = "" if stable is None else trust_section.in_short(best, df, stable, baseline)
    df = selection.without_controls(df)
    runs = f"{links}runs/" if links else ""
    own, published = claims.all_findings(df, prompts), claims.all_findings(published_sweep.rows())
    more = f" [Evidence, rule and rows of each]({links}findings.ipynb)." if links else ""
    all_columns = f" [Every measure of every run]({links}results.ipynb)." if links else ""
    return [
        "## Key Findings",
        f"The five findings of [the published sweep](https://huggingface.co/{SWEEP}) on Qwen2.5-0.5B-Instruct, tested "
        f"on these runs. {findings_page.verdicts_text(own)} {findings_page.steps_text(own)}{more}",
        findings_page.key_findings(own, published, f"{links}findings.html" if links else None),
        "## Recommendation",
        recommendation(df, prompts, budget, runs),
        key_numbers(best),
        trust,
        "### By budget",
        "Latents are read one by one: fewer per token are easier to read, more leave the model as it is.",
        card.budget_cards(df, prompts, budget, runs),
        trust_section.which_k(df),
        figure,
        "## Results",
        f"As the published card has them, then KL, loss recovered and FVU.{all_columns}",
        card.result_tables(df, runs),
        recipe_section(df, prompts) if _seeds(df).median() > 1 else "",
    ]


def swept_text(df: pd.DataFrame) -> str:
    """The grid in a sentence."""
    by_k = _values(df, "k")
    theta = _values(df, "threshold")
    theta += " RMS" if theta != MISSING and set(df["threshold_unit"][df["threshold"].notna()]) == {"rms"} else ""
    sparsity = " and ".join(
        [*([f"K of {by_k}"] if by_k != MISSING else []), *([f"θ of {theta}"] if theta != MISSING else [])]
    )
    layer = _layers(df)
    texts = list(selection.by_origin(df, "layer"))
    layer += f" on {escape(' and '.join(texts), quote=False)}" if len(texts) > 1 else ""
    return (
        f"{counted(len(df), 'run')}, {listed(df['arch'].unique())} at {_values(df, 'expansion', '{}x')} with "
        f"{sparsity}, each trained on {_values(df, 'n_train_rows')} tokens of {layer} and judged on "
        f"{_values(df, 'n_eval_prompts')} held-out prompts."
    )


def key_numbers(best: pd.Series) -> Markdown:
    """The recommended run's numbers, in large type."""
    changed = [] if pd.isna(best["kl"]) else [(number(best["kl"], "kl"), "nats/token", "KL when spliced in")]
    cells = [
        *changed,
        (f"{number(best['delta_loss'], 'delta_loss')}", "nats/token", "loss added when spliced in"),
        (f"{number(best['l0'], 'l0')}", f"of {number(best['d_sae'], 'd_sae')}", "latents fire on a token"),
        (
            f"{number(100 * best['loss_recovered_mean'], 'frac_rec_pct')}",
            "%",
            "of the loss recovered, against the mean",
        ),
        (f"{number(best['dead_pct'], 'dead_pct')}", "%", "of the latents are dead"),
    ]
    return from_template("key_numbers.html", numbers=cells)


def recommendation(
    df: pd.DataFrame, prompts: pd.DataFrame | None = None, budget: int = L0_BUDGET, runs: str = ""
) -> Markdown:
    """The recommended run and its numbers as one paragraph."""
    best, measure = selection.recommend(df, budget), selection.cost(df)
    label = settings.label(best)
    name = f"[{label}]({runs}{best['run_id']}.ipynb)" if runs else label
    if not selection.is_within(best["l0"], budget):
        why = f"the sparsest run: none is within an L0 of {budget}"
    else:
        why = f"with the lowest {MEASURES[measure]} of the runs within an L0 of {budget}"
        sparse = 100 * best["l0"] / best["d_sae"] < claims.DENSE_SHARE_PCT  # else no run is
        why += f" that fire less than {claims.DENSE_SHARE_PCT:g}% of their latents" if sparse else ""
    text = {name: number(best[name], name) for name in ("l0", "kl", "delta_loss", "frac_rec_pct", "dead_pct")}
    text |= {name: number(best[name], name) for name in ("fvu_no_sink", "loss_recovered_mean")}
    between = ""
    if prompts is not None:
        measured = intervals.measured(prompts, measure, df["run_id"])
        own = intervals.contrast(measured, {best["run_id"]: 1.0})
        between = f" (95% interval {bounds(own.low, own.high, measure)})" if own.interval else ""
    told = {
        "kl": f"it moves the model's predictions by a KL of **{text['kl']} nats/token**{between} and adds "
        f"{text['delta_loss']} nats/token to its loss",
        "delta_loss": f"it costs the model **{text['delta_loss']} nats/token**{between}",
    }[measure]
    return Markdown(
        f"::: {{.headline}}\n**Recommended: {name}** (`{best['name']}`), {why}.\n\n"
        f"Spliced in, {told} with **L0 {text['l0']}** "
        f"of {number(best['d_sae'], 'd_sae')} latents: frac_rec {text['frac_rec_pct']}%, loss recovered against the "
        f"mean {text['loss_recovered_mean']}, FVU without sinks {text['fvu_no_sink']}, dead latents "
        f"{text['dead_pct']}%.\n:::\n"
    )


def setting_table(df: pd.DataFrame) -> Markdown:
    """The parameters that all runs share, and those that were swept."""
    rows = [(name.replace("_", " "), _values(df, name)) for name in ("model", "dataset", "text")]
    if df["activations"].any():
        rows += [("published activations", _values(df, "activations"))]
    rows += [("layer and site", f"{_values(df, 'layer')}, {_values(df, 'site')} (d_in {_values(df, 'd_in')})")]
    rows += [("architecture", _values(df, "arch")), ("expansion", _values(df, "expansion", "{}x"))]
    rows += [("K", _values(df, "k")), ("threshold θ", _values(df, "threshold")), ("seed", _values(df, "seed"))]
    rows += [(COLUMNS[n].title.lower(), _values(df, n)) for n in ("n_train_rows", "n_val_rows")]
    # older tables have no KL, and score such a sentence
    shared = " (a sentence that all prompts share is not scored)" if df["kl"].notna().all() else ""
    scored = f"{_values(df, 'n_eval_tokens')} scored tokens{shared}"
    rows += [("splice", f"{_values(df, 'n_eval_prompts')} prompts, {scored}")]
    rows += [
        ("recipe", _values(df, "recipe")),
        (
            "training",
            f"{_values(df, 'epochs')} epochs, {_values(df, 'steps')} steps, Adam, batch {_values(df, 'batch_size')}",
        ),
        ("learning rate", _values(df, "lr")),
    ]
    rows += [
        (
            "clean loss",
            f"{_values(df, 'ce_clean')} nats/token; zeros {_values(df, 'ce_zero')}, mean {_values(df, 'ce_mean')}",
        )
    ]
    return pipe_table(["Setting", "Value"], rows)


def files_text(best: pd.Series) -> Markdown:
    """The contents of a run's folder."""
    return Markdown(
        f"Each run has a folder `runs/<run id>/`: the weights under the published name (`{best['name']}.pt`, a bare "
        "state dict for `load_state_dict`; with the `threshold` of a Gated, or of a JumpReLU with a K), the same as "
        "`sae.safetensors` with `cfg.json`, the metrics (`metrics.json`), the learning curve (`metrics.jsonl`), tables "
        "by prompt, latent and position, and the executed notebook.\n"
    )


def limits_text(df: pd.DataFrame) -> Markdown:
    """Limitations of the numbers."""
    seeds, origins = between(_seeds(df), "d"), len(selection.by_origin(df))
    read = f"{origins} sources of rows, each judged by itself" if origins > 1 else "One layer of one model"
    return Markdown(
        f"{read}; {seeds} seed{'s' * (seeds != '1')} per setting, so differences between single "
        f"runs may be chance; {_values(df, 'n_eval_prompts')} prompts for the losses. The intervals of single runs "
        "generalise over problem templates, not over seeds, and each stands for itself, not for all at once. frac_rec "
        "has the published meaning, CE clean / CE spliced, which is not the field's fraction of loss recovered.\n"
    )


def published_note() -> Markdown:
    """What the published table implies about its own definitions, with the arithmetic."""
    df = published_sweep.bounds()
    (var_low, var_high), (ce_low, ce_high) = published_sweep.meet(df, "var"), published_sweep.meet(df, "ce")
    usual = df[["usual_low", "usual_high"]]
    least, most = usual["usual_high"].idxmin(), usual["usual_low"].idxmax()
    rows = []
    for row, name in zip(df.to_dict("records"), published_sweep.rows()["name"], strict=True):
        bounds = [
            f"{row[f'{n}_low']:.{d}f} to {row[f'{n}_high']:.{d}f}" for n, d in (("var", 2), ("ce", 3), ("usual", 2))
        ]
        rows.append((name, *bounds))
    heads = ["Published row", "MSE / NMSE (act²)", "f·Δ / (1 − f) (nats)", "Δ / (1 − f) (nats)"]
    return markdown(
        "Each printed number is rounded, so each row gives bounds and no value. With f = frac_rec and Δ = delta loss:",
        pipe_table(heads, rows),
        f"- **NMSE = MSE / Var(x)** with one variance pooled over all elements. All {len(df)} bounds meet, "
        f"in [{var_low:.3f}, {var_high:.3f}].",
        f"- **frac_rec = CE_clean / CE_spliced.** Then f·Δ / (1 − f) is the clean loss, one constant; all {len(df)} "
        f"bounds meet, in [{ce_low:.3f}, {ce_high:.3f}] nats.",
        "- It is not the field's fraction of loss recovered. Then Δ / (1 − f) would be one constant, the loss between "
        f"clean and ablated, and the bounds do not meet: row {least + 1} is at most {usual['usual_high'][least]:.2f}, "
        f"row {most + 1} at least {usual['usual_low'][most]:.2f}.",
    )


def setting_note(df: pd.DataFrame, timing: pd.DataFrame) -> Markdown:
    """Hardware, time, versions and hashes of the runs on the site."""
    machine = [("processor", ", ".join(timing["cpu"].unique())), ("threads per run", _values(timing, "threads"))]
    machine += [("training, all runs", f"{timing['train_seconds'].sum() / 60:.1f} minutes, one run after another")]
    versions = [(n.replace("_", " "), _values(df, n)) for n in ("code_version", "torch_version", "kernel", "matmul")]
    hashes = [(n.replace("_", " "), _values(df, n, "`{}`")) for n in ("store_id", "data_sha256", "model_sha256")]
    columns = ["name", "train_seconds", "train_rows_per_second", "eval_seconds"]
    return markdown(
        pipe_table(["What", "Value"], machine + versions + hashes),
        folded("Time of each run", html_table(timing, columns, caption="Time of each run.", mark_best=False)),
    )


def _seeds(df: pd.DataFrame) -> pd.Series:
    """How many seeds each setting has."""
    keys = pd.Series([settings.key(row) for row in df.to_dict("records")], index=df.index, dtype=object)
    return df["seed"].groupby(keys).nunique()


def _layers(df: pd.DataFrame) -> str:
    return f"{plural(df['layer'].nunique(), 'layer')} {_values(df, 'layer')}"


def _values(df: pd.DataFrame, name: str, form: str = "{}") -> str:
    """The distinct values of a column as text."""
    values = [value for value in df[name].unique() if not pd.isna(value) and value != ""]
    if len(values) > 1 and not isinstance(values[0], str):
        values = sorted(values)
    return escape(listed(form.format(number(value, name)) for value in values), quote=False) if values else MISSING


def hub_model(name: str) -> str | None:
    """The Hub id of a run's model; None for a local folder, whose path nobody else has."""
    local = os.path.exists(os.path.expanduser(name)) or not HUB_ID.fullmatch(name)
    return BASE_MODELS.get(name) or (None if local else name)


def model_name(name: str) -> str:
    """The name of a run's model in the card; for a local folder, its last path component."""
    return f"{BASE_MODELS[name]}, its weights in 4 bits" if name in BASE_MODELS else hub_model(name) or Path(name).name


def dataset(name: str) -> str:
    """The name of a run's dataset in the card: the Hub id, the generator, or the name of a local folder."""
    return (
        name.removeprefix("embedded:")
        if name.startswith("embedded:")
        else Path(name).name
        if hub_model(name) is None
        else name
    )
