import shlex
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from papermill.cli import _resolve_type
from pydantic import ValidationError

from saegrid.analysis.budget import BUDGETS
from saegrid.analysis.findings import all_findings
from saegrid.config.grid import Grid, load_grid, papermill_arguments
from saegrid.config.recipes import RECIPES, described
from saegrid.config.run_config import RunConfig, make_config
from saegrid.experiment.results import typed

PRESETS = sorted(Path("params").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_a_grid(path):
    grid = load_grid(path)
    runs = grid.runs()
    assert grid.name == path.stem
    assert len({run.run_id for run in runs}) == len(runs) > 0
    for run in runs:
        run.check_training()


def test_the_full_grid_has_the_published_axes():
    runs = load_grid("params/full.yaml").runs()
    published = [run for run in runs if run.recipe == "published" and run.freeze == "none"]
    points = {(run.arch, run.expansion, run.k, run.threshold) for run in published}
    topk = {(arch, e, k, 0.0) for arch in ("TopK", "BatchTopK") for e in (4, 8, 16) for k in (64, 128, 220)}
    assert points == topk | {("JumpReLU", e, 0, t) for e in (4, 8) for t in (0.1, 0.5)}
    assert len(published) == 2 * len(points)  # two seeds
    steps = {run.epochs * -(-run.train_tokens // run.batch_size) for run in runs}
    assert all(5_570 <= n <= 5_580 for n in steps)  # as the published runs


def test_the_published_setting_is_the_cards():
    for run in load_grid("params/qwen05b.yaml").runs():
        assert (run.model, run.layer) == ("Qwen/Qwen2.5-0.5B-Instruct", 12)
        assert (run.epochs, run.lr, run.batch_size, run.eval_prompts) == (10, 1e-4, 512, 50)


def test_blocks_are_products_and_the_grid_is_their_union():
    grid = Grid(
        name="g",
        title="t",
        constants={"epochs": 2},
        axes=[{"arch": ["TopK"], "k": [1, 2], "seed": [0, 1]}, {"arch": ["JumpReLU"], "threshold": [0.5]}],
    )
    assert [(run.arch, run.k, run.seed) for run in grid.runs()] == [
        ("TopK", 1, 0),
        ("TopK", 1, 1),
        ("TopK", 2, 0),
        ("TopK", 2, 1),
        ("JumpReLU", 0, 0),
    ]
    assert all(run.epochs == 2 for run in grid.runs())


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(names, st.integers(1, 10**6), st.floats(1e-12, 1e3))
def test_papermill_reads_the_arguments_back_as_the_same_config(model, k, lr):
    for recipe, switched in (("published", {}), ("improved", {}), ("improved", {"project_grad": False, "warmup": 0})):
        check_arguments(make_config(model=model, k=k, lr=lr, expansion=4, recipe=recipe, **switched))


def check_arguments(run):
    words = shlex.split(papermill_arguments(run))
    options = list(zip(words[::3], words[1::3], words[2::3], strict=True))
    parameters = {name: value if flag == "-r" else _resolve_type(value) for flag, name, value in options}
    assert RunConfig(**parameters) == run


def test_what_the_recipe_says_is_not_said_again():
    assert papermill_arguments(make_config(k=4)) == "-p k 4"
    run = make_config(k=4, recipe="improved", grad_clip=0.0, sinks="apart")
    assert papermill_arguments(run) == "-p k 4 -r recipe improved -p grad_clip 0.0"
    run = make_config(arch="JumpReLU", k=4, recipe="improved")
    assert papermill_arguments(run) == "-r arch JumpReLU -p k 4 -r recipe improved"


def test_the_ablation_takes_each_choice_away_alone():
    runs = load_grid("params/ablation.yaml").runs()
    improved, published = RECIPES["improved"], RECIPES["published"]
    switched = {name for name in improved if improved[name] != published[name]}
    words = {described(run.model_dump()) for run in runs}
    single = {f"improved but {name} = {published[name]}" for name in switched}
    single |= {"improved but lr = 0.001", "improved but lr = 0.006"}
    assert words == {"published", "improved"} | single
    assert len(runs) == len(words) * 3


def test_the_quick_grid_has_what_the_five_findings_need():
    runs = load_grid("params/quick.yaml").runs()
    assert len(runs) <= 16
    df = pd.DataFrame([run.model_dump() for run in runs])
    df = df.assign(run_id=[run.run_id for run in runs], d_sae=576 * df["expansion"], l0=1.0, val_mse=1.0, nmse=1.0)
    df = typed(df.assign(dead_pct=1.0, delta_loss=1.0, frac_rec_pct=1.0, steps=790))
    assert {finding.verdict for finding in all_findings(df)} <= {"holds", "fails"}
    assert {run.k for run in runs if run.recipe == "improved"} >= set(BUDGETS)


def test_the_l0_budget_is_a_whole_number_from_1():
    axes = [{"arch": ["TopK"], "k": [4]}]
    assert Grid(name="g", title="G", axes=axes).l0_budget == 64
    with pytest.raises(ValidationError, match="l0_budget"):
        Grid(name="g", title="G", axes=axes, l0_budget=0)
