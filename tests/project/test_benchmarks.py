"""The benchmark's driver on a shape that takes no time, and the page made from what it wrote. No time is asserted."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import save_dataset, save_model

from saegrid.config.run_config import make_config
from saegrid.core.sae import TopK
from saegrid.experiment.run import Run
from saegrid.formats import export

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs the driver in a folder of its own; returns the content of the results file."""
    root = tmp_path_factory.mktemp("bench")
    values = {"model": save_model(root / "model"), "dataset": save_dataset(root / "data"), "layer": 1}
    values |= {"train_tokens": 600, "val_tokens": 120, "eval_prompts": 2, "store_dir": str(root / "activations")}
    out = root / "results.json"

    def run(*arguments):
        command = [sys.executable, str(BENCHMARKS / "bench.py"), "--out", str(out), "--threads", "1", "--turns", "2"]
        command += ["--turn-seconds", "0.02", "--train-steps", "3", "--peers-python", str(root / "missing")]
        for name, value in values.items():
            command += ["-p", name, str(value)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    run.out = out
    return run


@pytest.fixture(scope="module")
def results(bench):
    return bench("--quick", "--shapes", "24x2x4", "--batches", "32", "--archs", "JumpReLU")


def test_a_race_has_a_ratio_to_the_plain_torch_loop(results):
    (race,) = results["races"]
    shape = {"d_in": 24, "expansion": 2, "d_sae": 48, "k": 4, "batch": 32, "arch": "JumpReLU", "peer": "torch"}
    assert race.items() >= shape.items()
    own, default, fused = race["contenders"]
    assert (own["contender"], default["setting"], fused["setting"]) == ("saegrid", "default", "fused")
    fastest = min(default["step_ms"], fused["step_ms"])
    assert race["ratio"] == pytest.approx(fastest / own["step_ms"])
    assert race["ratio_default"] == pytest.approx(default["step_ms"] / own["step_ms"])


def test_all_contenders_solve_one_problem_at_the_l0_asked_for(results):
    own, default, _ = results["races"][0]["contenders"]
    assert own["mse"] == pytest.approx(default["mse"], rel=1e-4)
    assert own["l0"] == pytest.approx(default["l0"], rel=0.05)
    assert own["l0"] == pytest.approx(4, rel=0.4)  # theta is set on all timed batches, this is the first


def test_the_floor_is_the_product_and_the_memory_together(results):
    (floor,) = results["floors"]
    assert floor["floor_ms"] == pytest.approx(floor["product_ms"] + floor["memory_ms"])
    assert floor["over_floor"] == pytest.approx(floor["saegrid_ms"] / floor["floor_ms"])
    values = 3 * (2 * 48 * 24 + 48 + 2 * 24)  # weights and two moments
    assert floor["contenders"][3]["bytes"] == 2 * 4 * values


def test_exponents_are_slopes_of_the_measured_points(results):
    first, second = results["scaling"]["points"]["rows"]
    for name in ("saegrid", "torch"):
        slope = math.log(second[f"{name}_ms"] / first[f"{name}_ms"]) / math.log(second["size"] / first["size"])
        assert results["scaling"]["exponents"]["rows"][name] == pytest.approx(slope)


def test_both_kernels_reach_the_same_loss(results):
    assert [record["arch"] for record in results["quality"]] == ["TopK", "BatchTopK", "JumpReLU"]
    for record in results["quality"]:
        assert record["reference"]["kernel"] == "reference"
        assert [own["matmul"] for own in record["own"]] == ["fp32", "bf16"]
        for own in record["own"]:
            assert own["kernel"] == "cpu" and len(own["curve"]) == record["epochs"]
            assert own["ratios"]["val_mse"] == pytest.approx(1, abs=0.01)


def test_a_grids_hours_are_all_its_steps(results):
    grid = results["grid"]
    assert len(grid["runs"]) == 3 and {run["steps"] for run in grid["runs"]} == {2 * 6}  # 3,000 rows, batch 512
    for name in ("reference", "auto"):
        hours = sum(12 * run[f"{name}_ms"] for run in grid["runs"]) / 3.6e6
        assert grid[f"{name}_hours"] == pytest.approx(hours)


def test_the_splice_race_counts_shared_passes_once(results):
    splice = results["splice"]
    fp32, bf16 = splice["contenders"]
    assert splice["saes"] == 2 and len(fp32["losses"]) == len(bf16["losses"]) == 2
    assert splice["saegrid_s"] == pytest.approx((fp32["baseline_ms"] + 2 * fp32["step_ms"]) / 1000)
    assert fp32["losses"][0]["clean"] == fp32["losses"][1]["clean"]
    assert fp32["losses"][0]["spliced"] != fp32["losses"][1]["spliced"]
    assert 0 <= splice["bf16_delta_apart"] < 0.5 and "ratio" not in splice


def test_the_record_says_where_and_with_what(results):
    (machine,) = results["machines"]
    assert machine["name"].endswith(", 1 threads") and {"torch", "numba", "python", "saegrid"} <= set(
        machine["versions"]
    )
    records = [*results["races"], *results["floors"], results["splice"], results["grid"], results["scaling"]]
    assert {record["machine"] for record in [*records, *results["quality"]]} == {machine["name"]}
    assert any(line.startswith("sae-lens") for line in results["not_measured"])


def test_shapes_without_a_race_are_told(results):
    line = next(line for line in results["not_measured"] if line.startswith("No race yet at: "))
    assert "d_in 896, 8x, K 220, batch 512, TopK; " in line and "d_in 24," not in line
    assert all(race["train_steps"] == 3 for race in [*results["races"], *results["floors"]])


def test_keep_adds_to_what_the_file_has(bench, results):
    more = bench("--quick", "--keep", "--parts", "steps", "--shapes", "16x2x4", "--batches", "48", "--archs", "TopK")
    assert [race["batch"] for race in more["races"]] == [32, 48]
    assert more["floors"] == results["floors"] and more["quality"] == results["quality"]


def test_races_of_two_machines_stand_beside_each_other(bench, results):
    before = bench.out.read_text()
    bench.out.write_text(before.replace(results["machines"][0]["name"], "Zilog Z80"))
    more = bench(
        "--quick", "--keep", "--shapes", "24x2x4", "--batches", "32", "--archs", "JumpReLU", "--parts", "floor"
    )
    bench.out.write_text(before)
    names = [found["name"] for found in more["machines"]]
    assert names == ["Zilog Z80", results["machines"][0]["name"]] == [floor["machine"] for floor in more["floors"]]
    assert {race["machine"] for race in more["races"]} == {more["splice"]["machine"]} == {"Zilog Z80"}


def test_the_page_shows_the_ratios_and_says_what_is_not_measured(results, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    command = [sys.executable, str(BENCHMARKS / "page.py"), str(tmp_path / "results.json"), str(page)]
    subprocess.run(command, check=True)
    text = page.read_text()
    for race in results["races"]:
        assert f">{race['ratio']:.1f}</td>" in text
    closest = min(race["ratio"] for race in results["races"] if "ratio" in race)
    assert f"A step is **{closest:.1f}" in text and f" {closest:.1f}x</span>" in text
    assert "## Not measured" in text and "On a GPU" in text and "$" not in text
    assert text.count('<figure class="plot strips">') == 2 and text.count("<details>") == text.count("</details>") > 4


def test_a_contender_that_fails_is_recorded_and_the_race_goes_on(tmp_path):
    from race import race

    spec = {"contender": "torch", "setting": "default", "arch": "TopK", "k": 1, "theta": 0.0, "batch": 1}
    spec |= {"threads": 1, "warm_steps": 1, "inputs": str(tmp_path / "missing.safetensors")}
    (record,) = race([spec], {}, 2, 0.01, {"default"})
    assert record["contender"] == "torch" and "missing.safetensors" in record["failure"]


def test_bf16_is_tried_where_the_processor_has_it():
    from peers import settings_of

    assert settings_of("sae-lens", "TopK", bf16=True) == ("default", "bf16", "compile", "bf16+compile", "sparse")
    assert settings_of("sae-lens", "TopK", bf16=False) == ("default", "compile", "sparse")
    assert settings_of("torch", "JumpReLU", bf16=False) == ("default", "fused", "fused+compile")


def test_learning_rates_are_tried_until_the_best_has_worse_neighbours_and_once_between():
    from peer_quality import LADDER, losses, next_rate

    for best in (rate * lean for rate in LADDER for lean in (0.9, 1.0, 1.1)):
        rows = {}
        while rate := next_rate(losses(rows)):
            rows[rate] = {"fvu_no_sink": abs(math.log(rate / best)) if rate < 10 * best else math.nan}
        between = [rate for rate in rows if rate not in LADDER]
        ladder = sorted(LADDER, key=lambda rate: abs(math.log(rate / best)))
        assert len(between) == 1 and ladder[0] in rows and len(rows) <= 7
        assert {1.0, 3.0} <= set(rows) and min(ladder[:2]) < between[0] < max(ladder[:2])


def test_further_seeds_take_the_rate_that_the_first_one_chose(tmp_path, monkeypatch):
    import peer_quality

    asked = []

    def measured(contender, default, rows, following, out, course):
        rows = dict(rows)
        while rate := following(peer_quality.losses(rows)):
            asked.append((contender["seed"], rate))
            rows[rate] = contender | {"rate": rate, "lr": rate * default, "threads": 1, "fvu_no_sink": abs(rate - 2.5)}
        return pd.DataFrame(rows.values()), None

    monkeypatch.setattr(peer_quality, "measured", measured)
    contender = {"layer": 1, "dataset": "a/b", "peer": "a", "arch": "b", "k": 16}
    options = argparse.Namespace(out=tmp_path, rates=8, seeds=3)
    peer_quality.compete(contender, 0.1, options, None)
    search = [(0, 1.0), (0, 3.0), (0, 10.0), (0, 1.732051)]
    assert asked == [*search, (1, 3.0), (2, 3.0)]
    peer_quality.compete(contender, 0.1, options, None)
    assert len(asked) == 6

    runs = pd.read_csv(tmp_path / "runs.csv")
    runs.loc[runs["seed"] == 2, "rate"] = 10.0  # as of an earlier search
    runs.to_csv(tmp_path / "runs.csv", index=False)
    peer_quality.compete(contender, 0.1, options, None)
    assert asked[6:] == [(2, 3.0)]
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert sorted(zip(runs["seed"], runs["rate"], strict=True)) == sorted([*search, (1, 3.0), (2, 3.0)])


def test_the_latents_of_a_contenders_seeds_are_matched(tmp_path, monkeypatch):
    """Seeds 0 and 1 have the same latents, seed 2 half of them: 100% and 50%, so means of 75%, 75% and 50%."""
    import peer_quality

    monkeypatch.setattr(peer_quality, "ROOT", tmp_path)
    contender, eye = {"layer": 1, "dataset": "a/b", "peer": "sae-lens", "arch": "TopK", "k": 4}, torch.eye(8)
    rows = []
    for seed, weights in enumerate((eye, eye[[3, 2, 1, 0, 4, 5, 6, 7]], torch.cat([eye[:4], -eye[4:]]))):
        sae = TopK(8, 8, k=4)
        sae.W_enc.data, sae.W_dec.data = weights.clone(), weights.clone()
        rows.append(contender | {"rate": 3.0, "seed": seed, "fvu_no_sink": 0.1})
        export(sae, peer_quality.kept(tmp_path, rows[-1]), "saelens")
    rows.append(contender | {"rate": 1.0, "seed": 0, "fvu_no_sink": 0.2})
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    x = torch.cat([eye, -eye])
    course = SimpleNamespace(store=SimpleNamespace(rows=lambda split: x))
    peer_quality.replicated(tmp_path, contender, course)
    found = pd.read_csv(tmp_path / "runs.csv")
    assert found["stable_pct"].tolist()[:3] == pytest.approx([75, 75, 50]) and found["stable_pct"].isna().tolist()[3]
    assert found["matched_cosine"][2] == pytest.approx(found["matched_cosine"][:2].mean() * 2 - 1)


def test_delta_loss_by_how_often_a_token_was_trained_on(tmp_path, monkeypatch):
    """The bins' tokens and losses add up to what the run's own splice says."""
    monkeypatch.chdir(tmp_path)
    from rare_tokens import by_rarity

    places = {"model": save_model(tmp_path / "model"), "dataset": save_dataset(tmp_path / "data")}
    sizes = {"train_tokens": 300, "val_tokens": 150, "eval_prompts": 2, "max_tokens": 48, "batch_size": 64}
    run = Run(make_config(**places, **sizes, layer=1, arch="TopK", k=4, expansion=4, epochs=1, kernel="reference"))
    run.train()
    row = run.evaluate()
    run.close()
    found = by_rarity(run.folder)
    assert len(found) > 1 and found["tokens, %"].sum() == pytest.approx(100)
    assert found["of all delta loss, %"].sum() == pytest.approx(100)
    assert (found["tokens, %"] * found["delta loss"]).sum() / 100 == pytest.approx(row["delta_loss"], rel=1e-4)
