import json

import pytest
import torch
from tiny import save_dataset, save_model

from saegrid.config.grid import Grid
from saegrid.config.run_config import make_config
from saegrid.errors import ResultsError
from saegrid.experiment import pca, pca_table
from saegrid.experiment.run import prepare_store
from saegrid.storage.checksums import write_sealed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config of a tiny model, and its store."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "model")
    save_dataset(folder / "data")
    config = make_config(
        **{"model": str(folder / "model"), "dataset": str(folder / "data"), "layer": 1, "k": 4, "max_tokens": 64},
        **{"train_tokens": 450, "val_tokens": 130, "eval_prompts": 4, "act_dtype": "float32", "matmul": "fp32"},
        store_dir=str(folder / "stores"),
    )
    return config, prepare_store(config)


def test_directions_are_those_of_an_svd(made):
    _, store = made
    mean, directions = pca.principal(store)
    x = store.rows("train")
    _, values, expected = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(directions @ directions.T, torch.eye(store.d_in), atol=1e-5, rtol=0)
    along = (directions.double() * expected).sum(1).abs()
    assert (along[values > 1e-3 * values[0]] > 0.99).all()


def test_all_components_lose_nothing_and_fewer_lose_more(made, monkeypatch):
    config, store = made
    monkeypatch.setattr(pca, "COMPONENTS", (1, 4, store.d_in, 2 * store.d_in))
    pca.make(config, store)
    records = json.loads((store.folder / "pca.json").read_text())["records"]
    assert [record["components"] for record in records] == [1, 4, store.d_in]
    fvu = [record["fvu"] for record in records]
    assert fvu[0] > fvu[1] > fvu[2] and fvu[2] == pytest.approx(0, abs=1e-9)
    assert records[2]["delta_loss"] == pytest.approx(0, abs=1e-5) and abs(records[0]["delta_loss"]) > 1e-3
    before = (store.folder / "pca.json").stat().st_mtime_ns
    pca.make(config, store)
    assert (store.folder / "pca.json").stat().st_mtime_ns == before


def test_the_table_and_what_is_damaged(made, tmp_path):
    config, store = made
    constants = config.model_dump(exclude={"k"}) | {"batch_size": 64}
    grid = Grid(name="tiny", title="Tiny", constants=constants, axes=[{"k": [2, 4]}])
    (store.folder / "pca.json").unlink(missing_ok=True)
    assert pca_table.load(grid).empty and pca_table.read(tmp_path).empty
    pca.make(config, store)
    table = pca_table.load(grid)
    assert list(table.columns) == pca_table.COLUMNS and set(table["store_id"]) == {config.store_id}
    path = store.folder / "pca.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ResultsError, match=r"pca\.json: damaged"):
        pca_table.load(grid)
    pca.make(config, store)
    assert len(pca_table.load(grid)) == len(table)
    records = [
        {name: record[name] for name in ("store_id", "components", "fvu")} for record in table.to_dict("records")
    ]
    write_sealed(path, {"data_sha256": store.data_sha256, "records": records})
    with pytest.raises(ResultsError, match=r"pca\.json: made by an older version \(no 'fvu_no_sink'\); delete it"):
        pca_table.load(grid)
    pca.make(config, store)
    assert len(pca_table.load(grid)) == len(table)
