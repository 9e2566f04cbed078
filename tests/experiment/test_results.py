"""Tables: what is read, what is refused, what is written; and what the published table tells by arithmetic."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import reseal

from saegrid.analysis import published_sweep, selection
from saegrid.config.recipes import YOUNGER
from saegrid.config.run_config import make_config
from saegrid.errors import ConfigError, ResultsError
from saegrid.experiment import finished_run, pca_table, results
from saegrid.storage.checksums import SUMS, write_sealed, write_sums


def change(root, run, **changes):
    path = root / "runs" / run.run_id / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(path.parent)


def test_a_row_a_run_in_the_order_of_the_grid(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    assert list(df["run_id"]) == [run.run_id for run in fake_grid.runs()]
    assert list(df.columns) == [*finished_run.TIDY, "source"]
    assert set(df["source"]) == {"own"}
    assert df.loc[df["arch"] == "JumpReLU", "k"].isna().all()
    assert df.loc[df["arch"] != "JumpReLU", "threshold"].isna().all()


def test_runs_that_have_not_finished_can_be_left_out(fake_grid, fake_runs):
    ids = [run.run_id for run in fake_grid.runs()]
    for run_id in ids[:2]:
        (fake_runs / "runs" / run_id / "metrics.json").unlink()
    with pytest.raises(ResultsError, match=ids[0]):
        results.make(fake_grid, fake_runs)
    folder = results.make(fake_grid.finished(fake_runs), fake_runs)
    assert list(results.read_tidy(folder)["run_id"]) == ids[2:]
    with pytest.raises(ConfigError, match=f"none of its {len(ids)} runs has finished"):
        fake_grid.finished(fake_runs / "elsewhere")


def test_the_tidy_file_reads_back_as_it_was(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    folder = results.make(fake_grid, fake_runs)
    assert folder == fake_runs / "results/synthetic"
    pd.testing.assert_frame_equal(results.read_tidy(folder), df, check_exact=True)


def test_tables_from_before_there_were_recipes_are_read(fake_grid, fake_runs):
    folder = results.make(fake_grid, fake_runs)
    df = results.read_tidy(folder)
    pd.read_csv(folder / "results_tidy.csv").drop(columns=[*YOUNGER, *finished_run.YOUNGER_NUMBERS]).to_csv(
        folder / "results_tidy.csv", index=False
    )
    (folder / SUMS).unlink()
    none = dict.fromkeys(finished_run.YOUNGER_NUMBERS, math.nan)
    pd.testing.assert_frame_equal(results.read_tidy(folder)[df.columns], df.assign(**none), check_exact=True)
    path = fake_runs / "runs" / df["run_id"][0] / "metrics.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in row.items() if name not in YOUNGER}))
    reseal(path.parent)
    assert finished_run.load_run(path.parent) == row


def test_tables_from_before_there_was_a_kl_are_read(fake_grid, fake_runs, tmp_path):
    baseline = pd.DataFrame([{name: 1.0 for name in pca_table.COLUMNS} | {"store_id": "0a"}])
    folder = results.make(fake_grid, fake_runs)
    new = results.read_prompts(folder)
    assert new["kl_sum"].sum() > 0
    for name, table in (("results_prompts.csv", new), (pca_table.FILE, baseline)):
        table.drop(columns=["kl_sum", "kl"], errors="ignore").to_csv(tmp_path / name, index=False)
    write_sums(tmp_path, ["results_prompts.csv", pca_table.FILE])
    pd.testing.assert_frame_equal(results.read_prompts(tmp_path), new.assign(kl_sum=math.nan))
    pd.testing.assert_frame_equal(pca_table.read(tmp_path), baseline.assign(kl=math.nan))


@pytest.mark.parametrize(("arch", "younger"), [("BatchTopK", "encoder_tie"), ("JumpReLU", "theta_tie")])
def test_the_config_of_an_older_run_is_not_filled_from_todays_recipe(tmp_path, arch, younger):
    then = make_config(arch=arch, k=4, recipe="improved", lr=1e-3, **{younger: 0.0})
    recorded = {name: value for name, value in then.identity().items() if name != younger}
    write_sealed(tmp_path / "config.json", {"run_id": then.run_id} | recorded)
    assert finished_run.load_config(tmp_path, then.run_id) == then


def test_published_files_hold_the_published_columns(fake_grid, fake_runs):
    folder = results.make(fake_grid, fake_runs)
    short, full = pd.read_csv(folder / "results.csv"), pd.read_csv(folder / "results_full.csv")
    assert list(full.columns[: len(results.PUBLISHED)]) == results.PUBLISHED
    assert list(full.columns[: len(results.PUBLISHED)]) == list(
        published_sweep.rows().columns[: len(results.PUBLISHED)]
    )
    assert set(short["arch"]) == {"BatchTopK", "TopK"}
    assert {"val_mse", "nmse", "dead_pct"} < set(short.columns)
    assert "delta_loss" not in short
    assert set(finished_run.METRICS) < set(full.columns)
    assert len(full) == len(fake_grid.runs())
    assert "BatchTopK,4,220,," in (folder / "results_full.csv").read_text()


def test_a_missing_run_stops_the_tables_and_leaves_the_old_ones(fake_grid, fake_runs):
    folder = results.make(fake_grid, fake_runs)
    before = (folder / "results_full.csv").read_bytes()
    run = fake_grid.runs()[3]
    (fake_runs / "runs" / run.run_id / "metrics.json").unlink()
    with pytest.raises(ResultsError, match=f"{run.run_id}/metrics.json: .*run `snakemake` with its grid file"):
        results.make(fake_grid, fake_runs)
    assert (folder / "results_full.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta_loss": None}, "delta_loss = None: must be a finite number"),
        ({"fvu": math.nan}, "fvu = nan: must be a finite number"),
        ({"l0": "many"}, "l0 = 'many': must be a finite number"),
        ({"weights_sha256": ""}, "weights_sha256 = '': must be a SHA-256"),
        ({"run_id": "another"}, "belongs to the run 'another'"),
    ],
)
def test_bad_metrics_are_one_line_that_names_file_and_value(fake_grid, fake_runs, changes, message):
    run = fake_grid.runs()[0]
    change(fake_runs, run, **changes)
    with pytest.raises(ResultsError, match=message) as error:
        results.tidy(fake_grid, fake_runs / "runs")
    assert run.run_id in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_column_and_a_torn_file_are_told(fake_grid, fake_runs):
    run = fake_grid.runs()[0]
    path = fake_runs / "runs" / run.run_id / "metrics.json"
    row = json.loads(path.read_text())
    del row["nmse"]
    path.write_text(json.dumps(row))
    with pytest.raises(ResultsError, match="lacks nmse"):
        results.tidy(fake_grid, fake_runs / "runs")
    path.write_text('{"nmse": ')
    with pytest.raises(ResultsError, match="not JSON"):
        results.tidy(fake_grid, fake_runs / "runs")


def test_a_table_with_a_hole_is_refused(fake_grid, fake_runs):
    folder = results.make(fake_grid, fake_runs)
    df = pd.read_csv(folder / "results_tidy.csv")
    df.loc[2, "delta_loss"] = np.nan
    df.to_csv(folder / "results_tidy.csv", index=False)
    with pytest.raises(ResultsError, match=f"delta_loss is missing for {df.loc[2, 'run_id']}"):
        results.read_tidy(folder)
    with pytest.raises(ResultsError, match="`python -m saegrid tables GRID` makes it"):
        results.read_tidy(folder / "nothing.csv")


def test_long_form_files_carry_the_axes(fake_grid, fake_runs):
    df = results.tidy(fake_grid, fake_runs / "runs")
    for load, column in (
        (finished_run.load_prompts, "ce_spliced_sum"),
        (finished_run.load_latents, "fired"),
        (finished_run.load_positions, "sq_error"),
        (finished_run.load_curves, "val_mse"),
        (finished_run.load_timing, "train_seconds"),
    ):
        long = load(df, fake_runs / "runs")
        assert set(long["run_id"]) == set(df["run_id"])
        assert {"arch", "expansion", "k", "threshold", "seed", column} <= set(long.columns)
    (fake_runs / "runs" / df["run_id"][0] / "prompts.csv").unlink()
    with pytest.raises(ResultsError, match=r"prompts\.csv: no such file"):
        finished_run.load_prompts(df, fake_runs / "runs")


def test_published_rows_by_hand():
    df = published_sweep.rows()
    first = df.iloc[0]
    assert (first["name"], first["d_sae"], first["val_mse"]) == ("BatchTopK_exp4x_k220", 4 * 896, 0.0228)
    assert df["name"].iloc[-1] == "JumpReLU_exp8x_t0.1"
    assert len(df) == 9
    assert set(df["source"]) == {"published"}


def test_nmse_is_mse_over_one_pooled_variance():
    """Row 6 by hand: 0.0435 ± 0.00005 over 0.000915 ± 0.0000005. All nine bounds meet."""
    df = published_sweep.bounds()
    assert df.loc[5, "var_low"] == pytest.approx(0.04345 / 0.0009155)
    assert df.loc[5, "var_high"] == pytest.approx(0.04355 / 0.0009145)
    low, high = published_sweep.meet(df, "var")
    assert (round(low, 3), round(high, 3)) == (47.460, 47.584)


def test_frac_rec_is_clean_over_spliced():
    """Row 1 by hand: f = 92.9 ± 0.05 %, delta = 0.247 ± 0.0005. All nine bounds meet."""
    df = published_sweep.bounds()
    assert df.loc[0, "ce_low"] == pytest.approx(0.9285 * 0.2465 / (1 - 0.9285))
    assert df.loc[0, "ce_high"] == pytest.approx(0.9295 * 0.2475 / (1 - 0.9295))
    low, high = published_sweep.meet(df, "ce")
    assert (round(low, 3), round(high, 3)) == (3.201, 3.215)


def test_frac_rec_is_not_the_fraction_of_loss_recovered():
    df = published_sweep.bounds()
    low, high = published_sweep.meet(df, "usual")
    assert low > high
    assert df.loc[0, "usual_high"] <= 3.52
    assert df.loc[6, "usual_low"] >= 4.19


def test_dense_runs_are_no_candidates_unless_all_are():
    df = pd.DataFrame({"l0": [99.0, 100.0, 500.0], "d_sae": 1000})
    assert list(selection.candidates(df)["l0"]) == [99.0]
    assert list(selection.candidates(df.iloc[1:])["l0"]) == [100.0, 500.0]
    published = selection.candidates(published_sweep.rows())
    assert set(published["arch"]) == {"BatchTopK", "JumpReLU"} and (published["l0"].fillna(0) < 717).all()


def test_same_settings_stand_together_and_the_others_apart():
    published = published_sweep.rows()
    own = published.iloc[[1, 6]].assign(source="own", delta_loss=9.0)
    same, apart = selection.same_settings(own, published)
    assert list(same["source"]) == ["own", "published"] * 2
    assert list(same["name"]) == [name for name in own["name"] for _ in range(2)]
    assert len(apart) == len(published) - 2 and not set(apart["name"]) & set(own["name"])
    same, apart = selection.same_settings(own.assign(threshold_unit="rms"), published)
    assert set(same["arch"]) == {"BatchTopK"}  # a threshold in RMS is another setting
    assert len(selection.same_settings(own.assign(expansion=3), published)[0]) == 0
