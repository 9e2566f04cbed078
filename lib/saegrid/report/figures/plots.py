"""Plots of the report: `plot(df, *, ax=None) -> Axes`. Long-form data in; no files read, nothing saved or shown."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from saegrid.analysis import selection
from saegrid.analysis.numbers import COLUMNS, header, number
from saegrid.analysis.selection import DENSE_SHARE_PCT, candidates, pareto
from saegrid.config import settings
from saegrid.report.figures.style import ABOVE, INK, MARKERS, PALE, PALETTE, PANEL, STYLE, WIDE, Look, styled
from saegrid.report.figures.svg import page_svg
from saegrid.report.tables import Markdown, from_template


@styled
def frontier(
    df: pd.DataFrame,
    *,
    y: str = "delta_loss",
    ax: Axes | None = None,
    links: str = "",
    baseline: pd.DataFrame | None = None,
) -> Axes:
    """L0 against a measure of fidelity: one marker per run, the Pareto set joined by a line.

    Colour and shape show the architecture, size the expansion; with `links`, markers link to run pages. Dense runs (not
    in `selection.candidates`) are hollow and not in the Pareto set: density alone would explain their fidelity.
    If there are other recipes, published-recipe runs are pale. `baseline` (`experiment.pca_table`) is a dashed line.
    """
    df = with_latents(df)
    pale = recipes_differ(df)
    sparse = candidates(df)
    front = pareto(sparse, y)
    filled = set(sparse["run_id"])
    ax.plot(front["l0"], front[y], color=INK, alpha=0.45, linewidth=1.2, zorder=1)
    beside = pca_line(df, y, baseline)
    if len(beside):
        ax.plot(beside["components"], beside[y], color=INK, alpha=0.45, linewidth=1.2, linestyle="--", zorder=1)
    for row in df.sort_values("expansion", ascending=False).to_dict("records"):
        mark = ax.scatter(
            row["l0"],
            row[y],
            s=_size(row["expansion"]),
            marker=MARKERS[row["arch"]],
            facecolor=PALETTE[row["arch"]] if row["run_id"] in filled else "none",
            edgecolor=INK if row["run_id"] in filled else PALETTE[row["arch"]],
            linewidth=0.6 if row["run_id"] in filled else 1.4,
            alpha=PALE if pale and row["recipe"] == "published" else None,
            zorder=2,
        )
        mark.set_gid(f"mark: {row['name']}: L0 {number(row['l0'], 'l0')}, {header(y)} {number(row[y], y)}")
        if links:
            mark.set_urls([f"{links}{row['run_id']}.html"])
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("L0 (latents/token, log scale)")
    ax.set_ylabel(header(y))
    if spans_widely(df, y, beside):
        ax.set_yscale("log")
        ax.set_ylabel(f"{header(y)}, log scale")
    _frontier_legend(df, ax, len(beside) > 0)
    return ax


def with_latents(df: pd.DataFrame) -> pd.DataFrame:
    """The runs whose latents fire: a logarithmic axis has no place for an L0 of 0."""
    return df[df["l0"] > 0] if (df["l0"] > 0).any() else df


def spans_widely(df: pd.DataFrame, y: str, beside: pd.DataFrame | None = None) -> bool:
    """Whether values of `y`, PCA's line (`pca_line`) included, need a logarithmic scale."""
    values = df[y] if beside is None else pd.concat([df[y], beside[y]])
    return values.min() > 0 and values.max() / values.min() > WIDE


def pca_line(df: pd.DataFrame, y: str, baseline: pd.DataFrame | None) -> pd.DataFrame:
    """PCA's line in the frontier: `components` and `y`, up to as many components as the densest run has active latents;
    no rows if `y` was not measured for PCA, or was measured on several stores."""
    if baseline is not None and "store_id" in df:  # a control's untrained model has a store of its own
        baseline = baseline[baseline["store_id"].isin(df["store_id"])]
    if baseline is None or y not in baseline or baseline[y].isna().any() or baseline["store_id"].nunique() != 1:
        return pd.DataFrame(columns=["components", y], dtype=float)
    return baseline[baseline["components"] <= df["l0"].max()][["components", y]]


@styled
def heatmap(df: pd.DataFrame, *, metric: str = "delta_loss", ax: Axes | None = None) -> Axes:
    """Rows: settings without their expansion; columns: expansion; each cell shows the value (mean over seeds).

    Darker is better.
    """
    import seaborn as sns  # takes longer to import than most pages take to draw

    rows = df.assign(setting=[setting(row) + more for row, more in zip(df.to_dict("records"), _more(df), strict=True)])
    order = _in_order(rows)["setting"].unique()
    table = rows.pivot_table(index="setting", columns="expansion", values=metric, sort=False)
    table = table.reindex(index=order, columns=sorted(table.columns))
    labels = table.map(lambda value: number(value, metric))
    colors = "cividis_r" if COLUMNS[metric].best == "max" else "cividis"
    norm = LogNorm() if spans_widely(rows, metric) else None
    sns.heatmap(table, annot=labels, fmt="", cmap=colors, norm=norm, ax=ax, cbar=False)
    cells = ax.collections[0].get_facecolors()[table.notna().to_numpy().ravel()]
    for text, cell in zip(ax.texts, cells, strict=True):
        text.set_color("black" if sns.utils.relative_luminance(cell) > 0.18 else "white")  # whichever stands out more
    ax.set_title(header(metric))
    ax.grid(False)
    ax.set_xticklabels([f"{size}x" for size in table.columns])
    ax.tick_params(axis="y", rotation=0)
    ax.set_xlabel("Expansion")
    ax.set_ylabel("")
    return ax


@styled
def dead_latents(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Share of dead latents over K, one line per setting without its K (mean over seeds)."""
    rows = df[df["k"].notna()].astype({"k": int})
    groups = rows.assign(more=_more(rows)).groupby(["arch", "expansion", "more"])
    styles = dict(zip(sorted(rows["expansion"].unique()), ("-", "--", ":", "-."), strict=False))
    for (arch, expansion, more), group in groups:
        line = group.groupby("k")["dead_pct"].mean()
        ax.plot(
            line.index,
            line,
            color=PALETTE[arch],
            marker=MARKERS[arch],
            markerfacecolor=PALETTE[arch] if (group["recipe"] == "published").all() else "none",
            linestyle=styles.get(expansion, "-"),
            label=f"{arch}, {expansion}x{more}",
        )
    ax.set_xticks(sorted(rows["k"].unique()))
    ax.set_ylim(bottom=0)
    ax.set_xlabel(header("k"))
    ax.set_ylabel(header("dead_pct"))
    ax.legend(ncols=3, **ABOVE)
    return ax


@styled
def learning_curves(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Validation MSE per epoch, one line per run; for a single run also the training MSE (dashed)."""
    df = _as_runs(df)
    differ = recipes_differ(df)
    for (_, arch), group in df.groupby(["run_id", "arch"], sort=False):
        look = {"color": (color := PALETTE.get(arch, INK)), "marker": MARKERS.get(arch, "o"), "markersize": 3.5}
        look["alpha"] = PALE if differ and group["recipe"].iloc[0] == "published" else 0.9
        (line,) = ax.plot(group["epoch"], group["val_mse"], **look)
        if arch:
            line.set_gid(f"mark: {group['name'].iloc[0]}")
    if df["run_id"].nunique() == 1:
        line.set_label("validation rows")
        ax.plot(df["epoch"], df["train_mse"], color=color, linestyle="--", label="training rows")
        ax.legend(ncols=3, **ABOVE)
    else:
        ax.legend(handles=_arch_handles(df), ncols=3, **ABOVE)
    if (df["val_mse"] > 0).all():
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("Epoch")
    ax.set_ylabel("MSE (act², log scale)")
    return ax


@styled
def firing_histogram(df: pd.DataFrame, *, n_rows: int = 0, ax: Axes | None = None) -> Axes:
    """Histogram of how often latents fire. Latents that never fire are left out: they are dead.

    For several runs, the mean over each architecture's runs, and a band from the lowest to the highest run.
    `n_rows` is the number of validation rows if `df` has no column `n_val_rows`.
    """
    df = _as_runs(df)
    rates = np.log10((df["fired"] / df.get("n_val_rows", n_rows)).where(df["fired"] > 0))
    lowest = rates.min() if rates.notna().any() else -1.0
    bins = np.linspace(lowest, 0.0 if lowest < 0 else 1.0, 31)
    centres = (bins[:-1] + bins[1:]) / 2
    for arch, runs in df.groupby("arch"):
        groups = [rates[run.index] for _, run in runs.groupby("run_id")]
        shares = np.array([100 * np.histogram(group.dropna(), bins)[0] / len(group) for group in groups])
        color, marker = PALETTE.get(arch, INK), MARKERS.get(arch, "o")
        if df["run_id"].nunique() == 1:
            ax.stairs(shares[0], bins, color=color, alpha=0.85, fill=True)
            continue
        ax.plot(centres, shares.mean(0), color=color, marker=marker, markersize=3.5, label=arch)
        ax.fill_between(centres, shares.min(0), shares.max(0), color=color, alpha=0.15, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(lambda value, _: f"{float(f'{100 * 10**value:.2g}'):g}%")
    ax.set_xlabel("Share of validation rows on which a latent fires (log scale)")
    ax.set_ylabel("Latents (% of d_sae)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(ncols=4, **ABOVE)
    return ax


@styled
def error_by_position(df: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Squared reconstruction error and variance by token position: the sink shows at the first one.

    For several runs, one line per architecture (mean over its runs). Rows of published files, whose positions are
    unknown (-1), are left out.
    """
    df = _as_runs(df)
    df = df[df["position"] >= 0]
    ax.set_xlabel("Token position, counted from 1 (log scale)")
    ax.set_ylabel("Mean square (act², log scale)")
    if df.empty:
        ax.text(0.5, 0.5, "positions not known", transform=ax.transAxes, ha="center", color=INK)
        return ax
    size = df.groupby("position")["sq_norm_centred"].mean()
    ax.plot(size.index + 1, size, color=INK, linestyle="--", linewidth=1.2, label="‖x − mean‖², the variance")
    for arch, group in df.groupby("arch"):
        error = group.groupby("position")["sq_error"].mean()
        color, marker = PALETTE.get(arch, INK), MARKERS.get(arch, "o")
        label = f"‖x − x̂‖², {arch}" if arch else "‖x − x̂‖²"
        ax.plot(error.index + 1, error, color=color, marker=marker, markersize=4, markevery=0.04, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(ncols=3, **ABOVE)
    return ax


@styled
def against_published(df: pd.DataFrame, *, metric: str = "delta_loss", ax: Axes | None = None) -> Axes:
    """One measure, one line per setting: ours (filled) and the published value (open), by `source`."""
    rows = df.assign(setting=[f"{setting(row)}, {row['expansion']}x" for row in df.to_dict("records")])
    order = list(_in_order(rows)["setting"].unique())
    for (source, arch), group in rows.groupby(["source", "arch"]):
        own = source == "own"
        ax.scatter(
            group[metric],
            [order.index(name) for name in group["setting"]],
            marker=MARKERS[arch],
            s=60,
            facecolor=PALETTE[arch] if own else "none",
            edgecolor=PALETTE[arch],
            linewidth=1.6,
        )
    ax.set_yticks(range(len(order)), order)
    ax.invert_yaxis()
    ax.set_xlabel(header(metric))
    handles = [
        Line2D([], [], marker="o", linestyle="", color=INK, label="own"),
        Line2D([], [], marker="o", linestyle="", color=INK, markerfacecolor="none", label="published"),
    ]
    ax.legend(handles=handles, ncols=3, **ABOVE)
    return ax


def setting(row: Mapping) -> str:
    """Architecture and K or threshold of a row: `TopK, K = 64`, `JumpReLU, θ = 0.5`, `JumpReLU, θ = 0.5 rms`."""
    theta = settings.axes(row).get("threshold")
    sparsity = f"K = {row['k']}" if theta is None else f"θ = {theta if isinstance(theta, str) else f'{theta:g}'}"
    return f"{row['arch']}, {sparsity}"


def _more(df: pd.DataFrame) -> list[str]:
    """What else a row's setting has: `, improved but lr = 0.001, epochs 3`; axes only where they vary."""
    rows, found = df.to_dict("records"), []
    also = settings.unusual(rows)
    for values in map(settings.axes, rows):
        recipe = [] if values.get("recipe", "published") == "published" else [values["recipe"]]
        more = [f"{name.replace('_', ' ')} {values[name]}" for name in also if values.get(name) is not None]
        found.append("".join(f", {part}" for part in (*recipe, *more)))
    return found


def recipes_differ(df: pd.DataFrame) -> bool:
    """Whether there are rows of the published recipe and of another one."""
    return "recipe" in df and "published" in set(df["recipe"]) and df["recipe"].nunique() > 1


def figure(ax: Axes, *, alt: str, caption: str, above: str = "", name: str = "") -> Markdown:
    """An Axes as a figure of a page: inline SVG in the page's text colour, with a text alternative.

    `above` is HTML placed above the picture, such as its interactive form; `name` is what a chooser calls it. Markers
    keep their links and get their names as tooltips; no script is needed.
    """
    with plt.rc_context(STYLE):
        buffer = io.StringIO()
        ax.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(ax.figure)  # or the notebook shows it again
    svg = page_svg(buffer.getvalue(), INK, alt)
    return from_template("figure.html", above=above, svg=svg, caption=caption, title=name)


def by_origin(df: pd.DataFrame, draw: Callable[[pd.DataFrame], Markdown]) -> Markdown:
    """What `draw` makes of the rows; of several origins, one such figure for each, below its name."""
    parts = selection.by_origin(df)
    if len(parts) == 1:
        return draw(df)
    return from_template("origins.html", parts=[(name.capitalize(), draw(rows).html) for name, rows in parts.items()])


def side_by_side(panels: Iterable[tuple[Axes, str] | tuple[Axes, str, str]]) -> Markdown:
    """Axes with caption, and a text alternative if that is another one, in two columns if there is room.

    They have one legend if theirs are the same.
    """
    panels = list(panels)
    legends = [_looks(ax) for ax, *_ in panels]
    shared = legends[0] if len(panels) > 1 and all(looks == legends[0] for looks in legends) else []
    title = panels[0][0].get_legend().get_title().get_text() if shared else ""
    figures = []
    for ax, caption, *alt in panels:
        if shared:
            ax.get_legend().remove()
        ax.figure.set_size_inches(PANEL)
        figures.append(figure(ax, alt=alt[0] if alt else caption, caption=caption).html)
    return from_template("panels.html", looks=shared, title=title, figures=figures)


def _looks(ax: Axes) -> list[Look]:
    """The entries of an Axes' legend."""
    if ax.get_legend() is None:
        return []
    dashes = {"-": "none", "--": "6 3", ":": "1.6 2.4", "-.": "6 2.4 1.6 2.4"}
    looks = []
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
        hollow = line.get_markerfacecolor() == "none"
        style = {"line": dashes[line.get_linestyle()], "hollow": hollow, "opacity": line.get_alpha() or 1}
        looks.append(Look(label, line.get_color(), line.get_marker(), **style))
    return looks


def _size(expansion: float) -> float:
    return 26.0 * np.sqrt(expansion)


def _as_runs(df: pd.DataFrame) -> pd.DataFrame:
    """Frames of a single run don't name it: add the columns that distinguish runs."""
    return df if "arch" in df else df.assign(run_id="", name="", arch="")


def _in_order(df: pd.DataFrame) -> pd.DataFrame:
    by_arch = df.assign(order=df["arch"].map(list(PALETTE).index))
    return by_arch.sort_values(["order", "k", "threshold", "expansion"])


def _arch_handles(df: pd.DataFrame) -> list[Line2D]:
    shown = [arch for arch in PALETTE if arch in set(df["arch"])]
    return [Line2D([], [], color=PALETTE[arch], marker=MARKERS[arch], linestyle="", label=arch) for arch in shown]


def _frontier_legend(df: pd.DataFrame, ax: Axes, with_pca: bool) -> None:
    dot = {"color": INK, "marker": "o", "linestyle": "", "alpha": 0.5}
    sizes = sorted(df["expansion"].unique())
    sizes = [Line2D([], [], markersize=np.sqrt(_size(size)), label=f"{size}x", **dot) for size in sizes]
    rest = [Line2D([], [], color=INK, alpha=0.45, linewidth=1.2, label="Pareto set")]
    if len(candidates(df)) < len(df):
        label = f"dense, ≥ {DENSE_SHARE_PCT:g}% fire"
        rest.append(Line2D([], [], color=INK, marker="^", markerfacecolor="none", linestyle="", label=label))
    if with_pca:
        rest.append(Line2D([], [], color=INK, alpha=0.45, linewidth=1.2, linestyle="--", label="PCA"))
    if recipes_differ(df):
        rest.append(Line2D([], [], color=INK, marker="o", alpha=PALE / 2, linestyle="", label="published"))
    ax.legend(handles=[*_arch_handles(df), *sizes, *rest], ncols=4, **ABOVE)
