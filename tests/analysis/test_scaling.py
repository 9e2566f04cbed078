import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from saegrid.analysis import scaling
from saegrid.config.grid import load_grid
from saegrid.report.pages import scaling_section, trust_section


@pytest.fixture
def runs():
    """Runs that follow power laws up to 5%."""
    points = [(d, k, n) for d in (1024, 2048, 4096) for k in (16, 32, 64) for n in (10_000, 40_000)]
    df = pd.DataFrame(points, columns=["d_sae", "k", "n_train_rows"])
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal((2, len(df))))
    df["fvu_no_sink"] = 8.0 * df["d_sae"] ** -0.25 * df["k"] ** -0.5 * noise[0]
    df["delta_loss"] = 50.0 * df["k"] ** -1.0 * df["n_train_rows"] ** -0.3 * noise[1]
    return df.assign(expansion=df["d_sae"] // 512, train_tokens=df["n_train_rows"]).astype({"k": "Int64"})


def test_exponents_are_those_that_the_runs_follow(runs):
    found = scaling.exponents(runs)
    rows = found.set_index(["measure", "size"])
    for measure, expected in (("fvu_no_sink", (-0.25, -0.5, 0.0)), ("delta_loss", (0.0, -1.0, -0.3))):
        for name, true in zip(scaling.SIZES, expected, strict=True):
            row = rows.loc[(measure, name)]
            assert row["slope"] == pytest.approx(true, abs=0.05)
            assert row["low"] - 0.02 <= true <= row["high"] + 0.02
    assert found["spread"].between(1.025, 1.075).all()
    slope = rows.loc[("fvu_no_sink", "k"), "slope"]
    assert f"{slope:+.2f}".replace("-", "−") in scaling_section.exponent_table(found, len(runs))
    text = scaling_section.verdict(found, scaling.steps(runs))
    assert f"- Twice the K multiplies FVU without sinks by {2**slope:.2f} [" in text


def test_sizes_that_do_not_vary_are_left_out(runs):
    assert "n_train_rows" not in set(scaling.exponents(runs[runs["n_train_rows"] == 10_000])["size"])
    assert scaling.exponents(runs.iloc[:5]).empty  # 3 parameters


def test_a_measure_that_is_not_above_0_has_no_power_law(runs):
    runs.loc[3, "delta_loss"] = -0.001
    assert set(scaling.exponents(runs)["measure"]) == set(scaling.steps(runs)["measure"]) == {"fvu_no_sink"}


def test_curves_have_a_line_a_value(runs):
    ax = scaling_section.curves(runs, y="delta_loss", x="k", by="d_sae")
    assert [line.get_label() for line in ax.lines] == ["1,024", "2,048", "4,096"]
    first = runs[runs["d_sae"] == 1024].groupby("k")["delta_loss"].mean()
    assert list(ax.lines[0].get_ydata()) == pytest.approx(list(first))
    plt.close(ax.figure)
    ax = scaling_section.curves(runs.assign(dead_pct=0.0), y="dead_pct", x="k", by="d_sae")
    assert (ax.get_yscale(), ax.get_xscale()) == ("linear", "log")
    plt.close(ax.figure)


def test_the_grid_moves_each_size():
    grid = load_grid("params/scaling.yaml").runs()
    assert len(grid) == 24 and {run.recipe for run in grid} == {"improved"}
    for name in ("expansion", "k", "train_tokens"):
        assert len({getattr(run, name) for run in grid}) > 1


def test_a_step_that_goes_the_other_way_is_told():
    """A gain of 0.9 from 2x to 4x and a loss of 1.2 from 4x to 8x, at two K: the power law says a small loss."""
    loss = {1152: 1.0, 2304: 0.9, 4608: 1.08}
    points = [(d, k, n, loss[d] * 64 / k) for d in loss for k in (32, 64) for n in (100, 400)]
    df = pd.DataFrame(points, columns=["d_sae", "k", "n_train_rows", "delta_loss"])
    df = df.assign(expansion=df["d_sae"] // 576, train_tokens=df["n_train_rows"])
    df["fvu_no_sink"] = 1000 / df["d_sae"] / df["k"]
    df["fvu_no_sink"] *= np.where(df["k"] == 32, 1.0, np.where(df["d_sae"] == 2304, 1.1, 1.0))
    steps = scaling.steps(df).set_index(["measure", "size", "small"])
    assert steps.loc[("delta_loss", "d_sae", 1152), ["factor", "low", "high", "pairs"]].tolist() == pytest.approx(
        [0.9, 0.9, 0.9, 4]
    )
    assert steps.loc[("delta_loss", "d_sae", 2304), "factor"] == pytest.approx(1.2)
    fvu = steps.loc[("fvu_no_sink", "d_sae", 1152)]  # 0.5, 0.5, 0.55, 0.55
    assert fvu["factor"] == pytest.approx(0.5 * 1.1**0.5)
    half = 3.1824 * np.log(1.1) / 3**0.5 / 2  # t of 3 degrees of freedom, standard deviation log(1.1) / sqrt(3)
    assert fvu["high"] / fvu["factor"] == pytest.approx(np.exp(half), rel=1e-3)
    text = scaling_section.verdict(scaling.exponents(df), scaling.steps(df))
    assert "1,152 to 2,304: delta loss times 0.90" in text and "2,304 to" not in text
    assert "latents 2,304 → 4,608" in scaling_section.step_table(scaling.steps(df))


def test_coherence_over_k_takes_settings_with_three_k():
    rows = [
        {"arch": arch, "expansion": 8, "recipe": "improved", "d_in": 576}
        | {"k": k, "seed": seed, "decoder_coherence": value + seed}
        for arch, ks in (("TopK", {16: 3.0, 32: 1.0, 64: 2.0}), ("BatchTopK", {16: 1.0, 32: 2.0}))
        for k, value in ks.items()
        for seed in (0, 1)
    ]
    df = pd.DataFrame([*rows, rows[0] | {"freeze": "decoder", "decoder_coherence": 99.0}])
    found = scaling.coherence_over_k(df)
    assert found.to_dict("list") == {
        "arch": ["TopK"] * 3, "label": ["TopK 8x, improved"] * 3,
        "k": [16, 32, 64], "decoder_coherence": [3.5, 1.5, 2.5],
    }  # fmt: skip
    both = pd.concat([df.assign(train_tokens=tokens) for tokens in (10_000, 40_000)])
    labels = [f"TopK 8x, improved, train tokens {tokens}" for tokens in (10_000, 40_000)]
    assert list(scaling.coherence_over_k(both)["label"].unique()) == labels
    text = trust_section.which_k(df)
    assert (
        "lowest at K = 32 for TopK 8x, improved" in text
        and "random decoder rows give 0.0332" in text
        and "<svg" in trust_section.coherence(df)
    )
    assert trust_section.which_k(df.drop(columns="decoder_coherence")) == ""
    assert "No setting" in trust_section.coherence(df[df["k"] > 16])
