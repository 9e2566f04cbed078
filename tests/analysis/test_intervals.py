"""Intervals against computations by hand and against the textbook's formulas."""

import math

import numpy as np
import pandas as pd
import pytest

from saegrid.analysis import intervals
from saegrid.errors import ResultsError

T_95 = {1: 12.7062, 2: 4.3027, 5: 2.5706, 16: 2.1199}  # the table in any textbook


def prompts_of(run_id, deltas, templates):
    n = len(deltas)
    frame = pd.DataFrame({"run_id": run_id, "prompt": range(n), "template": templates, "n_tokens": 10})
    return frame.assign(ce_clean_sum=20.0, ce_spliced_sum=20.0 + 10 * np.asarray(deltas))


def runs_of(*run_ids):
    return pd.DataFrame({"run_id": run_ids, "seed": range(len(run_ids))})


@pytest.mark.parametrize("df", T_95)
def test_quantiles_are_those_of_the_tables(df):
    found = intervals.t_interval(1.0, 0.5, df + 0.9)  # rounded down
    assert ((found.high - 1) / 0.5, (1 - found.low) / 0.5) == pytest.approx((T_95[df], T_95[df]), abs=1e-4)
    assert intervals.t_interval(T_95[df], 1.0, df).p == pytest.approx(0.05, abs=1e-5)


def test_one_run_by_hand():
    """Templates of 2, 1 and 1 prompts: sums 4, 5, 9 over 20, 10, 10 tokens; mean 0.45; parts -5, 0.5, 4.5 over 40."""
    found = intervals.measured(prompts_of("a", [0.1, 0.3, 0.5, 0.9], [0, 0, 1, 2]))
    assert list(found.parts["a"]) == pytest.approx([-5 / 40, 0.5 / 40, 4.5 / 40])
    error = math.sqrt(3 / 2 * (25 + 0.25 + 20.25)) / 40
    value, low, high, p = intervals.contrast(found, {"a": 1.0})
    assert value == pytest.approx(0.45)
    assert (low, high) == pytest.approx((0.45 - T_95[2] * error, 0.45 + T_95[2] * error), abs=1e-5)
    t = 0.45 / error
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # Student's t with 2 degrees of freedom has this tail


def test_equal_templates_give_the_t_interval_of_their_means():
    deltas = np.random.default_rng(0).normal(0.3, 0.1, 17)
    found = intervals.contrast(intervals.measured(prompts_of("a", deltas, range(17))), {"a": 1.0})
    half = T_95[16] * deltas.std(ddof=1) / math.sqrt(17)
    assert (found.low, found.high) == (pytest.approx(deltas.mean() - half), pytest.approx(deltas.mean() + half))


def test_pairing_takes_out_what_the_runs_share():
    noise = np.random.default_rng(0).normal(1.0, 0.5, 40)
    both = pd.concat([prompts_of("a", noise + 0.1, range(40)), prompts_of("b", noise, range(40))])
    found = intervals.measured(both)
    value, low, high, p = intervals.contrast(found, {"a": 1.0, "b": -1.0})
    assert [value, low, high] == pytest.approx([0.1] * 3) and p < 1e-9
    _, low, high, _ = intervals.contrast(found, {"a": 1.0})
    assert 0.2 < high - low < 0.5  # about 2 · 2.02 · 0.5 / √40


def test_seeds_and_templates_by_hand():
    """Two seeds at 0.2 and 0.4 above the base, on 6 templates that move both by ±0.06."""
    wave = 0.06 * np.array([1, -1, 1, -1, 1, -1])
    runs = [prompts_of(name, level + wave, range(6)) for name, level in (("a0", 0.2), ("a1", 0.4))]
    base = [prompts_of(name, np.zeros(6), range(6)) for name in ("b0", "b1")]
    found = intervals.measured(pd.concat([*runs, *base]))
    value, low, high, _ = intervals.difference(found, runs_of("a0", "a1"), runs_of("b0", "b1"))
    between, templates = 0.02 / 2, 6 / 5 * 6 * (0.06 / 6) ** 2
    df = (between + templates) ** 2 / (between**2 / 1 + templates**2 / 5)
    assert int(df) == 1 and value == pytest.approx(0.3)
    assert high - value == value - low == pytest.approx(T_95[1] * math.sqrt(between + templates), rel=1e-4)
    assert intervals.over_seeds(found, ["a0", "a1"]) == pytest.approx((value, low, high, 0), abs=1)
    with pytest.raises(ResultsError, match="only equal seeds can be paired"):
        intervals.difference(found, runs_of("a0"), runs_of("b0", "b1"))


def test_a_ratio_of_means_that_are_proportional_is_sure():
    noise = np.random.default_rng(1).normal(1.0, 0.2, 12)
    runs = [prompts_of(f"a{seed}", 0.25 * (noise + seed), range(12)) for seed in (0, 1)]
    base = [prompts_of(f"b{seed}", noise + seed, range(12)) for seed in (0, 1)]
    found = intervals.measured(pd.concat([*runs, *base]))
    assert intervals.ratio(found, runs_of("a0", "a1"), runs_of("b0", "b1"))[:3] == pytest.approx((0.25,) * 3)
    other = intervals.ratio(found, runs_of("b0", "b1"), runs_of("a1", "a0"))
    assert other.value == pytest.approx(4.0) and other.low < 4 < other.high


def test_fvu_and_kl_are_quotients_of_sums():
    errors, norms = np.array([1.0, 2.0, 6.0]), np.array([10.0, 4.0, 8.0])
    frame = prompts_of("a", [0.0] * 3, range(3)).assign(sq_error=errors, sq_norm_centred=norms, kl_sum=errors)
    assert intervals.measured(frame, "fvu_eval").value["a"] == pytest.approx(9 / 22)
    assert intervals.measured(frame, "kl").value["a"] == pytest.approx(9 / 30)
    with pytest.raises(ResultsError, match="lacks kl_sum, of which kl is made"):
        intervals.measured(frame.drop(columns="kl_sum"), "kl")


def test_prompts_without_a_template_stand_for_themselves():
    frame = prompts_of("a", [0.1, 0.9], [0, 0])
    one = intervals.contrast(intervals.measured(frame), {"a": 1.0})
    assert one.value == pytest.approx(0.5) and all(math.isnan(value) for value in one[1:])
    assert len(intervals.measured(frame.assign(template=np.nan)).parts) == 2


def test_runs_scored_on_different_prompts_are_not_compared():
    other = prompts_of("b", [0.1, 0.2], [0, 1]).assign(prompt=[0, 2])
    with pytest.raises(ResultsError, match="scored on different prompts"):
        intervals.measured(pd.concat([prompts_of("a", [0.1, 0.2], [0, 1]), other]))


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last is raised to the third."""
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.8]) == [1.0, 1.0] and intervals.holm([]) == []
