"""Seed stability and controls of a real small grid, from its runs to its tables, pages and latents."""

import math

import pandas as pd
import pytest
import torch
from tiny import finished, save_dataset, save_model

from saegrid.analysis import findings, selection
from saegrid.config.grid import Grid
from saegrid.core.metrics import SINK_RATIO
from saegrid.core.stability import activity, matched
from saegrid.data.collect import open_store
from saegrid.errors import ResultsError
from saegrid.experiment import latents, results, stability
from saegrid.experiment.mend import mend
from saegrid.formats.run_folder import load_folder
from saegrid.report.pages import latents_page, trust_section


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project folder with a finished grid: three seeds, two seeds under a frozen decoder, one seed elsewhere."""
    root = tmp_path_factory.mktemp("seeds")
    save_model(root / "model")
    save_dataset(root / "data")
    constants = {"model": str(root / "model"), "dataset": str(root / "data"), "layer": 1, "max_tokens": 48}
    constants |= {"train_tokens": 400, "val_tokens": 150, "eval_prompts": 2, "batch_size": 64, "epochs": 2, "k": 4}
    constants |= {"kernel": "reference", "recipe": "improved", "expansion": 2}
    constants |= {"runs_dir": str(root / "runs"), "store_dir": str(root / "stores")}
    axes = [
        {"arch": ["TopK"], "seed": [2, 0, 1]},
        {"arch": ["TopK"], "seed": [0, 1], "freeze": ["decoder"]},
        {"arch": ["BatchTopK"], "seed": [0]},
    ]
    grid = Grid(name="seeds", title="Seeds", results_dir="results", constants=constants, axes=axes)
    for config in grid.runs():
        (finished(config).folder / "train.ipynb").write_text("{}")
    stability.make(grid, grid.runs()[0].store_id, root)
    results.make(grid, root)
    return grid, root


def test_settings_are_runs_that_differ_in_their_seed_alone(made):
    grid, _ = made
    free, frozen = grid.seeds()
    assert [run.seed for run in free] == [0, 1, 2] and {run.freeze for run in free} == {"none"}
    assert [(run.seed, run.freeze) for run in frozen] == [(0, "decoder"), (1, "decoder")]
    assert grid.other_seeds(free[1].run_id) == [free[0].run_id, free[2].run_id]
    assert grid.other_seeds(grid.runs()[-1].run_id) == []


def test_a_setting_whose_latents_are_all_dead_has_no_row(made, capsys):
    grid, root = made
    constants = {name: value for name, value in grid.constants.items() if name != "k"} | {"recipe": "published"}
    axes = [{"arch": ["JumpReLU"], "threshold": [1e6], "seed": [0, 1]}]
    dead = Grid(name="dead", title="Dead", results_dir="dead", constants=constants, axes=axes)
    for config in dead.runs():
        finished(config)
    stability.make(dead, dead.runs()[0].store_id, root)
    assert "no latent that fires" in capsys.readouterr().out
    results.make(dead, root)
    assert list(results.read_tidy(root / "dead")["dead_pct"]) == [100.0, 100.0]
    assert results.read_stability(root / "dead").empty


def test_the_table_is_the_mean_over_pairs(made):
    grid, root = made
    table = results.read_stability(root / "results")
    assert list(table["seeds"]) == [3, 2] and list(table["pairs"]) == [3, 1]
    free, store = grid.seeds()[0], open_store(grid.runs()[0])
    rows = store.rows("val")
    rows = rows[rows.norm(dim=1) <= SINK_RATIO * rows.norm(dim=1).median()]
    saes = [load_folder(root / "runs" / run.run_id) for run in free]
    given = stability.given(free[0], saes[0])
    acts = [activity(sae, [rows]) for sae in saes]
    found = [matched(saes[i], saes[j], acts[i], acts[j], given) for i, j in ((0, 1), (0, 2), (1, 2))]
    for name in ("stable_pct", "stable_energy_pct", "matched_cosine", "random_cosine"):
        assert table[name][0] == pytest.approx(sum(getattr(pair, name) for pair in found) / 3)
    low, high = table["matched_cosine_low"][0], table["matched_cosine_high"][0]
    assert low < table["matched_cosine"][0] < high
    assert table.loc[1, [name for name in results.STABILITY if name.endswith(("_low", "_high"))]].isna().all()
    assert table["start_cosine"][1] == pytest.approx(1) and -1 < table["start_cosine"][0] < 0.999


def test_latents_that_are_given_are_not_counted(made):
    """The two of the attention sinks, if there are any: every seed has them."""
    grid, root = made
    run = grid.seeds()[0][0]
    sae = load_folder(root / "runs" / run.run_id)
    sae.W_dec.data[0] = torch.ones(sae.d_in)
    assert stability.given(run, sae) == ()
    sae.W_dec.data[1] = -torch.ones(sae.d_in)
    assert stability.given(run, sae) == (0, 1)
    assert stability.given(run.model_copy(update={"sinks": "keep"}), sae) == ()


def test_pairs_are_compared_once_and_a_damaged_file_is_made_again(made, capsys):
    grid, root = made
    path = open_store(grid.runs()[0]).folder / results.PAIRS
    before = path.read_bytes()
    stability.make(grid, grid.runs()[0].store_id, root)
    assert path.read_bytes() == before
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ResultsError, match=r"stability\.json"):
        results.stability(grid, root)
    stability.make(grid, grid.runs()[0].store_id, root)
    assert "made again" in capsys.readouterr().out and path.read_bytes() == before
    path.write_text("{")
    assert any("stability.json" in line for line in mend(grid, root)) and not path.exists()
    stability.make(grid, grid.runs()[0].store_id, root)
    results.make(grid, root)


def test_the_interval_is_a_jackknife_over_seeds():
    """By hand: leaving out a seed of three leaves one pair: 3, 2, 1 around 2; error √(2/3 · 2), times t = 4.3027."""
    low, high = results.over_pairs({(0, 1): 1.0, (0, 2): 2.0, (1, 2): 3.0}, 3)
    assert (low, high) == pytest.approx((2 - 4.3027 * math.sqrt(4 / 3), 2 + 4.3027 * math.sqrt(4 / 3)), rel=1e-4)
    assert all(map(math.isnan, results.over_pairs({(0, 1): 1.0}, 2)))
    assert all(map(math.isnan, results.over_pairs({(0, 1): 0.0, (0, 2): 0.0, (1, 2): 0.0}, 3)))


def test_runs_have_their_settings_stability_and_no_other(made):
    _, root = made
    df, table = results.read_tidy(root / "results"), results.read_stability(root / "results")
    assert list(df["stable_pct"][:5]) == [table["stable_pct"][0]] * 3 + [table["stable_pct"][1]] * 2
    assert pd.isna(df["stable_pct"][5])


def test_controls_are_not_ranked_recommended_or_used_by_findings(made):
    _, root = made
    df = results.read_tidy(root / "results")
    df["delta_loss"] = df["delta_loss"].where(df["freeze"] == "none", -1.0)  # the controls would win
    assert selection.recommend(df)["freeze"] == "none" and set(selection.candidates(df)["freeze"]) == {"none"}
    published = df.assign(recipe="published")
    for with_them, without in zip(
        findings.all_findings(published), findings.all_findings(published[df["freeze"] == "none"]), strict=True
    ):
        assert (with_them.verdict, with_them.effect) == (without.verdict, without.effect)
    with pytest.raises(ResultsError, match="every run is a control"):
        selection.recommend(df[df["freeze"] != "none"])


def test_what_a_control_reaches_is_marked(made):
    _, root = made
    df = results.read_tidy(root / "results").assign(fvu_no_sink=0.2, dead_pct=[3, 2, 1, 2.5, 2.5, 9], delta_loss=0.5)
    df.loc[df["freeze"] == "decoder", "delta_loss"] = 0.7
    df["stable_pct"] = [1.0, 1, 1, 0, 0, math.nan]
    store = df["store_id"].iloc[0]
    baseline = pd.DataFrame([{"store_id": store, "components": 4, "delta_loss": 0.4, "fvu_no_sink": 0.3}])
    found = selection.beside_controls(df, baseline)
    assert list(found["control"]) == ["", "freeze = decoder", "PCA"] and list(found["seeds"]) == [3, 2, 1]
    assert found["dead_pct"].tolist()[:2] == [2.0, 2.5]
    assert "fvu_no_sink" in found["reached"][1] and "dead_pct" not in found["reached"][1]
    assert not {"delta_loss", "stable_pct"} & set(found["reached"][1])
    assert found["reached"][2] == ("delta_loss",)
    untrained = df["seed"].eq(0) & df["freeze"].eq("decoder")
    other = df.assign(freeze="none", model_init=["random" if n else "trained" for n in untrained], delta_loss=0.0)
    assert not {"delta_loss", "loss_recovered_mean"} & set(selection.beside_controls(other)["reached"][1])
    assert "no loss to lose" in trust_section.controls(other)
    said = trust_section.controls(df, baseline)
    assert "0.200 ≈" in said and "0.400 ≈" in said and "these measures say nothing" in said
    assert "FVU without sinks (freeze = decoder)" in said and "Delta loss (PCA)" in said
    assert "No control was run" in trust_section.controls(df[df["freeze"] == "none"])


def test_the_page_says_what_it_means_with_the_random_level(made):
    _, root = made
    table = results.read_stability(root / "results")
    said = trust_section.stability(table)
    assert f"{table['random_cosine'][0]:.3f}" in said and "TopK_exp2x_k4_improved_frozen-decoder" in said
    table["stable_pct"] = 0.1
    assert "do not read a single latent" in trust_section.stability(table)
    grown = pd.concat([table.iloc[:1], table.iloc[:1].assign(n_train_rows=9000, stable_pct=40.0)], ignore_index=True)
    assert "<svg" in trust_section.stability(grown) and "do not read" not in trust_section.stability(grown)
    assert "one seed" in trust_section.stability(table.iloc[:0])
    best = selection.recommend(results.read_tidy(root / "results").iloc[:5])
    short = trust_section.in_short(best, results.read_tidy(root / "results"), table)
    assert "found again with another seed" in short and "freeze = decoder" in short
    alone = results.read_tidy(root / "results").query("freeze == 'none'")
    pca = pd.DataFrame([{"components": 4, "store_id": best["store_id"], "kl": 0.25, "delta_loss": 0.5}])
    assert trust_section.in_short(best, alone, table, pca).endswith("as many components as K: KL 0.250 nats/token.")


def test_the_recipes_page_ranks_settings_by_stability_beside_their_fvu(made):
    _, root = made
    table, df = results.read_stability(root / "results"), results.read_tidy(root / "results")
    short, body = trust_section.replicated(root / "results")
    first = table["stable_pct"].idxmax()
    frozen = "TopK 2x, K = 4, improved, freeze = decoder"
    assert f"{table['stable_pct'][first]:.2f}%" in short and frozen in short
    fvu = df.loc[df["freeze"] == "decoder", "fvu_no_sink"].mean()
    row = next(line for line in body.splitlines() if frozen in line)
    assert f">{fvu:.3f}" in row and (body.index(frozen) < body.index("improved<")) == (first == 1)


def test_latents_say_with_how_many_seeds_they_are_found_again(made):
    grid, root = made
    run = grid.seeds()[0][0]
    others = [root / "runs" / name for name in grid.other_seeds(run.run_id)]
    data = latents.describe(root / "runs" / run.run_id, root / "stores", size=8, other_seeds=others)
    store = open_store(run)
    saes = [load_folder(folder) for folder in (root / "runs" / run.run_id, *others)]
    given, rows = stability.given(run, saes[0]), list(stability.ordinary_rows(store))
    acts = [activity(sae, rows) for sae in saes]
    pairs = [matched(saes[0], saes[n], acts[0], acts[n], given) for n in range(1, len(saes))]
    for entry in data["latents"]:
        again = sum(int(p.stable[p.latents[:, 0] == entry["latent"]].sum()) for p in pairs)
        assert entry["found_again"] == again
    first = data["latents"][-1] | {"found_again": 1, "match_cosine": 0.9}
    assert "found again with 1 of 2 other seeds (cosine with its match 0.90)" in latents_page.card(first, data)
    page = latents_page.browser(data | {"latents": [first]}, "chunks/")
    assert "✓ 1 of 2" in page and "Found again" in page
    alone = latents.describe(root / "runs" / run.run_id, root / "stores", size=8)
    assert "Found again" not in latents_page.browser(alone, "chunks/")
    assert "found again" not in latents_page.card(alone["latents"][0], alone)
