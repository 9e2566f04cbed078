"""The language model's two halves against the whole, on tiny seeded models of every known layout."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import D_IN, LAYOUTS, N_LAYERS, VOCAB, save_model, tiny_model, tiny_tokenizer
from transformers import OPTConfig, OPTForCausalLM

from saegrid.config import make_config
from saegrid.errors import ConfigError, SaegridError
from saegrid.lm import final_from, hidden_at, lm_shape, load_lm, logits_from, take_apart


def padded(*lengths):
    """Random prompts of some lengths, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(0, VOCAB, mask.shape, generator=generator), mask


@pytest.fixture(params=LAYOUTS)
def lm(request):
    return take_apart(tiny_model(request.param), None, {})


def replaced_forward(lm, x, ids, mask, layer):
    """A full forward pass whose block `layer` has its output replaced by a hook."""

    def hook(module, args, output):
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = lm.blocks[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    handle.remove()
    return logits


def test_hidden_at_is_the_output_of_the_block(lm):
    ids, mask = padded(9, 5)
    with torch.no_grad():
        states = lm.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # behind the last block, transformers returns the normed states
        torch.testing.assert_close(hidden_at(lm, ids, mask, layer), states[layer + 1])
    assert (lm.d_in, lm.n_layers) == (D_IN, N_LAYERS)


def test_hidden_at_does_not_run_the_blocks_behind(lm):
    ids, mask = padded(6)
    before = hidden_at(lm, ids, mask, 1)
    for parameter in lm.blocks[2].parameters():
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(hidden_at(lm, ids, mask, 1), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_restart_equals_the_full_pass_with_the_output_replaced(lm, layer):
    ids, mask = padded(12, 7, 3)
    x = torch.randn(*ids.shape, D_IN, generator=torch.Generator().manual_seed(2))
    wanted = replaced_forward(lm, x, ids, mask, layer)
    for parameter in [p for block in lm.blocks[: layer + 1] for p in block.parameters()]:
        parameter.data.fill_(float("nan"))  # nothing up to the hooked block may run
    real = mask.bool()
    torch.testing.assert_close(logits_from(lm, x, ids, mask, layer)[real], wanted[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_both_halves_make_the_whole(lm, layer):
    ids, mask = padded(10, 4)
    with torch.no_grad():
        whole = lm.model(input_ids=ids, attention_mask=mask).logits
    final = final_from(lm, hidden_at(lm, ids, mask, layer), ids, mask, layer)
    real = mask.bool()
    torch.testing.assert_close(lm.head(final[real]), whole[real], rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_the_batch(lm):
    lengths = (12, 7, 3)
    ids, mask = padded(*lengths)
    batched = hidden_at(lm, ids, mask, 1)
    final = final_from(lm, batched, ids, mask, 1)
    for row, length in enumerate(lengths):
        alone, ones = ids[row : row + 1, :length], mask[row : row + 1, :length]
        single = hidden_at(lm, alone, ones, 1)
        torch.testing.assert_close(batched[row, :length], single[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final[row, :length], final_from(lm, single, alone, ones, 1)[0], rtol=1e-4, atol=1e-4)


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
    config = OPTConfig(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(SaegridError, match=r"OPTForCausalLM: unknown layout.*model\.gpt_neox\.layers"):
        take_apart(OPTForCausalLM(config), None, {})


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
        str(tmp_path / "file"): "a file, where a folder",
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


def test_weights_that_are_damaged_or_incomplete_are_one_line(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a causal language model that loads"):
        load_lm(config_for(folder))
    model = tiny_model("gpt2")
    state = {name: tensor for name, tensor in model.state_dict().items() if "h.1.mlp.c_fc.weight" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ConfigError, match="its weights lack 1 tensors"):
        load_lm(config_for(folder))


def test_importing_the_module_and_asking_for_the_shape_needs_no_torch():
    code = (
        "import sys; from saegrid.config import make_config; from saegrid.lm import lm_shape\n"
        "assert lm_shape(make_config(k=4)) == (576, 30)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
