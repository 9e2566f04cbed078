import ast
import math
from pathlib import Path
from typing import get_args

import nbformat
import papermill
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saegrid.config.architectures import ARCHITECTURES, Arch
from saegrid.config.notebook import check_names, config_from_namespace
from saegrid.config.recipes import RECIPES, THETA_TIE, described
from saegrid.config.run_config import STORE_FIELDS, RunConfig, make_config
from saegrid.errors import ConfigError

NOTEBOOK = "notebooks/train.ipynb"


def test_yaml_1_1_numbers_and_numeric_names_are_taken_as_meant():
    config = make_config(k=4, lr="1e-3", model_revision=123)
    assert config.lr == 1e-3 and config.model_revision == "123"


def test_the_shape_of_the_model_is_checked():
    config = make_config(k=1153, expansion=2, layer=3)
    with pytest.raises(ConfigError, match=r"layer = 3.*0 to 2"):
        config.check_shape(d_in=576, n_layers=3)
    with pytest.raises(ConfigError, match=r"k = 1153: at most d_sae .* 1152"):
        config.check_shape(d_in=576, n_layers=4)


def test_the_smallest_prefix_must_hold_k():
    with pytest.raises(ConfigError, match=r"prefixes = 5: the smallest has 8 latents, fewer than k = 9"):
        make_config(arch="Matryoshka", k=9, expansion=2, layer=0).check_shape(d_in=64, n_layers=1)


def test_names_are_the_published_ones():
    assert make_config(arch="BatchTopK", expansion=8, k=220).name == "BatchTopK_exp8x_k220"
    assert make_config(arch="JumpReLU", expansion=4, threshold=0.5).name == "JumpReLU_exp4x_t0.5"


def test_a_recipe_is_resolved_once_and_each_choice_can_be_switched():
    choices = set(RECIPES["improved"])
    assert choices == set(RECIPES["published"])
    left = {name for name, field in RunConfig.model_fields.items() if field.default in ("recipe", -1.0)}
    assert choices == left - {"theta_tie"}  # which the architecture says
    for recipe, says in RECIPES.items():
        whole = make_config(k=4, recipe=recipe)
        assert {name: getattr(whole, name) for name in choices} == says
        assert make_config(**whole.model_dump()) == whole  # what is recorded rebuilds it
        for name in choices - {"dead_window"}:
            other = RECIPES["published" if recipe == "improved" else "improved"][name]
            switched = make_config(k=4, recipe=recipe, **{name: other})
            assert {n: getattr(switched, n) for n in choices} == says | {name: other}
            assert switched.run_id != whole.run_id


def test_published_runs_keep_the_ids_from_before_there_were_recipes():
    assert make_config(arch="TopK", k=64).run_id == "TopK_exp8x_k64_s0_bcb6000e"
    assert make_config(arch="TopK", k=64).store_id == "layer12_c55a7040"


def test_a_control_is_named_as_one():
    assert make_config(k=64, recipe="improved", freeze="soft").name == "BatchTopK_exp8x_k64_improved_frozen-soft"
    assert make_config(k=64, model_init="random").name == "BatchTopK_exp8x_k64_untrained-model"


def test_only_trained_thresholds_have_a_tie():
    jump = make_config(arch="JumpReLU", k=4, recipe="improved")
    assert jump.theta_tie == THETA_TIE and make_config(k=4, recipe="improved").theta_tie == 0
    assert make_config(arch="JumpReLU", threshold=0.5, recipe="improved").theta_tie == 0
    free = make_config(arch="JumpReLU", k=4, recipe="improved", theta_tie=0.0)
    assert free.theta_tie == 0 and free.run_id != jump.run_id
    assert described(jump.model_dump()) == "improved"
    assert described(free.model_dump()) == "improved but theta_tie = 0.0"


def test_a_namespace_may_hold_only_parameters():
    names = {"k": 4, "_dh": [], "In": [], "Out": {}, "math": math, "get_ipython": print, "exit": exit}
    assert config_from_namespace(names) == make_config(k=4)
    with pytest.raises(ConfigError, match="kk = 4: no such parameter"):
        config_from_namespace(names | {"kk": 4})


def test_a_page_of_the_report_refuses_what_it_does_not_know():
    names = {"results_dir": "a", "check_names": check_names, "math": math, "In": [], "_1": 2}
    check_names(names, "results_dir", "runs_dir")
    with pytest.raises(ConfigError, match="run_dir = 'b': no such parameter; known are results_dir, runs_dir"):
        check_names(names | {"run_dir": "b"}, "results_dir", "runs_dir")
    with pytest.raises(ConfigError, match="results_dir = 3: must be text"):
        check_names({"results_dir": 3}, "results_dir")


changes = {
    "seed": st.integers(1, 2**31 - 1),
    "lr": st.floats(1e-6, 9e-5),
    "sinks": st.just("apart"),
    "aux_coef": st.floats(1e-3, 1.0),
    "encoder_tie": st.floats(1e-3, 10.0),
    "train_tokens": st.integers(1, 99_999),
    "layer": st.integers(13, 99),
    "kernel": st.just("reference"),
    "freeze": st.sampled_from(["decoder", "encoder", "soft"]),
    "model_init": st.just("random"),
}


@given(st.sampled_from(sorted(changes)).flatmap(lambda name: st.tuples(st.just(name), changes[name])))
def test_what_can_change_a_result_changes_the_run_id(change):
    name, value = change
    base, other = make_config(k=4), make_config(k=4, **{name: value})
    assert base.run_id != other.run_id
    assert (base.store_id != other.store_id) == (name in STORE_FIELDS)
    assert make_config(k=4, runs_dir="elsewhere").run_id == base.run_id


def test_the_notebook_repeats_every_parameter_with_its_default():
    shown = papermill.inspect_notebook(NOTEBOOK)
    assert list(shown) == [name for name in shown if name in RunConfig.model_fields]
    assert set(shown) == set(RunConfig.model_fields)
    for name, parameter in shown.items():
        assert ast.literal_eval(parameter["default"]) == RunConfig.model_fields[name].default, name


def test_the_config_is_built_right_after_the_parameters():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    tagged = [index for index, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert "config_from_namespace(globals())" in cells[tagged[0] + 1].source


def test_the_table_of_architectures_is_the_one_of_the_classes():
    from saegrid.core.sae import SAE_CLASSES

    assert set(get_args(Arch)) == set(ARCHITECTURES) == set(SAE_CLASSES)
    source = Path("lib/saegrid/config/architectures.py").read_text()
    assert source.count("        Architecture(\n") == len(ARCHITECTURES)
    looks = {(arch.color, arch.marker) for arch in ARCHITECTURES.values()}
    assert len(looks) == len(ARCHITECTURES)
