"""What counts as the same setting, and what pairs runs: across no layer, text or model."""

import pandas as pd

from saegrid.analysis.findings import batchtopk_beats_topk, large_adds_little
from saegrid.config import settings
from saegrid.config.grid import Grid, load_grid
from saegrid.config.run_config import make_config


def row(**parameters):
    return make_config(**{"arch": "TopK", "k": 64} | parameters).model_dump()


def test_a_seed_or_a_machine_makes_no_setting():
    assert settings.key(row()) == settings.key(row(seed=3)) == settings.key(row(kernel="reference", threads=2))
    assert settings.differing(row(), row(seed=3)) == ["seed"]


def test_each_axis_makes_one():
    changes = {"layer": 6, "expansion": 4, "k": 128, "train_tokens": 5000, "recipe": "improved", "lr": 1e-3}
    for name, value in (changes | {"text": "chat"}).items():
        axis = "recipe" if name == "lr" else name  # a recipe and its switched choices are one axis
        assert settings.differing(row(), row(**{name: value})) == [axis], name
        assert settings.key(row(), axis) == settings.key(row(**{name: value}), axis)


def test_an_architectures_own_default_is_no_difference():
    assert settings.differing(row(arch="BatchTopK"), row(arch="Matryoshka")) == ["arch"]
    assert settings.differing(row(arch="Matryoshka"), row(arch="Matryoshka", prefixes=3)) == ["prefixes"]


def test_a_threshold_counts_with_its_unit():
    absolute, rms = (row(arch="JumpReLU", k=0, threshold=0.5, threshold_unit=unit) for unit in ("absolute", "rms"))
    assert settings.differing(absolute, rms) == ["threshold"]


def test_a_table_has_the_settings_of_its_configs():
    runs = [run.model_dump() for run in load_grid("params/quick.yaml").runs()]
    table = pd.DataFrame(runs).astype({"k": "Int64"}).replace({"k": {0: pd.NA}, "threshold": {0.0: float("nan")}})
    assert [settings.key(row) for row in table.to_dict("records")] == [settings.key(run) for run in runs]
    assert settings.unusual(runs) == []


def test_runs_of_two_layers_are_never_paired():
    """2 layers x 9 settings x 2 architectures are 18 pairs, and a label names the layer."""
    axes = {"layer": [6, 12], "arch": ["BatchTopK", "TopK"], "expansion": [4, 8, 16], "k": [64, 128, 220]}
    rows = [run.model_dump() for run in Grid(name="g", title="G", axes=[axes]).runs()]
    assert settings.unusual(rows) == ["layer"]
    df = pd.DataFrame(rows).assign(val_mse=1.0, dead_pct=1.0, delta_loss=1.0, run_id=[str(n) for n in range(len(rows))])
    df.loc[df["arch"] == "BatchTopK", "val_mse"] = 0.5
    assert batchtopk_beats_topk(df).facts["pairs"] == 18
    assert [len(gap.gaps) for gap in large_adds_little(df).facts["by_arch"].values()] == [2 * 3, 2 * 3]


def test_an_origin_is_where_the_rows_come_from():
    rows = [
        row(layer=layer, dataset=f"embedded:{text}") for text in ("gsm_symbolic", "python_docs") for layer in (6, 12)
    ]
    labels = ["layer 6, gsm_symbolic", "layer 12, gsm_symbolic", "layer 6, python_docs", "layer 12, python_docs"]
    assert list(settings.origins([*rows, row(layer=6, k=8, arch="BatchTopK", seed=2)]).values()) == labels
    assert list(settings.origins(rows[:2]).values()) == ["layer 6", "layer 12"]
    assert list(settings.origins(rows, "layer").values()) == ["gsm_symbolic", "python_docs"]
    for same in ({"train_tokens": 500}, {"recipe": "improved"}, {"model_init": "random"}, {"seed": 1}, {"k": 8}):
        assert list(settings.origins([row(), row(**same)]).values()) == [""]
    for other in ({"text": "chat"}, {"max_tokens": 64}, {"dataset_config": "main"}, {"data_seed": 1}):
        assert len(settings.origins([row(), row(**other)])) == 2, other


def test_texts_of_one_name_are_told_apart():
    rows = [row(dataset="/data/a/train"), row(dataset="/data/b/train")]
    assert list(settings.origins(rows).values()) == ["/data/a/train", "/data/b/train"]
