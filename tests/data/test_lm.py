"""The language model's two halves against the whole, on tiny seeded models; `test_zoo.py` has padded texts."""

import json
import subprocess
import sys

import pytest
import torch
import zoo
from tiny import D_IN, LAYOUTS, N_LAYERS, VOCAB, replacing, save_model, tiny_model, tiny_tokenizer
from transformers import AutoConfig

from saegrid.config.run_config import make_config
from saegrid.data.language_model import check_tokens, final_from, hidden_at, lm_shape, load_lm, logits_from, take_apart
from saegrid.errors import ConfigError, SaegridError


def padded(*lengths):
    """Random prompts of some lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(0, VOCAB, mask.shape, generator=generator), mask


@pytest.fixture(params=LAYOUTS)
def lm(request):
    return take_apart(tiny_model(request.param), None, {})


def test_hidden_at_does_not_run_the_blocks_after_it(lm):
    ids, mask = padded(6)
    before = hidden_at(lm, ids, mask, 1)
    for parameter in lm.blocks[2].parameters():
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(hidden_at(lm, ids, mask, 1), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_restart_equals_the_full_pass_with_the_output_replaced(lm, layer):
    ids, mask = padded(12, 7, 3)
    x = torch.randn(*ids.shape, D_IN, generator=torch.Generator().manual_seed(2))
    with replacing(lm.blocks[layer], lambda rows: x), torch.no_grad():
        wanted = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for parameter in [p for block in lm.blocks[: layer + 1] for p in block.parameters()]:
        parameter.data.fill_(float("nan"))  # nothing up to the hooked block may run
    real = mask.bool()
    torch.testing.assert_close(logits_from(lm, x, ids, mask, layer)[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_both_halves_make_the_whole(lm, layer):
    ids, mask = padded(10, 4)
    with torch.no_grad():
        whole = lm.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    x, real = hidden_at(lm, ids, mask, layer), mask.bool()
    if layer < N_LAYERS - 1:  # after the last block, transformers returns the normed states
        torch.testing.assert_close(x, whole.hidden_states[layer + 1])
    final = final_from(lm, x, ids, mask, layer)
    torch.testing.assert_close(lm.head(final[real]), whole.logits[real], rtol=1e-5, atol=1e-5)
    assert (lm.d_in, lm.n_layers) == (D_IN, N_LAYERS)


def test_the_model_is_itself_again_afterwards_even_when_a_pass_fails(lm):
    ids, mask = padded(8, 6)
    with torch.no_grad():
        before = lm.model(input_ids=ids, attention_mask=mask).logits
    with pytest.raises(RuntimeError):
        final_from(lm, torch.zeros(2, 8, D_IN + 1), ids, mask, 0)  # of a width that no block takes
    with pytest.raises(RuntimeError):
        lm.head(torch.zeros(3, D_IN + 1))
    hidden_at(lm, ids, mask, 0)
    with torch.no_grad():
        after = lm.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in lm.model.modules())


def test_unknown_layout_is_a_clear_error():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(SaegridError, match="LlamaForCausalLM: unknown layout; no one list of 5 blocks in it"):
        take_apart(model, None, {})


def test_blocks_that_look_back_past_the_layer_are_an_error():
    """Gemma 4's last blocks take keys and values from the last block before them that makes its own."""
    shared = {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * zoo.N_LAYERS}
    model = zoo.zoo_model("gemma4_text", zoo.RIGHT["gemma4_text"] | shared)
    assert take_apart(model, None, {}, 0).n_layers == zoo.N_LAYERS
    with pytest.raises(SaegridError, match="Gemma4ForCausalLM: unknown layout"):
        take_apart(model, None, {}, 2)


def test_blocks_that_share_more_than_the_residual_stream_are_an_error():
    model = tiny_model("llama")
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + seen[-1])
    with pytest.raises(SaegridError, match="more than the residual stream"):
        take_apart(model, None, {})


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", "gpt2")
    return tmp_path / "model"


def config_for(model, **parameters):
    return make_config(model=str(model), k=4, **{"layer": 1, **parameters})


def test_local_folder_loads_and_is_identified_by_its_weights(folder):
    config = config_for(folder)
    assert lm_shape(config) == (D_IN, N_LAYERS)
    lm = load_lm(config)
    ids, mask = padded(5)
    torch.testing.assert_close(
        hidden_at(lm, ids, mask, 1), hidden_at(take_apart(tiny_model("gpt2"), 0, {}), ids, mask, 1)
    )
    assert lm.tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    assert lm.max_positions == 64
    before = lm.identity
    assert before["model"] == str(folder) and len(before["sha256"]) == 64
    with torch.no_grad():
        lm.model.transformer.wte.weight[0, 0] += 1
    lm.model.save_pretrained(folder)
    assert load_lm(config).identity["sha256"] != before["sha256"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untrained_model_is_that_of_its_seed(folder, dtype):
    """Control `model_init = "random"`: another model of the same shape, embeddings too, the same each time."""
    config = config_for(folder, model_init="random", lm_dtype=dtype, data_seed=2)
    before = torch.get_rng_state()
    one, again, trained = load_lm(config), load_lm(config), load_lm(config_for(folder, lm_dtype=dtype))
    other = load_lm(config_for(folder, model_init="random", lm_dtype=dtype, data_seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.identity == again.identity
    assert len({lm.identity["sha256"] for lm in (one, other, trained)}) == 3
    embeddings = [lm.model.get_input_embeddings().weight for lm in (one, again, trained, other)]
    assert torch.equal(embeddings[0], embeddings[1]) and embeddings[0].dtype == getattr(torch, dtype)
    assert not any(torch.equal(embeddings[0], weights) for weights in embeddings[2:])


def test_lm_dtype_is_the_precision_of_the_passes(folder):
    lm = load_lm(config_for(folder, lm_dtype="bfloat16"))
    ids, mask = padded(5)
    assert hidden_at(lm, ids, mask, 1).dtype == torch.bfloat16
    exact = hidden_at(load_lm(config_for(folder)), ids, mask, 1)
    error = (hidden_at(lm, ids, mask, 1).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_missing_folder_file_or_layer_is_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        str(tmp_path / "nowhere"): "no such folder",
        str(tmp_path / "empty"): "no config.json in this folder",
        str(tmp_path / "file"): "a file; must be a folder",
        "embedded:other": "no such embedded model; there is embedded:smollm2-135m-instruct",
    }
    for model, message in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            lm_shape(config_for(model))
        assert repr(model) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"layer = 3: .* has layers 0 to 2"):
        load_lm(config_for(folder, layer=3))


def test_a_config_that_is_no_language_models_is_one_line(folder):
    for content in ("{", "[]", "{}", json.dumps({"hidden_size": 16}), json.dumps({"hidden_size": "x"})):
        (folder / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json is not a language model's"):
            lm_shape(config_for(folder))


@pytest.mark.parametrize("kind", ["t5", "bart", "llava", "clip"])
def test_a_model_that_is_not_decoder_only_is_one_line(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"transformers has no decoder-only language model of model_type = '{kind}'"):
        lm_shape(config_for(tmp_path))


@pytest.fixture
def own_code(folder, monkeypatch):
    """A model's folder with Python code in it, which must neither run nor be asked about."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        text = f"open({str(folder / 'MARKER')!r}, 'w').write('ran')\nfrom transformers import *\nXConfig = GPT2Config\n"
        (folder / f"{name}.py").write_text(text)
    yield folder
    assert not (folder / "MARKER").exists()


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.GPT2LMHeadModel"}


def test_code_in_a_models_folder_is_not_run(own_code):
    changed(own_code / "config.json", auto_map=CODE)  # of a type that transformers has code for
    assert type(load_lm(config_for(own_code)).model).__module__.startswith("transformers.")
    changed(own_code / "config.json", model_type="xmodel")
    for ask in (lm_shape, load_lm):
        with pytest.raises(ConfigError, match=r"needs Python code of its own \(auto_map\)"):
            ask(config_for(own_code))


def test_code_of_a_tokenizer_is_not_run(own_code):
    places = {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}
    changed(own_code / "tokenizer_config.json", auto_map=places, tokenizer_class="XTokenizer")
    assert load_lm(config_for(own_code)).tokenizer("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
    (own_code / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer can't be loaded: it needs Python code of its own"):
        load_lm(config_for(own_code))


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its tokenizer can't be loaded: "):
        load_lm(config_for(tmp_path))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt_neo", "mpt", "opt", "qwen3_5"])
def test_other_models_load_from_a_folder(kind, tmp_path):
    """Shape by the config's own names; attention by what the model has, not by what its file asks for."""
    model = zoo.zoo_model(kind, zoo.RIGHT[kind])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    changed(tmp_path / "config.json", attn_implementation="flash_attention_2")
    config = config_for(tmp_path)
    assert lm_shape(config) == (32, zoo.N_LAYERS)
    lm, ids = load_lm(config, "cpu"), torch.arange(3, 40)[None]
    assert lm.identity["attention"] == ("eager" if kind in ("gemma2", "gpt_neo", "mpt") else "sdpa")
    ones = torch.ones_like(ids)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(logits_from(lm, hidden_at(lm, ids, ones, 1), ids, ones, 1), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_whose_weights_hold_nan_is_one_line():
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SaegridError, match="LlamaForCausalLM: its logits are NaN"):
        take_apart(model, tiny_tokenizer(), {})


def test_a_text_that_does_not_fit_the_model_is_one_line(folder):
    config = config_for(folder, max_tokens=100)
    lm = load_lm(config, "cpu")
    check_tokens(config, lm, [[1, 2], [VOCAB - 1] * 64])
    with pytest.raises(ConfigError, match=r"max_tokens = 100: .* takes at most 64"):
        check_tokens(config, lm, [[1, 2], [1] * 65])
    with pytest.raises(ConfigError, match=r"context = 65: .* takes at most 64"):
        check_tokens(config_for(folder, context=65), lm, [[1, 2], [1] * 65])
    with pytest.raises(
        ConfigError, match=rf"do not fit: the text has token {VOCAB} .* embeddings for 0 to {VOCAB - 1}"
    ):
        check_tokens(config, lm, [[1, 2], [1, VOCAB]])


def test_a_model_whose_config_does_not_name_its_longest_text_is_tried():
    lm = take_apart(zoo.zoo_model("mpt", {"max_seq_len": 16}), tiny_tokenizer(), {})
    check_tokens(config_for("m"), lm, [[1] * 16, [1]])
    with pytest.raises(ConfigError, match="max_tokens = 512: m fails on a prompt of 17 tokens: "):
        check_tokens(config_for("m"), lm, [[1], [1] * 17])


def test_weights_that_are_damaged_or_incomplete_are_one_line(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="does not load as a causal language model"):
        load_lm(config_for(folder))
    model = tiny_model("gpt2")
    state = {name: tensor for name, tensor in model.state_dict().items() if "h.1.mlp.c_fc.weight" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ConfigError, match="its weights lack 1 tensors"):
        load_lm(config_for(folder))


def test_importing_the_module_and_asking_for_the_shape_needs_no_torch():
    code = (
        "import sys\nfrom saegrid.config.run_config import make_config\n"
        "from saegrid.data.language_model import lm_shape\n"
        "assert lm_shape(make_config(k=4)) == (576, 30)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
