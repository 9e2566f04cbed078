"""Plots draw what the table holds; figures carry a text, links and the page's ink."""

import json
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from saegrid.analysis import published_sweep, selection
from saegrid.analysis.numbers import number
from saegrid.config import settings
from saegrid.experiment import finished_run, results
from saegrid.report.figures import captions, charts, plots


@pytest.fixture
def df(fake_grid, fake_runs):
    yield results.tidy(fake_grid, fake_runs / "runs")
    plt.close("all")


@pytest.fixture
def long(df, fake_runs):
    return {
        "learning_curves": finished_run.load_curves(df, fake_runs / "runs"),
        "firing_histogram": finished_run.load_latents(df, fake_runs / "runs"),
        "error_by_position": finished_run.load_positions(df, fake_runs / "runs"),
        **dict.fromkeys(["frontier", "heatmap", "dead_latents"], df),
        "against_published": pd.concat([df, published_sweep.rows()], ignore_index=True),
    }


PLOTS = [
    *("frontier", "heatmap", "dead_latents", "learning_curves"),
    *("firing_histogram", "error_by_position", "against_published"),
]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_an_axes_or_make_one_and_leave_the_table_alone(long, name):
    plot, frame = getattr(plots, name), long[name]
    before = frame.copy()
    _, ax = plt.subplots()
    assert plot(frame, ax=ax) is ax
    assert ax.get_xlabel()
    assert plot(frame) is not ax
    pd.testing.assert_frame_equal(frame, before)


def test_the_frontier_has_a_mark_a_run_at_its_numbers(df):
    ax = plots.frontier(df)
    marks = {tuple(mark.get_offsets()[0]) for mark in ax.collections}
    assert marks == set(zip(df["l0"], df["delta_loss"], strict=True))
    (line,) = ax.lines
    front = selection.pareto(selection.candidates(df), "delta_loss")
    assert list(line.get_ydata()) == list(front["delta_loss"])
    dense = set(df["run_id"]) - set(selection.candidates(df)["run_id"])
    assert dense and not dense & set(front["run_id"])
    hollow = [mark for mark in ax.collections if len(mark.get_facecolor()) == 0]
    assert {mark.get_offsets()[0][0] for mark in hollow} == set(df[df["run_id"].isin(dense)]["l0"])


def test_the_caption_names_runs_that_a_logarithmic_axis_can_not_show(df):
    assert "Not drawn" not in captions.frontier_caption(df, "kl")
    df.loc[df.index[:2], "l0"] = 0.0
    assert "Not drawn: 2 runs with an L0 of 0." in captions.frontier_caption(df, "kl")
    assert len(plots.frontier(df, y="kl").collections) == len(df) - 2
    (rows,) = (data for data in charts.frontier(df, "kl").to_dict()["datasets"].values() if "page" in data[0])
    assert len(rows) == len(df) - 2


def test_pareto_by_hand():
    df = pd.DataFrame(
        {"l0": [1, 2, 3, 4, 2], "kl": [5.0, 3.0, 4.0, 1.0, 2.0], "frac_rec_pct": [5.0, 3.0, 4.0, 9.0, 2.0]}
    )
    assert list(selection.pareto(df, "kl")["kl"]) == [5.0, 2.0, 1.0]
    assert list(selection.pareto(df, "frac_rec_pct")["frac_rec_pct"]) == [5.0, 9.0]


def test_the_heat_map_writes_every_value(df):
    ax = plots.heatmap(df, metric="dead_pct")
    written = {text.get_text() for text in ax.texts}
    assert {f"{value:.1f}" for value in df["dead_pct"]} <= written
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4x", "8x", "16x"]


def test_settings_that_differ_in_more_than_the_axes_are_not_averaged(df):
    """One more learning rate, one more number of epochs, and a threshold in another unit."""
    top, jump = df[(df["arch"] == "TopK") & (df["k"] == 64)], df[df["arch"] == "JumpReLU"].iloc[:1]
    changed = [top.assign(lr=1e-3), top.assign(epochs=3), jump.assign(threshold_unit="rms")]
    both = pd.concat([df, *(rows.assign(dead_pct=99.0) for rows in changed)], ignore_index=True)
    ax = plots.heatmap(both, metric="dead_pct")
    assert sum(text.get_text() == "99.0" for text in ax.texts) == 7
    rows = {label.get_text() for label in ax.get_yticklabels()}
    assert {"TopK, K = 64, epochs 10", "TopK, K = 64, epochs 3", "JumpReLU, θ = 0.1 rms, epochs 10"} <= rows
    assert "TopK, K = 64, published but lr = 0.001, epochs 10" in rows
    labels = plots.dead_latents(both).get_legend_handles_labels()[1]
    assert "TopK, 4x, epochs 3" in labels and "TopK, 4x, published but lr = 0.001, epochs 10" in labels


def test_the_histogram_leaves_out_the_dead():
    df = pd.DataFrame({"latent": range(4), "fired": [0, 0, 10, 10]})
    ax = plots.firing_histogram(df, n_rows=100)
    (bars,) = ax.patches
    assert sum(bars.get_data().values) == pytest.approx(50.0)


def test_a_single_run_needs_no_columns_that_tell_runs_apart(long):
    for name in ("learning_curves", "error_by_position"):
        frame = long[name]
        one = frame[frame["run_id"] == frame["run_id"].iloc[0]]
        ax = getattr(plots, name)(one.drop(columns=["run_id", "name", "arch", "expansion", "k", "threshold", "seed"]))
        assert len(ax.lines) == 2


def test_a_figure_is_well_formed_with_text_links_and_the_pages_ink(df):
    text = plots.figure(plots.frontier(df, links="runs/"), alt="Loss & L0", caption="A < B")
    html = text.removeprefix("```{=html}\n").rstrip("`\n")
    root = ElementTree.fromstring(html)
    svg = root.find("{http://www.w3.org/2000/svg}svg")
    assert svg.get("aria-label") == "Loss & L0"
    assert root.find("figcaption").text == "A < B"
    links = re.findall(r'<a [^>]*href="([^"]+)"', html)
    assert sorted(set(links)) == sorted(f"runs/{run_id}.html" for run_id in df["run_id"])
    assert html.count("<title>") == len(df)
    assert plots.INK not in html
    assert "currentColor" in html
    assert not re.search(r'(src|href)="https?:', html)
    assert not plt.get_fignums()


def test_figures_stand_side_by_side_in_one_block(df):
    html = plots.side_by_side((plots.heatmap(df, metric=m), m) for m in ("fvu", "dead_pct"))
    html = html.removeprefix("```{=html}\n").rstrip("`\n")
    root = ElementTree.fromstring(html)
    assert [figure.find("figcaption").text for figure in root.findall("figure")] == ["fvu", "dead_pct"]


def test_like_figures_share_one_legend(df):
    axes = [plots.dead_latents(df) for _ in range(2)]
    html = plots.side_by_side((ax, "c") for ax in axes)
    labels = axes[0].get_legend_handles_labels()[1]
    assert len(labels) > 1 and all(html.count(f"> {label}<") == 1 for label in labels)
    mixed = plots.side_by_side([(plots.dead_latents(df), "c"), (plots.dead_latents(df[df["arch"] == "TopK"]), "c")])
    assert 'class="legend"' in html and 'class="legend"' not in mixed


def test_two_figures_share_no_id_and_the_same_table_gives_the_same_bytes(df):
    first, again = (plots.figure(plots.frontier(df), alt="a", caption="c") for _ in range(2))
    other = plots.figure(plots.frontier(df, y="fvu"), alt="a", caption="c")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first == again


def test_texts_for_those_who_do_not_see_the_figure(df):
    alt, caption = captions.frontier_alt(df, "delta_loss"), captions.frontier_caption(df, "delta_loss")
    front = selection.pareto(selection.candidates(df), "delta_loss")
    assert all(settings.label(row) in alt for row in front.to_dict("records"))
    for arch, count in front["arch"].value_counts().items():
        assert f"{count} {arch}" in caption
    assert f"Hollow: {len(df) - len(selection.candidates(df))} run" in caption
    worst = df.loc[df["dead_pct"].idxmax()]
    assert f"{worst['dead_pct']:.1f} for {settings.label(worst)}" in captions.heatmap_alt(df, "dead_pct")


def test_the_interactive_frontier_has_the_same_marks_line_and_links(df):
    figure = charts.frontier_figure(df, "delta_loss")
    spec = json.loads(re.search(r'<script type="application/json">(.*?)</script>', figure, re.DOTALL)[1])
    (marks,) = [rows for rows in spec["datasets"].values() if "page" in rows[0]]
    (line,) = [rows for rows in spec["datasets"].values() if "page" not in rows[0]]
    assert {(row["name"], row["l0"], row["delta_loss"]) for row in marks} == set(
        zip(df["name"], df["l0"], df["delta_loss"], strict=True)
    )
    assert {row["page"] for row in marks} == {f"runs/{run_id}.html" for run_id in df["run_id"]}
    front = selection.pareto(selection.candidates(df), "delta_loss")
    assert [row["delta_loss"] for row in line] == list(front["delta_loss"])
    assert {row["name"] for row in marks if row["dense"]} == set(df["name"]) - set(selection.candidates(df)["name"])
    assert re.search(r"<svg [^>]*aria-label", figure)  # the static picture is there, too
    assert "</script><b>" not in charts.frontier_figure(df.assign(name="</script><b>"), "delta_loss")


def test_sentences_for_the_other_figures(long, df):
    text = captions.curves_text(long["learning_curves"])
    ends = long["learning_curves"].query("epoch == 10")["val_mse"]
    assert number(ends.min(), "val_mse") in text and number(ends.max(), "val_mse") in text
    assert f"{len(df)} of {len(df)} runs still fell by more than 1%" in text  # by 5%, as they are made
    latents = long["firing_histogram"]
    alive = latents[(latents["fired"] > 0) & (latents["arch"] == "TopK")]
    assert f"{100 * (alive['fired'] / alive['n_val_rows']).median():.2g}% in TopK" in captions.firing_text(latents)
    by_k = df[df["k"].notna()]
    assert f"{by_k['dead_pct'].max():.1f}%" in captions.dead_text(df)
    assert "no run with a K" in captions.dead_text(df[df["k"].isna()])
