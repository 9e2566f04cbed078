"""The activation store: rows, shards, statistics, integrity, shuffling, resume; and the published files."""

import hashlib
import json
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import D_IN, publish, save_dataset, save_model, tiny_model
from transformers import AutoTokenizer

from saegrid.__main__ import main
from saegrid.config.grid import Grid
from saegrid.config.run_config import SITES, make_config
from saegrid.data import stream
from saegrid.data.collect import collect, open_store, store_folder
from saegrid.data.language_model import weight_files
from saegrid.data.prompts import make_prompts
from saegrid.data.store import ShardWriter, Store
from saegrid.errors import ConfigError, StoreError
from saegrid.storage.hub_access import files_sha256

SHARD_ROWS = 64


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny model and dataset as local folders."""
    root = tmp_path_factory.mktemp("sources")
    return {"model": save_model(root / "model", chat=True), "dataset": save_dataset(root / "data")}


@pytest.fixture
def config(sources, tmp_path):
    return config_for(sources, tmp_path)


def config_for(sources, folder, **parameters):
    small = {"k": 4, "layer": 1, "train_tokens": 500, "val_tokens": 130, "eval_prompts": 4, "act_dtype": "float32"}
    return make_config(**{**small, **sources, "store_dir": str(folder / "stores"), **parameters})


def collected(config):
    collect(config, device="cpu", shard_rows=SHARD_ROWS)
    return open_store(config)


@pytest.fixture(scope="module")
def store(sources, tmp_path_factory):
    """A store of 500 and 130 random rows, all different, in shards of 64."""
    folder = tmp_path_factory.mktemp("store")
    rows = torch.randn(630, D_IN, generator=torch.Generator().manual_seed(0)).half()
    files = {"instruct_base_layer1_train.pt": rows[:500], "instruct_base_layer1_val.pt": rows[500:]}
    return collected(config_for(sources, folder, activations=publish(folder / "files", files)))


def flipped(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("text", ["plain", "chat"])
def test_rows_are_the_blocks_output_at_every_stored_position(sources, tmp_path, text):
    config = config_for(sources, tmp_path, text=text)
    store = collected(config)
    tokenizer = AutoTokenizer.from_pretrained(sources["model"])
    prompts = make_prompts(config, tokenizer)
    model = tiny_model("llama")
    for split, n in (("train", 500), ("val", 130)):
        rows, meta = store.rows(split), store.meta(split)
        assert rows.shape == (n, D_IN)
        first = 0
        for index, prompt in enumerate(prompts[split]):
            with torch.no_grad():  # one by one, by the plain model
                states = model(torch.tensor([prompt.tokens]), output_hidden_states=True).hidden_states[2][0]
            part = slice(first, first + len(prompt.positions))
            torch.testing.assert_close(rows[part], states[prompt.positions], rtol=1e-4, atol=1e-5)
            assert meta["positions"][part].tolist() == prompt.positions
            assert meta["token_ids"][part].tolist() == [prompt.tokens[p] for p in prompt.positions]
            assert set(meta["prompts"][part].tolist()) == {index}
            first = part.stop
        assert first == n
    prefix = prompts["train"][0].prefix
    assert store.manifest["data"]["shared_prefix"] == prefix and (prefix > 0) == (text == "chat")
    assert not set(range(1, prefix)) & set(store.meta("train")["positions"].tolist())


@pytest.mark.parametrize("text", ["plain", "chat"])
def test_one_pass_for_several_points_gives_the_bytes_of_a_pass_each(sources, tmp_path, text, monkeypatch):
    wanted = {(1, "resid_post"), (0, "resid_pre"), (2, "mlp_out"), (2, "resid_post"), (0, "attn_out")}
    points = [
        config_for(sources, tmp_path / "one", text=text, layer=layer, site=site, train_tokens=900)
        for layer, site in sorted(wanted)
    ]
    other = config_for(sources, tmp_path / "one", text=text, layer=0, train_tokens=800)
    passes = []
    real = stream.hidden_at_points
    monkeypatch.setattr(stream, "hidden_at_points", lambda lm, *rest: passes.append(rest[-1]) or real(lm, *rest))
    collect(points[1], device="cpu", shard_rows=SHARD_ROWS, also=[*points, other])
    assert {frozenset(of_pass) for of_pass in passes} == {frozenset(wanted)} and not store_folder(other).exists()
    for config in points:
        single = config.model_copy(update={"store_dir": str(tmp_path / "each")})
        collect(single, device="cpu", shard_rows=SHARD_ROWS)
        found, alone = (
            {path.name: path.read_bytes() for path in store_folder(one).iterdir() if path.name != "timing.json"}
            for one in (config, single)
        )
        assert found == alone and "manifest.json" in found


def test_the_sites_of_a_block_sum_to_the_residual_stream(sources, tmp_path):
    rows = {site: collected(config_for(sources, tmp_path, site=site)).rows("val") for site in SITES}
    before = collected(config_for(sources, tmp_path, layer=0)).rows("val")
    assert torch.equal(rows["resid_pre"], before)
    torch.testing.assert_close(rows["resid_pre"] + rows["attn_out"] + rows["mlp_out"], rows["resid_post"])
    store = collected(config_for(sources, tmp_path, layer=0, site="resid_pre"))
    embeddings = tiny_model("llama").get_input_embeddings().weight
    assert torch.equal(store.rows("val"), embeddings[store.meta("val")["token_ids"].long()])


def test_the_collect_command_makes_the_stores_of_all_layers_of_a_grid(sources, tmp_path):
    small = {"train_tokens": 300, "val_tokens": 100, "eval_prompts": 2, "batch_size": 64, **sources}
    small["store_dir"] = str(tmp_path / "stores")
    grid = Grid(name="g", title="G", constants=small, axes=[{"layer": [0, 1], "k": [4]}, {"layer": [2], "k": [4, 8]}])
    (tmp_path / "grid.yaml").write_text(json.dumps(grid.model_dump()))
    first, *others = dict.fromkeys(store_folder(run) for run in grid.runs())
    assert main(["collect", str(tmp_path / "grid.yaml"), first.name]) == 0
    assert (first / "baseline.json").exists() and len(others) == 2
    assert all((other / "manifest.json").exists() and not (other / "baseline.json").exists() for other in others)


def test_the_last_blocks_rows_are_not_the_models_last_hidden_states(sources, tmp_path):
    config = config_for(sources, tmp_path, layer=2)
    store, prompt = collected(config), make_prompts(config, AutoTokenizer.from_pretrained(sources["model"]))["train"][0]
    model, ids = tiny_model("llama"), torch.tensor([prompt.tokens])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        rows = store.rows("train")[: len(prompt.tokens)]
        torch.testing.assert_close(model.model.norm(rows), states, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows, states, atol=0.1)
    files = publish(tmp_path / "files", {"instruct_base_layer2.pt": torch.zeros(20, D_IN)})
    with pytest.raises(ConfigError, match="layer = 2: published files of the last block may hold states after the fin"):
        collect(config_for(sources, tmp_path, layer=2, activations=files))


def test_shards_mean_and_statistics(config):
    store = collected(config)
    assert [shard["rows"] for shard in store.manifest["shards"]["train"]] == [64] * 7 + [52]
    assert (store.d_in, store.n_train, store.n_val) == (D_IN, 500, 130)
    rows = store.rows("train").double()
    torch.testing.assert_close(store.mean, rows.mean(0).float())
    statistics = store.manifest["statistics"]["train"]
    assert statistics["pooled_variance"] == pytest.approx(rows.var(correction=0).item(), rel=1e-9)
    assert statistics["sq_norm_centred"] == pytest.approx((rows - rows.mean(0)).square().sum(1).mean().item(), rel=1e-9)
    assert statistics["median_norm"] == pytest.approx(rows.norm(dim=1).median().item(), rel=1e-6)
    first = rows[store.meta("train")["positions"] == 0]
    assert statistics["mean_norm_at_position_0"] == pytest.approx(first.norm(dim=1).mean().item(), rel=1e-6)
    model = store.manifest["model"]
    assert (model["attention"], model["architecture"]) == ("sdpa", "LlamaForCausalLM")
    assert model["model"] == config.model and store.model_sha256 == model["sha256"] and len(model["sha256"]) == 64
    raw = load_file(store.folder / "train-00000.safetensors")
    assert {name: tensor.dtype for name, tensor in raw.items()} == {
        **{"acts": torch.float32, "token_ids": torch.int32},
        **{"positions": torch.int32, "prompts": torch.int32},
    }


def test_the_same_parameters_give_the_same_bytes_and_float16_is_rounded_once(sources, tmp_path):
    one = collected(config_for(sources, tmp_path / "a"))
    two = collected(config_for(sources, tmp_path / "b"))
    assert one.data_sha256 == two.data_sha256
    assert (one.folder / "manifest.json").read_bytes() == (two.folder / "manifest.json").read_bytes()
    half = collected(config_for(sources, tmp_path, act_dtype="float16"))
    assert torch.equal(half.rows("val"), one.rows("val").half().float())


def test_tokens_beyond_the_vocabulary_are_told_before_any_row_is_collected(sources, tmp_path):
    model = shutil.copytree(sources["model"], tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|{i}|>" for i in range(5)] + ["+1="])  # in every answer
    tokenizer.save_pretrained(model)
    config = config_for(sources, tmp_path, model=str(model))
    with pytest.raises(ConfigError, match=r"tokenizer and model do not fit: the text has token 262 \('\+1='\)"):
        collect(config, "cpu")
    assert not store_folder(config).exists()


def test_a_store_is_collected_once(config):
    manifest = collect(config, "cpu", SHARD_ROWS) / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert collect(config, "cpu", SHARD_ROWS) == manifest.parent
    assert manifest.stat().st_mtime_ns == before
    assert not list(store_folder(config).parent.glob("*.part"))


def test_two_processes_do_not_both_collect(config):
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(collected(config))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 2 and stores[0].manifest == stores[1].manifest


def test_an_interrupted_collection_leaves_no_store(config, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", stop)  # as Ctrl-C would, with the first shards already written
        with pytest.raises(KeyboardInterrupt):
            collect(config, "cpu", SHARD_ROWS)
    with pytest.raises(StoreError, match="no activation store here"):
        open_store(config)
    leftover = store_folder(config).with_name(f".{config.store_id}.part")
    leftover.mkdir()  # as kill -9 would leave it
    (leftover / "train-00000.safetensors").write_bytes(b"half")
    assert collected(config).n_train == 500
    assert not leftover.exists()


def test_a_damaged_store_is_refused_with_the_files_name(config):
    folder = collected(config).folder
    shard = folder / "train-00003.safetensors"
    whole = shard.read_bytes()
    flipped(shard)
    with pytest.raises(StoreError, match=r"train-00003\.safetensors: damaged"):
        open_store(config).rows("train")
    with pytest.raises(StoreError, match=r"train-00003\.safetensors: damaged"):  # through the background thread
        list(open_store(config).batches("train", 50, seed=0))
    assert sum(map(len, open_store(config).batches("val", 50))) == 130  # what is whole can be read
    shard.write_bytes(whole[:-1])
    with pytest.raises(StoreError, match=r"train-00003\.safetensors: damaged \(\d+ bytes"):
        open_store(config)
    shard.unlink()
    with pytest.raises(StoreError, match=r"train-00003\.safetensors: No such file"):
        collect(config)
    shard.write_bytes(whole)
    assert open_store(config).rows("train").shape == (500, D_IN)
    flipped(folder / "mean.safetensors")
    with pytest.raises(StoreError, match=r"mean\.safetensors: damaged"):
        open_store(config)


def test_a_store_of_other_parameters_or_changed_sources_is_refused(sources, tmp_path):
    sources = {"model": save_model(tmp_path / "model"), "dataset": save_dataset(tmp_path / "data")}
    config = config_for(sources, tmp_path)
    folder = collected(config).folder
    other = config_for(sources, tmp_path, layer=2)
    folder.rename(store_folder(other))
    with pytest.raises(StoreError, match="made with layer = 1, where the run has 2"):
        collect(other)
    store_folder(other).rename(folder)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: not JSON"):
        open_store(config)
    (folder / "manifest.json").write_text(manifest)
    assert open_store(config).n_train == 500
    save_model(tmp_path / "model", "qwen2")
    with pytest.raises(StoreError, match=r": model, model/config\.json changed since"):
        open_store(config)
    save_model(tmp_path / "model", "llama")
    save_dataset(tmp_path / "data", train=41)
    with pytest.raises(StoreError, match=r"dataset/train\.jsonl changed since"):
        open_store(config)


@pytest.mark.parametrize("batch_size", [1, 37, 64, 500, 700])
@pytest.mark.parametrize("buffer_shards", [1, 3, 8])
def test_every_row_comes_once_in_every_epoch(store, batch_size, buffer_shards):
    rows = store.rows("train")
    seen = []
    for epoch in (0, 1):
        batches = list(store.batches("train", batch_size, seed=7, epoch=epoch, buffer_shards=buffer_shards))
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        seen.append(torch.cat(batches))
        assert sorted(map(tuple, seen[-1].tolist())) == sorted(map(tuple, rows.tolist()))
        assert not torch.equal(seen[-1], rows)
    assert not torch.equal(seen[0], seen[1])
    again = torch.cat(list(store.batches("train", batch_size, seed=7, buffer_shards=buffer_shards)))
    assert torch.equal(again, seen[0])
    other = torch.cat(list(store.batches("train", batch_size, seed=8, buffer_shards=buffer_shards)))
    assert not torch.equal(other, seen[0])
    assert torch.equal(torch.cat(list(store.batches("train", batch_size, buffer_shards=buffer_shards))), rows)


@pytest.mark.parametrize("seed", [None, 3])
def test_start_passes_over_batches(store, seed):
    whole = list(store.batches("train", 30, seed=seed, buffer_shards=2))
    for start in (0, 1, 3, 4, 5, 16, len(whole), len(whole) + 5):
        rest = list(store.batches("train", 30, seed=seed, start=start, buffer_shards=2))
        assert len(rest) == max(0, len(whole) - start)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_start_reads_no_shard_that_is_passed_over(config):
    store = collected(config)
    for shard in store.manifest["shards"]["train"][:4]:
        flipped(store.folder / shard["file"])
    assert len(list(store.batches("train", 64, start=4, buffer_shards=1))) == 4


def test_the_buffer_is_bounded(store):
    shard_of = {tuple(row): index // SHARD_ROWS for index, row in enumerate(store.rows("train").tolist())}
    # two shards at a time, shuffled together: 128 rows are 4 batches
    batches = list(store.batches("train", 32, seed=0, buffer_shards=2))
    groups = [
        {shard_of[tuple(row)] for batch in batches[first : first + 4] for row in batch.tolist()}
        for first in range(0, len(batches), 4)
    ]
    assert all(len(group) <= 4 for group in groups)  # two or three, and the last shard, which is smaller
    assert any(len({shard_of[tuple(row)] for row in batch.tolist()}) > 1 for batch in batches)  # and truly mixed


def test_the_background_thread_ends_when_the_iterator_is_dropped(store):
    before = threading.active_count()
    batches = store.batches("train", 1, seed=0)
    next(batches)
    assert threading.active_count() == before + 1
    del batches
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_values_that_cannot_be_stored_name_the_parameter(tmp_path):
    meta = (torch.zeros(2), torch.zeros(2), torch.zeros(2))
    writer = ShardWriter(tmp_path, "train", 3, torch.float16, 10)
    with pytest.raises(StoreError, match=r"act_dtype = 'float16': an activation of 7e\+04 is above its 65504"):
        writer.add(torch.tensor([[1.0, 2.0, 3.0], [7e4, 0.0, 0.0]]), *meta)
    with pytest.raises(StoreError, match="train activations hold NaN or infinity"):
        writer.add(torch.tensor([[1.0, 2.0, 3.0], [float("nan"), 0.0, 0.0]]), *meta)


# --- the published files ---


def published_config(sources, tmp_path, **parameters):
    return config_for(sources, tmp_path, activations=str(tmp_path / "files"), act_dtype="float16", **parameters)


def half_rows(n, d_in=D_IN, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)).half()


def test_published_train_and_val_files_are_read_wherever_they_lie(sources, tmp_path):
    train, val = half_rows(200), half_rows(50, seed=1)
    files = {"deep/er/instruct_base_layer1_train.pt": train, "instruct_base_layer1_val.pt": val}
    publish(tmp_path / "files", {**files, "instruct_base_layer2_train.pt": half_rows(9), "readme.pt": val})
    store = collected(published_config(sources, tmp_path))
    assert torch.equal(store.rows("train"), train.float()) and torch.equal(store.rows("val"), val.float())
    assert (store.n_train, store.n_val) == (200, 50)
    assert store.model_sha256 == files_sha256(weight_files(Path(sources["model"])))
    assert set(store.meta("train")["positions"].tolist()) == {-1}
    assert store.manifest["statistics"]["train"]["mean_norm_at_position_0"] is None
    assert "train_tokens and val_tokens do not apply" in store.manifest["data"]["note"]


def test_an_unsplit_published_file_is_split_by_its_own_rule(sources, tmp_path):
    whole = half_rows(101)
    publish(tmp_path / "files", {"instruct_base_layer1.pt": whole})
    store = collected(published_config(sources, tmp_path))
    torch.manual_seed(0)
    order = torch.randperm(101)
    assert torch.equal(store.rows("train"), whole[order[:81]].float())
    assert torch.equal(store.rows("val"), whole[order[81:]].float())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "needs instruct_base_layer1_train.pt and .*; its .pt files: none"),
        ({"instruct_base_layer2.pt": half_rows(9)}, r"its \.pt files: instruct_base_layer2\.pt"),
        ({"instruct_base_layer1_train.pt": half_rows(9)}, "needs instruct_base_layer1_train.pt and"),
        ({f"{part}/instruct_base_layer1.pt": half_rows(9) for part in "ab"}, "exists 2 times"),
        ({"instruct_base_layer1.pt": half_rows(9, D_IN + 1)}, rf"shape \[9, 17\]; rows of .* need \[n, {D_IN}\]"),
        ({"instruct_base_layer1.pt": half_rows(9)[0]}, r"shape \[16\]"),
        ({"instruct_base_layer1.pt": {"acts": half_rows(9)}}, "holds dict, not a tensor"),
        ({"instruct_base_layer1.pt": torch.zeros(9, D_IN, dtype=torch.int64)}, "not a tensor of floating-point"),
        ({"instruct_base_layer1.pt": torch.full((9, D_IN), 1e5)}, "act_dtype = 'float16'"),
        ({"instruct_base_layer1.pt": half_rows(4)}, "instruct_base_layer1.pt: 4 rows; needs at least 5"),
    ],
)
def test_published_files_of_another_form_are_one_line(sources, tmp_path, files, message):
    (tmp_path / "files").mkdir()
    publish(tmp_path / "files", files)
    config = published_config(sources, tmp_path)
    with pytest.raises((ConfigError, StoreError), match=message) as error:
        collect(config)
    assert "\n" not in str(error.value)
    assert not store_folder(config).exists()


def test_a_published_file_that_is_no_tensor_file_runs_no_code(sources, tmp_path):
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "instruct_base_layer1.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    for content in (pickle.dumps(Evil()), b"not a file of torch"):
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"instruct_base_layer1\.pt: not a saved tensor"):
            collect(published_config(sources, tmp_path))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("published", [False, True])
def test_prompts_longer_than_the_model_takes_are_told_before_any_row_is_made_or_read(tmp_path, published):
    files = publish(tmp_path / "files", {"instruct_base_layer1.pt": half_rows(50)})
    (tmp_path / "long").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"{split} {letter * 80}", "answer": "y"}) + "\n" for letter in "abcd"]
        (tmp_path / "long" / f"{split}.jsonl").write_text("".join(lines))
    gpt2 = {"model": save_model(tmp_path / "gpt2", "gpt2"), "dataset": str(tmp_path / "long")}  # 64 positions
    small = {"train_tokens": 1, "val_tokens": 1, "eval_prompts": 1, "activations": files if published else ""}
    config = config_for(gpt2, tmp_path, **small)
    with pytest.raises(ConfigError, match=r"max_tokens = 512: .* takes at most 64"):
        collect(config)
    assert not store_folder(config).exists()
    assert collect(config.model_copy(update={"max_tokens": 64})).exists()


def test_changed_published_files_are_noticed(sources, tmp_path):
    publish(tmp_path / "files", {"instruct_base_layer1.pt": half_rows(20)})
    config = published_config(sources, tmp_path)
    assert collected(config).n_train == 16
    publish(tmp_path / "files", {"instruct_base_layer1.pt": half_rows(20, seed=5)})
    with pytest.raises(StoreError, match="activations changed since"):
        open_store(config)


def test_store_opens_by_its_folder_alone(config):
    assert Store(collected(config).folder).n_val == 130


def test_the_identity_of_the_prompts_is_the_hash_of_their_json(sources, tmp_path):
    config = config_for(sources, tmp_path)
    prompts = make_prompts(config, AutoTokenizer.from_pretrained(sources["model"]))
    text = json.dumps({split: [prompt.record() for prompt in some] for split, some in prompts.items()})
    assert collected(config).manifest["data"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
