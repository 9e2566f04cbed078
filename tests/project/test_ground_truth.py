"""The world with known directions, and the runs on its rows: as published files, through the usual training."""

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch

from saegrid.config.run_config import make_config
from saegrid.data.store import Store
from saegrid.experiment.run import Run
from saegrid.kernels import reference
from saegrid.report.pages import trust_section


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        import ground_truth

        patch.setattr(ground_truth, "VAL_ROWS", 300)
        patch.setattr(ground_truth, "EXPANSION", 4)
        yield ground_truth


def test_directions_fire_as_the_world_says(bench):
    world = bench.make_world(16, 48, l0=5.0)
    fires = bench.firing(world, 60_000, torch.Generator().manual_seed(0))
    often = fires.double().mean(0)
    assert torch.allclose(often, world.probability, atol=4 * (0.25 / 60_000) ** 0.5)
    assert often.sum().item() == pytest.approx(5, rel=0.01)
    assert (world.probability.diff() <= 0).all()
    children = (world.parent >= 0).nonzero()[:, 0]
    assert len(children) == 8
    for child in children.tolist():
        assert fires[:, child].any() and not (fires[:, child] & ~fires[:, world.parent[child]]).any()
    together = {True: [], False: []}
    for i, j in itertools.combinations(range(24), 2):
        both = (fires[:, i] & fires[:, j]).double().mean()
        together[bool(world.topic[i] == world.topic[j])].append((both / (often[i] * often[j])).item())
    assert min(together[True]) > 1.3 and max(together[False]) < 1.2


def test_rows_are_published_files_made_of_the_directions_that_the_truth_names(bench, tmp_path):
    world = bench.make_world(24, 40, l0=3.0)
    truth = bench.write_rows(tmp_path, world, 500, 400)
    rows = {split: torch.load(tmp_path / f"instruct_base_layer12_{split}.pt") for split in ("train", "val")}
    assert {split: (tuple(x.shape), x.dtype) for split, x in rows.items()} == {
        "train": ((500, 24), torch.float16),
        "val": ((400, 24), torch.float16),
    }
    assert not torch.equal(rows["train"][:400], rows["val"])
    x = rows["val"].float() / bench.UNIT
    is_sink = x.norm(dim=1) > 10 * x.norm(dim=1).median()
    assert 0 < is_sink.sum() < 10
    for row, fires in zip(x[~is_sink][:50], truth[~is_sink][:50], strict=True):
        left = row - world.offset
        if fires.any():
            basis = world.directions[fires].T
            left = left - basis @ torch.linalg.lstsq(basis, left[:, None]).solution[:, 0]
        assert left.norm() < 3 * bench.NOISE


def test_a_setting_is_trained_and_judged_and_the_usual_evaluation_takes_the_rows(bench, tmp_path):
    course = bench.prepare(tmp_path, 600, bench.make_world(16, 40, l0=3.0))
    setting = {"recipe": "improved", "arch": "TopK", "freeze": "none", "rows": 600, "epochs": 1, "k": 3}
    found = bench.measured(setting, 2, course)
    assert found["seed"].tolist() == [0, 1] and found["l0_no_sink"].tolist() == pytest.approx([3, 3], abs=0.1)
    assert found["stable_pct"].nunique() == 1 and found["true_l0"][0] == pytest.approx(3, rel=0.15)
    run = Run(make_config(**course.places, recipe="improved", arch="TopK", k=3, expansion=4, epochs=1, threads=1))
    sae = run.train()
    row = run.evaluate()
    run.close()
    assert row["d_in"] == 16 and row["n_val_rows"] == 300 and row["kl"] >= 0
    assert row["decoder_coherence"] == pytest.approx(found["decoder_coherence"][0], rel=1e-4)
    x = Store(run.store.folder).rows("val")
    keep = x.norm(dim=1) <= 10 * x.norm(dim=1).median()
    again = bench.recovered(sae, course.directions, [(x[keep], course.truth[keep])], reference)
    assert found[["mcc", "f1", "uniqueness"]].iloc[0].tolist() == pytest.approx(list(again), rel=1e-4)


def test_the_plan_has_every_recipe_architecture_and_control(bench):
    plan = pd.DataFrame([setting | {"seeds": seeds} for setting, seeds in bench.plan({100: (10, 3), 200: (5, 2)})])
    assert plan[plan["epochs"] == bench.LONG]["arch"].tolist() == ["TopK", "BatchTopK"]
    plan = plan[plan["epochs"] < bench.LONG]
    sweep = plan[plan["seeds"] == 1]
    assert sweep["k"].tolist() == [k for k in bench.KS if k != 12] and set(sweep["rows"]) == {200}
    rest = plan[plan["seeds"] > 1]
    assert rest.groupby("rows")["seeds"].unique().map(list).to_dict() == {100: [3], 200: [2]}
    assert len(rest) == 2 * (3 + 4 + 2) and (rest["freeze"] == "decoder").sum() == 4
    assert not plan.duplicated(bench.SETTING).any()


def test_the_section_names_the_best_setting_chance_and_where_coherence_is_lowest(tmp_path):
    rows = []
    for n, freeze, k in [(100, "none", 12), (100, "decoder", 12), (200, "none", 12), (200, "none", 48)]:
        mcc = {"decoder": 0.3}.get(freeze, 0.5 + n / 1000 - k / 500)
        told = {"recipe": "improved", "arch": "BatchTopK", "freeze": freeze, "rows": n, "epochs": 5, "k": k, "seed": 0}
        told |= {"true_l0": 12.1, "decoder_coherence": 0.1 / k, "mcc": mcc, "f1": mcc / 2, "uniqueness": 0.6}
        rows.append(told | {"stable_pct": 20.0, "matched_cosine": 0.4, "fvu_no_sink": 0.2, "dead_pct_no_sink": 0.0})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    text = trust_section.known_directions(tmp_path)[1]
    assert "gives 0.300" in text and "BatchTopK, improved recovers most, with an MCC of 0.676" in text
    assert "had 200 rows, and 20.00% of its latents are stable" in text
    assert "lowest at K = 48, not at the true 12.1; MCC is highest at K = 12" in text
    assert "The frozen decoder also reaches Uniqueness, which" in text


def test_the_synthetic_benchmark_searches_learning_rates_as_the_peers_table_does(bench):
    import synth_bench

    published, improved, scaled = (
        synth_bench.Contender(*names)
        for names in (("saegrid", "published", "TopK"), ("saegrid", "improved", "TopK"), ("sparsify", "", "TopK"))
    )
    assert [synth_bench.following(published, tried) for tried in ({}, {1.0: 1.03})] == [1.0, None]
    assert [synth_bench.following(improved, tried) for tried in ({}, {1.0: 0.3})] == [1.0, 3.0]
    falling = {1.0: 0.6, 3.0: 0.4, 10.0: 0.3, 30.0: 0.2}
    assert synth_bench.following(scaled, falling) == 100.0
    assert synth_bench.following(scaled, falling | {100.0: 0.5}) == pytest.approx(300**0.5, rel=1e-6)
    assert synth_bench.learning_rate(published, 1.0, 4096) == pytest.approx(1e-4)
    assert synth_bench.learning_rate(improved, 3.0, 4096) == pytest.approx(6e-3)
    assert synth_bench.learning_rate(scaled, 3.0, 4096) == pytest.approx(5e-3 * 3 * 2)  # (4,096 / 16,384)^-1/2


def test_the_synthetic_benchmarks_table_has_a_row_per_contender_best_first(tmp_path):
    rows = []
    for peer, recipe, mcc in (("saegrid", "improved", 0.6), ("sae-lens", "", 0.7)):
        for seed in (0, 1):
            told = {"peer": peer, "recipe": recipe, "arch": "TopK", "seed": seed, "stable_pct": 12.5}
            names = ["f1_score", "precision", "recall", "uniqueness", "explained_variance"]
            names += ["sae_l0", "true_l0", "dead_latents"]
            rows.append(told | {"saelens_mcc": mcc + seed / 10} | {f"saelens_{name}": 0.25 for name in names})
    pd.DataFrame(rows).to_csv(tmp_path / "synthsaebench.csv", index=False)
    text = trust_section.synthetic_benchmark(tmp_path)[1]
    first, second = (text.index(name) for name in ("sae-lens TopK<", "saegrid TopK improved<"))
    absent = text[text.index("Not run:") :].split(".")[0]
    assert absent.startswith("Not run: saegrid BatchTopK,") and "sae-lens TopK" not in absent
    assert "Highest MCC: saegrid TopK improved (0.650) and sae-lens TopK (0.750)." in text
    assert first < second and ">0.750<" in text[first:second] and ">0.650<" in text[second:] and ">12.50<" in text


def test_the_committed_synthetic_benchmark_is_as_described_and_its_two_judges_agree(bench):
    import synth_bench

    folder = Path("results/ground_truth")
    runs = pd.read_csv(folder / "synthsaebench.csv").fillna({"recipe": ""})
    contenders = runs.groupby(["peer", "recipe", "arch"])["seed"].apply(list).to_dict()
    assert contenders == {tuple(one): list(range(synth_bench.SEEDS)) for one in synth_bench.CONTESTANTS}
    d_sae = synth_bench.EXPANSION * 768 // synth_bench.PART
    for row in runs.to_dict("records"):
        contender = synth_bench.Contender(row["peer"], row["recipe"], row["arch"])
        assert row["lr"] == pytest.approx(synth_bench.learning_rate(contender, row["rate"], d_sae))
        assert row["rate"] not in (min(synth_bench.RATES), max(synth_bench.RATES))
    assert (runs["mcc"] - runs["saelens_mcc"]).abs().max() < 1e-4  # the same decoders, so the same numbers
    assert (runs["l0_no_sink"] - runs["saelens_sae_l0"]).abs().max() < 0.5  # other rows
    assert (1 - runs["fvu_no_sink"] - runs["saelens_explained_variance"]).abs().max() < 0.05
    text = trust_section.synthetic_benchmark(folder)[1]
    assert f"the same {synth_bench.TRAIN_ROWS:,} rows once" in text and synth_bench.EPOCHS == 1
    assert "eight times smaller" in text and synth_bench.PART == 8
    assert "Not run" not in text
