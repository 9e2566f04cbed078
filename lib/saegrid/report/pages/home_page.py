"""The text of the home page, in the form of a model card, and the generated parts of other pages.

Every number is formatted from the tables. The functions return self-contained Markdown, so that the same body can go
to a model repository.
"""

from __future__ import annotations

from html import escape

import pandas as pd

from saegrid.analysis import findings as claims
from saegrid.analysis import intervals, published_sweep, selection
from saegrid.analysis.budget import by_budget
from saegrid.analysis.numbers import COLUMNS, MISSING, counted, number
from saegrid.analysis.scaling import MEASURES
from saegrid.config.architectures import ARCHITECTURES
from saegrid.report.figures import captions, plots
from saegrid.report.pages import findings_page, trust_section
from saegrid.report.pages.ablation_section import recipe_section
from saegrid.report.tables import Markdown, html_block, html_table, markdown, pipe_table

MAIN = ["name", "l0", "val_mse", "nmse", "fvu_no_sink", "dead_pct", "kl", "delta_loss", "frac_rec_pct"]
MAIN += ["loss_recovered_mean"]
"""Columns of the results table on the home page."""
KEEP = {
    "k": "top = pre.topk({k})\nz = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())",
    "inference_threshold": 'z = pre * (pre > json.load(open(f"{{folder}}/cfg.json"))["inference_threshold"])',
    "threshold": 'z = pre * (pre > json.load(open(f"{{folder}}/cfg.json"))["threshold"])',
    "theta": 'z = pre * (pre > w["theta"])',
}
"""Code that keeps pre-activations, per rule that decides which."""


def model_card(
    df: pd.DataFrame,
    prompts: pd.DataFrame | None = None,
    *,
    title: str = "",
    links: str = "",
    baseline: pd.DataFrame | None = None,
    stable: pd.DataFrame | None = None,
) -> Markdown:
    """The home page's body: recommendation, headline figure, findings, results, what was swept, files, how to load.

    Args:
        df: the tidy table.
        prompts: the runs' per-prompt sums, for the intervals.
        title: the grid's title.
        links: the report's folder relative to the page, such as `report/`; empty: a card without links.
        baseline: losses of PCA (`saegrid.experiment.pca_table`).
        stable: stability of the grid's settings (`results.read_stability`).
    """
    best = selection.recommend(df)
    trust = "" if stable is None else trust_section.in_short(best, df, stable, baseline)
    df = selection.without_controls(df)
    runs = f"{links}runs/" if links else ""
    y = selection.cost(df)
    ax = plots.frontier(df, y=y, links=runs, baseline=baseline)
    alt = captions.frontier_alt(df, y)
    caption = captions.frontier_caption(df, y, baseline=baseline)
    own, published = claims.all_findings(df, prompts), claims.all_findings(published_sweep.rows())
    more = f" [Interactive, and against other measures]({links}frontier.ipynb)." if links else ""
    return markdown(
        recommendation(df, prompts, runs),
        key_numbers(best),
        *filter(None, [trust]),
        f"{escape(title)}: {swept_text(df)}" if title else swept_text(df),
        plots.figure(ax, alt=alt, caption=caption),
        f"The recommended run costs least; fewer latents cost more, and the line joins the runs that none beats.{more}",
        *filter(None, [budget_section(df, prompts, runs)]),
        "## Load the recommended SAE",
        load_text(best),
        "## The five published findings, tested again",
        f"{findings_page.verdicts_text(own)} The published sweep ran on Qwen2.5-0.5B-Instruct; its printed rows are "
        "tested by the same functions."
        + (f" [Evidence, rule and rows of each]({links}findings.ipynb)." if links else ""),
        findings_page.findings_table(own, published, f"{links}findings.html" if links else None),
        "## Results",
        html_table(
            df, [*MAIN, "stable_pct"], caption=f"All {len(df)} runs.", links=runs, tools="results" if links else ""
        ),
        *filter(None, [recipe_section(df, prompts)]),
        "## What was swept",
        setting_table(df),
        "## Files",
        files_text(best),
        "## Limits",
        limits_text(df),
    )


def swept_text(df: pd.DataFrame) -> str:
    """The grid in a sentence."""
    by_k = _values(df, "k")
    theta = _values(df, "threshold")
    theta += " RMS" if theta != MISSING and set(df["threshold_unit"][df["threshold"].notna()]) == {"rms"} else ""
    sparsity = " and ".join(
        [*([f"K of {by_k}"] if by_k != MISSING else []), *([f"θ of {theta}"] if theta != MISSING else [])]
    )
    return (
        f"{len(df)} runs, {_listed(df, 'arch')} at {_values(df, 'expansion', '{}x')} with {sparsity}, each trained on "
        f"{_values(df, 'n_train_rows')} tokens of layer {_values(df, 'layer')} and judged on "
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
    items = "\n".join(
        f'<div><dt>{escape(what)}</dt><dd><strong>{value}</strong> <span class="unit">{escape(unit)}</span></dd></div>'
        for value, unit, what in cells
    )
    return html_block(f'<dl class="key-numbers">\n{items}\n</dl>')


def recommendation(df: pd.DataFrame, prompts: pd.DataFrame | None = None, runs: str = "") -> Markdown:
    """The recommended run and its numbers as one paragraph."""
    best, measure = selection.recommend(df), selection.cost(df)
    name = f"[{best['name']}]({runs}{best['run_id']}.ipynb)" if runs else f"`{best['name']}`"
    limit = f"{claims.DENSE_SHARE_PCT:g}% of their latents"
    sparse = 100 * best["l0"] / best["d_sae"] < claims.DENSE_SHARE_PCT
    of = f"of the runs that fire less than {limit}" if sparse else f"of all; no run fires less than {limit}"
    text = {column: number(best[column], column) for column in MAIN}
    between = ""
    if prompts is not None:
        _, low, high, _ = intervals.contrast(intervals.measured(prompts, measure), {best["run_id"]: 1.0})
        between = f" (95% interval {number(low, measure)} to {number(high, measure)})"
    told = {
        "kl": f"it moves the model's predictions by a KL of **{text['kl']} nats/token**{between} and adds "
        f"{text['delta_loss']} nats/token to its loss",
        "delta_loss": f"it costs the model **{text['delta_loss']} nats/token**{between}",
    }[measure]
    return Markdown(
        f"::: {{.headline}}\n**Recommended: {name}**, with the lowest {MEASURES[measure]} {of}.\n\n"
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
            f"{_values(df, 'epochs')} epochs, Adam, lr {_values(df, 'lr')}, batch {_values(df, 'batch_size')}",
        ),
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


def rows_code(best: pd.Series) -> str:
    """A line of code that stands for rows of the run's layer."""
    return f"x = torch.randn(4, {best['d_in']})  # rows of the residual stream after block {best['layer']}"


def own_code(best: pd.Series, source: str) -> str:
    """Code that loads and runs the run's SAE with this library; `source` closes the call of `load_sae`."""
    return (
        f"import torch\n\nimport saegrid\n\nsae = saegrid.load_sae({source}\n{rows_code(best)}\n"
        f"latent_acts, x_hat = sae.encode(x), sae(x)  # (4, {best['d_sae']}), (4, {best['d_in']})"
    )


def load_text(best: pd.Series) -> Markdown:
    """Code that runs the recommended SAE: with this library, and with torch alone."""
    folder = f"runs/{best['run_id']}"
    x, own = rows_code(best), own_code(best, f'"{folder}")  # {best["name"]}')
    keep = KEEP[ARCHITECTURES[best["arch"]].cut(not pd.isna(best["k"]))].format(k=best["k"])
    plain = "import json\n\n" if "json" in keep else ""
    plain += f'import torch\nfrom safetensors.torch import load_file\n\nfolder = "{folder}"\n'
    plain += f'w = load_file(f"{{folder}}/sae.safetensors")\n{x}\n'
    plain += f'pre = (x - w["b_pre"]) @ w["W_enc"].T + w["b_enc"]\n{keep}\n'
    plain += 'x_hat = z @ w["W_dec"] + w["b_dec"] + w["b_pre"]'
    return markdown(
        "From the folder that the runs lie in:",
        f"```python\n{own}\n```",
        "With torch and safetensors alone:",
        f"```python\n{plain}\n```",
    )


def limits_text(df: pd.DataFrame) -> Markdown:
    """Limitations of the numbers."""
    seeds = df["seed"].nunique()
    return Markdown(
        f"One layer of one model; {counted(seeds, 'seed')} a setting, so differences between single "
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
    machine = [("processor", ", ".join(timing["cpu"].unique())), ("threads a run", _values(timing, "threads"))]
    machine += [("training, all runs", f"{timing['train_seconds'].sum() / 60:.1f} minutes, one run after another")]
    versions = [(n.replace("_", " "), _values(df, n)) for n in ("code_version", "torch_version", "kernel", "matmul")]
    hashes = [(n.replace("_", " "), _values(df, n, "`{}`")) for n in ("store_id", "data_sha256", "model_sha256")]
    columns = ["name", "train_seconds", "train_rows_per_second", "eval_seconds"]
    return markdown(
        pipe_table(["What", "Value"], machine + versions + hashes),
        html_table(timing, columns, caption="Time of each run.", mark_best=False),
    )


def _listed(df: pd.DataFrame, name: str) -> str:
    """The distinct values of a text column in a sentence: `A, B and C`."""
    *most, last = df[name].unique()
    return f"{', '.join(most)} and {last}" if most else str(last)


def _values(df: pd.DataFrame, name: str, form: str = "{}") -> str:
    """The distinct values of a column as text."""
    values = [value for value in df[name].unique() if not pd.isna(value) and value != ""]
    if len(values) > 1 and not isinstance(values[0], str):
        values = sorted(values)
    return ", ".join(form.format(number(value, name)) for value in values) or MISSING


BUDGET_COLUMNS = ["name", "budget", "l0", "d_sae", "kl", "delta_loss", "smaller", "sparser"]


def budget_section(df: pd.DataFrame, prompts: pd.DataFrame | None = None, links: str = "") -> str:
    """The table of `by_budget` as a section of a page; empty if it has fewer than two rows."""
    table = by_budget(df, prompts)
    if len(table) < 2:
        return ""
    caption = f"The lowest {MEASURES[selection.cost(df)]} within each budget of L0, and how much more a neighbour has"
    caption += ", with 95% intervals of each." if prompts is not None else "."
    return markdown(
        "## Choose by budget",
        "People who read latents want few per token, 20 to 50; whoever needs the model as it is takes what that costs.",
        html_table(table, BUDGET_COLUMNS, caption=caption, links=links, mark_best=False),
    )
