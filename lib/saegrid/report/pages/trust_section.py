"""What latents may be trusted for: seed stability, controls, K by coherence, known directions, probes; as Markdown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from saegrid.analysis import scaling, selection
from saegrid.analysis.intervals import LEVEL, holm, t_interval
from saegrid.analysis.numbers import COLUMNS, MISSING, bounds, change, counted, header, listed, number
from saegrid.config import settings
from saegrid.config.settings import CONTROLS
from saegrid.experiment import results
from saegrid.report.figures import plots
from saegrid.report.figures.style import ABOVE, INK, MARKERS, PALETTE, log_axes, styled
from saegrid.report.pages.peers_section import CONTENDERS
from saegrid.report.tables import Markdown, folded, html_table, markdown

SIZES = ("n_train_rows", "k", "d_sae")
"""What stability is drawn over, where it varies."""
FEW_PCT = 10.0
"""Below this share of stable latents, the text warns of reading single latents."""


def stability(stable: pd.DataFrame) -> Markdown:
    """How many latents are found again with another seed: sentences, a figure per size that varies, and a table."""
    plain = selection.without_controls(stable)
    if plain.empty:
        return Markdown("Every setting here has one seed: nothing says whether another seed finds the same latents.\n")
    table = stable.assign(stable_between=_bounds(stable))
    columns = ["name", "seeds", "pairs", "stable_pct", "stable_between", "stable_energy_pct", "matched_cosine"]
    columns += ["random_cosine", "start_cosine"]
    caption = (
        "Seed stability of each setting: means over all pairs of seeds. Two latents are the same if the cosines of "
        "their decoder and of their encoder rows are above 0.7."
    )
    parts = selection.by_origin(plain)
    if len(parts) > 1:
        said = "\n".join(
            f"- **{name.capitalize()}**: {_share(rows)} of the live latents" for name, rows in parts.items()
        )
        said = f"Found again with another seed:\n\n{said}"
        return markdown(said, html_table(table, columns, caption=caption, mark_best=False))
    panels = [
        (curves(plain, x=x), f"{header('stable_pct')} over {header(x)}; means over the other settings.")
        for x in SIZES
        if plain[x].nunique() > 1
    ]
    drawn = [plots.side_by_side(panels)] if panels else []
    return markdown(verdict(plain), *drawn, html_table(table, columns, caption=caption, mark_best=False))


def replicated(folder: Path) -> tuple[str, str]:
    """How stability changes with recipe, rows and size (`results/stability`): a short answer, and a table."""
    runs, records = results.read_tidy(folder), results.read_stability(folder).to_dict("records")
    keys = [settings.key(row) for row in runs.to_dict("records")]
    also = [name for name in settings.unusual(records) if name not in CONTROLS]  # these are in the label
    for row in records:
        own = settings.key(row)
        row |= runs[[key == own for key in keys]][["fvu_no_sink", "kl"]].mean()
        row["Setting"] = ", ".join([settings.label(row), *(f"{name} = {row[name]}" for name in also)])
    table = pd.DataFrame(records).sort_values("stable_pct", ascending=False, ignore_index=True)
    columns = ["Setting", "seeds", "stable_pct", "stable_energy_pct", "matched_cosine", "random_cosine"]
    caption = "Settings by the share of live latents that another seed finds again (“make stability”)."
    what = (
        f"One change at a time of recipe, rows or size, on layer {records[0]['layer']}. A choice helps where "
        "more latents are stable and FVU is no higher. All decoders start at random: training alone makes them agree."
    )
    body = html_table(table, [*columns, "fvu_no_sink", "kl"], caption=caption, mark_best=False)
    share = _share(table.assign(name=table["Setting"]))
    return f"**Latents that another seed finds again**: {share}.", markdown(what, body)


def verdict(plain: pd.DataFrame) -> str:
    """The range of stability over the settings, what chance gives, and what follows for readers of latents."""
    high = plain.loc[plain["stable_pct"].idxmax()]
    found, chance = (number(plain[name].mean(), name) for name in ("matched_cosine", "random_cosine"))
    text = (
        f"**{_share(plain)} of the live latents are found again with another seed.** Matched one to one, the decoder "
        f"rows of two seeds have a mean cosine of {found}; as many random directions of the same width give {chance}. "
        f"Rows keep a cosine of {number(plain['start_cosine'].mean(), 'start_cosine')} with their random start. "
        "Rows of attention sinks, and the latents that are given the sinks' direction, are left out."
    )
    if high["stable_pct"] < FEW_PCT:
        text += (
            " So most of these latents are those of the seed, however well the SAE reconstructs: do not read a single "
            "latent as a property of the language model unless other seeds have it too."
        )
    return text


def _share(plain: pd.DataFrame) -> str:
    """The lowest and the highest stability, with the settings that have them."""
    low, high = (plain.loc[plain["stable_pct"].agg(end)] for end in ("idxmin", "idxmax"))
    least, most = (f"{number(row['stable_pct'], 'stable_pct')}%" for row in (low, high))
    return least if least == most else f"{least} ({low['name']}) to {most} ({high['name']})"


@styled
def curves(df: pd.DataFrame, *, x: str, ax: Axes | None = None) -> Axes:
    """Share of stable latents over a size, one line per architecture (means over the rest)."""
    rows = df[df[x].notna()].astype({x: float})
    for arch, group in rows.groupby("arch", sort=False):
        line = group.groupby(x)["stable_pct"].mean()
        ax.plot(line.index, line, color=PALETTE.get(arch, INK), marker=MARKERS.get(arch, "o"), label=arch)
    log_axes(ax, sorted(rows[x].unique()))
    ax.set_yscale("linear")
    ax.set_ylim(bottom=0)
    ax.set_xlabel(header(x))
    ax.set_ylabel(header("stable_pct"))
    ax.legend(ncols=3, **ABOVE)
    return ax


def in_short(best: pd.Series, df: pd.DataFrame, stable: pd.DataFrame, baseline: pd.DataFrame | None = None) -> str:
    """Stability and controls of one run's setting, for the recommendation; empty if neither was measured."""
    same = stable[[settings.key(row) == settings.key(best) for row in stable.to_dict("records")]]
    parts = [verdict(same)] if len(same) else []
    beside = df[[settings.key(row, *CONTROLS) == settings.key(best, *CONTROLS) for row in df.to_dict("records")]]
    found = selection.beside_controls(beside, baseline)
    if len(found):
        losses = found[(found["control"] != "") & ~found["untrained"]]
        said, measure = reached_text(found), selection.cost(losses)
        for least in losses.nsmallest(1, measure).to_dict("records"):
            said = f"The control that loses least is {least['control']}: {_loss(least, measure)}. {said}"
        parts.append(said)
    elif baseline is not None:
        measure = selection.cost(baseline)
        for row in selection.pca_control(baseline, best, [measure]):
            parts.append(f"The control here is PCA with as many components as K: {_loss(row, measure)}.")
    return "\n\n".join(parts)


def _loss(row: dict[str, Any], measure: str) -> str:
    return f"{COLUMNS[measure].title} {number(row[measure], measure)} nats/token"


def controls(df: pd.DataFrame, baseline: pd.DataFrame | None = None) -> Markdown:
    """Each setting beside its controls, and the measures that a control reaches."""
    found = selection.beside_controls(df, baseline)
    if found.empty:
        return Markdown("No control was run here (parameters `freeze` and `model_init`).\n")
    measures = [name for name in selection.COMPARED if name in found and found[name].notna().any()]
    shown = found.assign(control=found["control"].replace("", MISSING)).astype({name: object for name in measures})
    for row, reached in enumerate(found["reached"]):
        for name in reached:
            shown.loc[row, name] = f"{number(found.loc[row, name], name)} ≈"
    caption = "Settings beside their controls, means over seeds; ≈ marks what a control reaches."
    if found["untrained"].any():
        caption += " An untrained language model has no loss to lose, so its losses are not compared."
    return markdown(
        reached_text(found),
        html_table(shown, ["name", "control", "seeds", *measures], caption=caption, mark_best=False),
    )


def reached_text(found: pd.DataFrame) -> str:
    """Which measures a control reaches (`selection.beside_controls`), in a sentence; empty without controls."""
    if found.empty:
        return ""
    by_measure: dict[str, list[str]] = {}
    for row in found.to_dict("records"):
        for name in row["reached"]:
            by_measure.setdefault(name, []).append(row["control"])
    kinds = counted(int((found["control"] != "").sum()), "control")
    if not by_measure:
        return f"{kinds}, and none reaches its setting on any measure."
    parts = [f"{COLUMNS[name].title} ({', '.join(dict.fromkeys(those))})" for name, those in by_measure.items()]
    return f"A control reaches **{'; '.join(parts)}**: these measures say nothing about what was learnt."


def which_k(df: pd.DataFrame) -> str:
    """Decoder coherence over K as a hint to K, with what it is worth; empty if no setting has three K with it."""
    found = scaling.coherence_over_k(df)
    if found.empty:
        return ""
    lowest = found.loc[found.groupby("label", sort=False)["decoder_coherence"].idxmin()]
    ends = found.groupby("label")["k"].agg(["min", "max"])
    told = [
        f"K = {row.k}{' (the largest here)' if row.k == ends.loc[row.label, 'max'] else ''} for {row.label}"
        for row in lowest.itertuples()
    ]
    widths = sorted({(2 / (math.pi * d_in)) ** 0.5 for d_in in df["d_in"]})  # mean |cosine| of random directions
    return (
        f"**A hint about K.** Decoder coherence, the mean |cosine| between decoder rows of live latents, is lowest at "
        f"{'; '.join(told)}. arXiv:2508.16560 takes the lowest as the right L0: it claims that too few latents per "
        "token, and too many, mix directions and raise it. But random decoder rows give "
        f"{' and '.join(number(width, 'decoder_coherence') for width in widths)}, so a low value may also mean that "
        "few directions were learnt; and on rows with known directions it fell on beyond the true L0."
    )


@styled
def coherence_curves(found: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Decoder coherence over K, one line per setting (`scaling.coherence_over_k`)."""
    for (arch, label), rows in found.groupby(["arch", "label"], sort=False):
        line = rows.sort_values("k")
        color, marker = PALETTE.get(arch, INK), MARKERS.get(arch, "o")
        ax.plot(line["k"], line["decoder_coherence"], color=color, marker=marker, label=label)
    log_axes(ax, sorted(found["k"].unique()))
    ax.set_yscale("linear")
    ax.set_xlabel(header("k"))
    ax.set_ylabel(header("decoder_coherence"))
    ax.legend(ncols=1, **ABOVE)
    return ax


def coherence(df: pd.DataFrame) -> Markdown:
    """`which_k` with its figure."""
    found = scaling.coherence_over_k(df)
    if found.empty:
        return Markdown("No setting here was run at three K with decoder coherence.\n")
    text = "Decoder coherence over K: the mean |cosine| between the decoder rows of live latents."
    return markdown(which_k(df), plots.figure(coherence_curves(found), alt=text, caption=text))


def known_directions(folder: Path) -> tuple[str, Markdown]:
    """What training finds of directions that are known (`benchmarks/ground_truth.py`): an answer, then text and
    tables."""
    runs = pd.read_csv(folder / "runs.csv")
    k = runs.loc[runs["freeze"] == "decoder", "k"].iloc[0]
    keys, measures = (
        ["recipe", "arch", "freeze", "rows", "epochs"],
        ["mcc", "f1", "uniqueness", "stable_pct", "matched_cosine"],
    )
    means = runs[runs["k"] == k].groupby(keys, sort=False)
    table = means[[*measures, "fvu_no_sink", "dead_pct_no_sink"]].mean().assign(seeds=means.size()).reset_index()
    table["Setting"] = table["arch"] + ", " + table["recipe"]
    table.loc[table["freeze"] != "none", "Setting"] += ", frozen decoder"
    table["n_train_rows"] = table["rows"]
    caption = (
        "Known directions: means over seeds. The frozen decoder's MCC and uniqueness are those of random directions."
    )
    table["Epochs"] = table["epochs"].astype(str)
    columns = ["Setting", "n_train_rows", "Epochs", "seeds", *measures, "fvu_no_sink", "dead_pct_no_sink"]
    sweep = runs[(runs["rows"] == runs["rows"].max()) & (runs["recipe"] == "improved") & (runs["arch"] == "BatchTopK")]
    sweep = sweep[sweep["freeze"] == "none"].groupby("k")[["decoder_coherence", "mcc", "f1"]].mean().reset_index()
    over = "Decoder coherence and recovery over K: BatchTopK, improved, most rows."
    answer, text = recovery_text(table, runs["true_l0"].mean(), k)
    return answer, markdown(
        text,
        html_table(table, columns, caption=caption, mark_best=False),
        sweep_text(sweep, runs["true_l0"].mean()),
        html_table(sweep, ["k", "decoder_coherence", "mcc", "f1"], caption=over, mark_best=False),
    )


def recovery_text(table: pd.DataFrame, true_l0: float, k: int) -> tuple[str, str]:
    """The setting that recovers most known directions, beside the control: a short answer, and the whole text."""
    trained, frozen = (table[(table["freeze"] == "none") == plain] for plain in (True, False))
    best, chance = trained.loc[trained["mcc"].idxmax()], frozen["mcc"].mean()
    reached = [
        COLUMNS[name].title
        for name in ("mcc", "f1", "uniqueness")
        if frozen[frozen["recipe"] == best["recipe"]][name].max()
        >= trained[trained["recipe"] == best["recipe"]][name].min()
    ]
    nothing = f" The frozen decoder also reaches {', '.join(reached)}, which says nothing here." if reached else ""
    rest = ", ".join(
        f"`{recipe}` at most {number(rows['mcc'].max(), 'mcc')}"
        for recipe, rows in trained.groupby("recipe")
        if recipe != best["recipe"]
    )
    found = f"{best['Setting']} recovers most, with an MCC of {number(best['mcc'], 'mcc')}"
    found += f"; {rest}" if rest else ""
    found += f"; chance (a frozen decoder) gives {number(chance, 'mcc')}."
    return f"**Known directions**: {found}", (
        f"Rows made of known directions, {true_l0:.1f} of them per row on average: Zipf frequencies, directions of a "
        f"topic together, children only with their parents, an offset, attention sinks; K = {k}. MCC is the mean "
        f"|cosine| of decoder rows and true directions, matched one to one. {found} That run had {best['rows']:,} "
        f"rows, and {number(best['stable_pct'], 'stable_pct')}% of its latents are stable.{nothing}"
    )


def sweep_text(sweep: pd.DataFrame, true_l0: float) -> str:
    """Where decoder coherence is lowest over K, and where recovery is best."""
    low, best, f1 = (
        sweep.loc[index, "k"]
        for index in (sweep["decoder_coherence"].idxmin(), sweep["mcc"].idxmax(), sweep["f1"].idxmax())
    )
    hit = "close to" if abs(low - true_l0) <= true_l0 / 4 else "not at"
    return (
        f"Decoder coherence is said to be lowest at the true L0 (arXiv:2508.16560). Here it is lowest at K = {low}, "
        f"{hit} the true {true_l0:.1f}; MCC is highest at K = {best}, F1 at K = {f1}."
    )


def synthetic_benchmark(folder: Path) -> tuple[str, Markdown]:
    """SAELens' synthetic benchmark: this project's SAEs and its peers' (`benchmarks/synth_bench.py`)."""
    runs = pd.read_csv(folder / "synthsaebench.csv").fillna({"recipe": ""})
    measures = {
        **{"saelens_mcc": "MCC", "saelens_f1_score": "F1", "saelens_precision": "Precision"},
        **{"saelens_recall": "Recall", "saelens_uniqueness": "Uniqueness"},
        **{"saelens_explained_variance": "Explained variance", "saelens_sae_l0": "L0", "saelens_dead_latents": "Dead"},
    }
    means = runs.groupby(["peer", "recipe", "arch"], sort=False)[[*measures, "stable_pct"]].mean()
    table = means.sort_values("saelens_mcc", ascending=False).reset_index()
    table["Contender"] = (table["peer"] + " " + table["arch"] + " " + table["recipe"]).str.strip()
    for name, title in measures.items():
        digits = ".0f" if title == "Dead" else ".1f" if title == "L0" else ".3f"
        table[title] = table[name].map(lambda value, digits=digits: format(value, digits))
    caption = (
        f"SynthSAEBench, much smaller than SAELens' default, by SAELens' own evaluation; means over "
        f"{counted(runs['seed'].nunique(), 'seed')}; stable latents by this project's."
    )
    absent = [" ".join(name) for name in CONTENDERS if name not in set(zip(runs["peer"], runs["arch"], strict=True))]
    text = (
        "The generator of SynthSAEBench-16k, eight times smaller in directions, width and hierarchy: "
        f"{runs['saelens_true_l0'].mean():.1f} directions per row. SAELens' default asks for 200 million samples; "
        "here each SAE gets the same 200,000 rows once, at the learning rate with the lowest FVU on held-out rows (the "
        "published recipe keeps its own)."
    )
    text += f" Not run: {', '.join(absent)}." if absent else ""
    for name, title in (("saelens_mcc", "MCC"), ("saelens_f1_score", "F1")):
        order = table.sort_values(name, ascending=False)
        firsts = [part.iloc[0] for _, part in order.groupby(order["peer"] == "saegrid") if len(part)]
        said = listed(f"{row['Contender']} ({row[name]:.3f})" for row in reversed(firsts))
        text += f" Highest {title}: {said}."
    columns = ["Contender", *measures.values(), "stable_pct"]
    return "", markdown(text, html_table(table, columns, caption=caption, mark_best=False))


def probes(folder: Path) -> tuple[str, Markdown]:
    """Sparse probes on latents and on what they are compared with (`benchmarks/probes.py`): an answer, then text and
    tables."""
    found = pd.read_csv(folder / "probes.csv")
    context = int((~found.groupby("concept")["from_token"].first().astype(bool)).sum())
    label = found["inputs"].where(found["inputs"] != "latents", found["arch"] + " " + found["recipe"])
    found = found.assign(inputs=label).groupby(["inputs", "concept", "k"], sort=False)["auc"].mean().unstack("k")
    everything, ks = found[0].mean(), [k for k in found if k]
    wide = {k: found[k].unstack("inputs") for k in ks}  # AUC of (concept, inputs)
    k, means = ks[1], pd.DataFrame({k: aucs.mean() for k, aucs in wide.items()})
    means = means.sort_values(ks[1], ascending=False)
    apart = wide[k].drop(columns="PCA").sub(wide[k]["PCA"], axis=0)[[n for n in means.index if n != "PCA"]]
    n = len(apart)
    more = {name: t_interval(d.mean(), d.std(ddof=1) / n**0.5, n - 1) for name, d in apart.items()}
    shown = [name for name, p in zip(more, holm([one.p for one in more.values()]), strict=True) if p < LEVEL]
    stand = {way: [name for name in shown if (more[name].value > 0) == up] for way, up in (("higher", 1), ("lower", 0))}
    told = "; ".join(
        f"{listed(names) if names else 'none'} {'have' if len(names) > 1 else 'has'} a significantly {way} AUC than PCA"
        for way, names in stand.items()
    )
    answer = f"**Sparse probes** on {k} latents or components: {told}."
    text = (
        f"{counted(n, 'concept')} with automatic labels, {context} of them not decided by the current token alone; "
        f"AUC on held-out tokens, from the {k} latents or components that tell most. {told[0].upper()}{told[1:]} (t "
        f"intervals over concepts, paired; corrected for {len(more)} comparisons). All coordinates of the residual "
        f"stream give {everything:.3f}."
    )
    table = means.map("{:.3f}".format).set_axis([f"K = {k}" for k in ks], axis=1).rename_axis("Inputs").reset_index()
    title = f"More than PCA at K = {k}"
    table[title] = [change(*more[name][:3]) if name in more else "" for name in table["Inputs"]]
    each = wide[k][means.index].map("{:.3f}".format).rename_axis("Concept").reset_index()
    caption = f"AUC of each concept, K = {k}."
    return answer, markdown(
        text,
        html_table(table, list(table), caption="Sparse probes: mean AUC over concepts.", mark_best=False),
        folded("AUC of each concept", html_table(each, list(each), caption=caption, mark_best=False)),
    )


def _bounds(stable: pd.DataFrame) -> list[str]:
    both = zip(stable["stable_pct_low"], stable["stable_pct_high"], strict=True)
    return [bounds(low, high, "stable_pct") for low, high in both]
