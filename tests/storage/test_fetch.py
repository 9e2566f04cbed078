"""Reading from the Hub, with the Hub's own client against a small server of its form, and without any network."""

import io

import pandas as pd
import pytest
import torch
from hub_server import COMMIT, serve
from processes import in_another_process
from tiny import D_IN, save_dataset, save_model, tiny_model

from saegrid.errors import ConfigError
from saegrid.storage.hub_access import local_folder
from saegrid.storage.locks import replacing_folder


def tensor_bytes(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Environment in which the Hub is a local server with a model and published activations, and its folder."""
    root = tmp_path_factory.mktemp("hub")
    save_model(root / "model")
    model = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    acts = {"runs/12/instruct_base_layer1.pt": tensor_bytes(torch.randn(50, D_IN).half()), "README.md": b"-"}
    server = serve({"some/model": model, "some/acts": acts, "some/empty": {"README.md": b"-"}})
    yield {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()


SHAPES = """
import json
from saegrid.config.run_config import make_config
from saegrid.errors import ConfigError
from saegrid.data.language_model import lm_shape
from saegrid.experiment.preflight import model_bytes
answers = []
for parameters in CASES:
    try:
        config = make_config(k=4, **parameters)
        answers.append([*lm_shape(config), model_bytes(config)])
    except ConfigError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def test_the_hubs_answers_become_one_line(hub):
    size = sum(weight.numel() for weight in tiny_model("llama").parameters())
    cases = {
        "some/model": [D_IN, 3, 4 * size],  # its weights are not fetched yet
        "some/gated": "model = 'some/gated': gated: accept its terms on the Hub",
        "some/nowhere": "model = 'some/nowhere': no such folder here, and no such repository on the Hub",
        "some/empty": "model = 'some/empty': a file is missing on the Hub",
        "some/broken": "model = 'some/broken': no such folder, not in the Hub's local cache, and the Hub answered: ",
    }
    listed = [*({"model": name} for name in cases), {"model": "some/model", "model_revision": "v9"}]
    *answers, revision = in_another_process(hub, SHAPES.replace("CASES", repr(listed)))
    for answer, wanted in zip(answers, cases.values(), strict=True):
        assert answer == wanted if isinstance(wanted, list) else answer.startswith(wanted), answer
        assert "\n" not in str(answer)
    assert revision == "model_revision = 'v9': the Hub's some/model has no such revision"


COLLECT = """
import json
from saegrid.data.collect import collect, open_store
from saegrid.config.run_config import make_config
config = make_config(k=4, layer=1, eval_prompts=2, train_tokens=100, val_tokens=50, **PARAMETERS)
collect(config)
manifest = open_store(config).manifest
print(json.dumps([manifest["model"], manifest["data"], open_store(config).n_train, manifest["sources"]["model"]]))
"""


def test_model_and_published_activations_come_from_the_hub(hub, tmp_path):
    local = {"model": "some/model", "dataset": save_dataset(tmp_path / "data"), "store_dir": str(tmp_path)}
    model, _, rows, commit = in_another_process(hub, COLLECT.replace("PARAMETERS", repr(local)))
    assert (model["model"], model["revision"], rows, commit) == ("some/model", COMMIT, 100, COMMIT)
    files = {"model": "some/model", "activations": "some/acts", "store_dir": str(tmp_path), "max_tokens": 256}
    _, data, rows, commit = in_another_process(hub, COLLECT.replace("PARAMETERS", repr(files)))
    assert (data["revision"], data["files"], rows) == (COMMIT, {"all": "instruct_base_layer1.pt"}, 40)
    assert commit == COMMIT


CARD = """---
configs:
- {config_name: en, data_files: [{split: train, path: en.parquet}]}
- {config_name: de, data_files: [{split: train, path: de.parquet}, {split: held, path: held.parquet}]}
---
"""
TEXTS = """
import json
import sys
sys.path.append("tests")
from tiny import tiny_tokenizer
from saegrid.config.run_config import make_config
from saegrid.data.prompts import draw_prompts
from saegrid.errors import ConfigError
answers = []
small = {"train_tokens": 300, "val_tokens": 100, "eval_prompts": 3, "max_tokens": 32, "dataset": "some/texts"}
for parameters in CASES:
    try:
        prompts, facts = draw_prompts(make_config(k=4, **small, **parameters), tiny_tokenizer())
        answers.append([tiny_tokenizer().decode(prompts["eval"][0].tokens).split(":")[0], facts["revision"]])
    except ConfigError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def parquet_bytes(name):
    buffer = io.BytesIO()
    pd.DataFrame({"content": [f"{name}: {' '.join(f'w{i}x{j}' for j in range(9))}" for i in range(40)]}).to_parquet(
        buffer
    )
    return buffer.getvalue()


def test_configuration_split_and_field_of_a_hub_dataset(tmp_path):
    files = {f"{name}.parquet": parquet_bytes(name) for name in ("en", "de", "held")}
    server = serve({"some/texts": {"README.md": CARD.encode(), **files}})
    hub = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    content = {"text_field": "content"}
    cases = {
        "dataset_config = '': some/texts: can't be read: Config name is missing": content,
        "dataset_config = 'fr': some/texts: can't be read: BuilderConfig 'fr' not found. Available: ['en', 'de']": {
            **content,
            "dataset_config": "fr",
        },
        "dataset_split = 'dev': some/texts has train, held": {"dataset_config": "de", "dataset_split": "dev"},
        "dataset = 'some/texts': train: needs text, messages, or question and answer": {"dataset_config": "de"},
    }
    read = [{"dataset_config": "en", **content}, {"dataset_config": "de", "dataset_split": "held", **content}]
    found = in_another_process(hub, TEXTS.replace("CASES", repr([*read, *cases.values()])))
    server.shutdown()
    assert found[:2] == [["en", COMMIT], ["held", COMMIT]]
    for answer, wanted in zip(found[2:], cases, strict=True):
        assert answer.startswith(wanted) and "\n" not in answer, answer


def test_without_the_hub_what_is_cached_is_used_and_the_rest_is_one_line(hub, tmp_path):
    in_another_process(hub, SHAPES.replace("CASES", repr([{"model": "some/model"}])))
    cases = repr([{"model": "some/model"}, {"model": "some/other"}])
    unreachable = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment, why in ((unreachable, "the Hub can't be reached"), ({**hub, "HF_HUB_OFFLINE": "1"}, "is set")):
        cached, other = in_another_process(environment, SHAPES.replace("CASES", cases))
        assert cached[:2] == [D_IN, 3]
        assert other.startswith("model = 'some/other': no such folder, not in the Hub's local cache, and")
        assert other.endswith(why)


def test_a_path_is_not_taken_for_a_hub_id(tmp_path):
    assert local_folder("model", "org/name") is None
    assert local_folder("model", str(tmp_path)) == tmp_path
    for name in ("./name", "../org/name", "a/b/c", "/no/where", "two words"):
        with pytest.raises(ConfigError, match=r"model = .*: no such folder"):
            local_folder("model", name)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    with replacing_folder(folder) as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(RuntimeError), replacing_folder(folder) as temporary:
        (temporary / "new").write_text("")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    with replacing_folder(folder) as temporary:
        (temporary / "new").write_text("")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
