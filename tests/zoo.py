"""Tiny random models of many architectures of transformers, and their table in the docs.

`python tests/zoo.py` rewrites the table.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from saegrid.config.run_config import SITES
from saegrid.data.language_model import take_apart
from saegrid.errors import ConfigError, SaegridError

DOC = Path(__file__).parents[1] / "docs/models.md"
LAYER = 1

N_LAYERS, VOCAB = 4, 260
SMALL = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # a large initializer range makes attention and MLP matter next to the embeddings
    **{"initializer_range": 0.3, "init_std": 0.3, "tie_word_embeddings": False},
}
"""Values for every config that knows these names; windows are shorter than the texts."""
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
PICTURES = {"vision_config": VISION | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4}
RIGHT = {
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {},
    "ctrl": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": {},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "falcon": {},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
    "gemma3": {"text_config": SMALL, "image_token_index": 259} | PICTURES,
    "gemma3_text": {},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "jamba": {},
    "jetmoe": {},
    "lfm2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minicpm3": LATENT,
    "minimax_m2": {},
    "ministral": {},
    "mistral": {},
    "mixtral": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {"text_config": SMALL},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
}
"""Architectures that agree with transformers' own forward pass, with what their configs need besides `SMALL`."""
REFUSED = {
    "bert": ({}, "depend on later tokens"),
    "deepseek_v4": ({}, "returns (8, 4, 32) for 8 tokens"),
    "gemma3n_text": (
        {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
        "returns (2, 8, 32) for 8 tokens",
    ),
    "prophetnet": ({}, "depend on later tokens"),
    "roberta": ({}, "depend on later tokens"),
    "xlnet": ({"d_head": 8}, "depend on later tokens"),
    "zaya": ({"num_experts_per_tok": 1}, "more than the residual stream"),
}
"""Architectures that are refused in one line, with config values and a part of that line."""


def zoo_config(kind, parameters):
    """A tiny config of a `model_type`."""
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    return AutoConfig.for_model(kind, **{name: SMALL[name] for name in SMALL if name in known} | parameters)


def zoo_model(kind, parameters, attention=None):
    """A tiny random model of a `model_type`, with the same weights at every call."""
    torch.manual_seed(0)
    config = zoo_config(kind, parameters)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def row(kind):
    """The table row of an architecture in the docs."""
    if kind in RIGHT:
        return right_row(kind, take_apart(zoo_model(kind, RIGHT[kind]), None, {}, LAYER))
    model = zoo_model(kind, REFUSED[kind][0])
    try:
        take_apart(model, None, {}, LAYER)
    except SaegridError as error:
        return f"| {type(model).__name__} | `{kind}` | {str(error).split(': ', 1)[1]} |"


def right_row(kind, lm):
    """The table row of an architecture that is taken apart: with all sites, or those of its block `LAYER`."""
    model, sites = lm.model, ", ".join(site for site in SITES if has(lm, site))
    sites = "all" if sites == ", ".join(SITES) else sites
    return f"| {type(model).__name__} | `{kind}` | {model.config._attn_implementation} | {sites} |"


def has(lm, site):
    """Whether block `LAYER` has a site."""
    try:
        return bool(lm.module(LAYER, site))
    except ConfigError:
        return False


def document(rows):
    """The page of all architectures, from their rows by `model_type`."""
    right, refused = ("\n".join(rows[kind] for kind in some) for some in (RIGHT, REFUSED))
    return f"""# Language models

`model` takes decoder-only language models that transformers loads by `AutoModelForCausalLM` from its own code. Width
and depth come from the model's config, in whatever names it has them; of a model for text and images, the text part is
used. Attention is sdpa where transformers has it for the model, and eager elsewhere; a store's manifest records which.

After a model is loaded, and before any row is collected, two short texts go through it whole, and up to the `site` of
block `layer` and on from there. A model whose parts do not give its own logits is refused in one line, and so are a
text with tokens that it has no embeddings for, an encoder-decoder or masked model, and a model or tokenizer that needs
Python code of its own (`trust_remote_code` is off, and there is no option for it).

## Sites

`site` is what is read in block `layer`, and replaced in the splice:

| `site` | rows | in TransformerLens and SAELens |
| --- | --- | --- |
| `resid_post` (default) | the residual stream after the block | `blocks.L.hook_resid_post` |
| `resid_pre` | the residual stream before the block; before block 0: the embedding | `blocks.L.hook_resid_pre` |
| `mlp_out` | what the block's MLP adds to the residual stream | `blocks.L.hook_mlp_out` |
| `attn_out` | what its attention adds | `blocks.L.hook_attn_out` |

Attention and MLP are found by running a short text: they are the two of the block's modules whose outputs and the
block's input sum to the block's output. In Gemma 2 these are the norms after attention and MLP. A block in which no two
modules do, or in which `attn_out` would be something else (a state space, a convolution), is refused in one line; its
residual stream can still be read. The last column of the table is for block 1 of these models; in a hybrid model other
blocks may differ.

Several layers and sites of one grid are collected in one pass of the model, each with the bytes of a pass of its own.
Published activation files hold `resid_post`. At `mlp_out` and `attn_out` an SAE's splice runs the whole model, since
the block needs the residual stream besides; in the residual stream it runs the blocks after the site.

**Transcoders** (`mlp_in` to `mlp_out`, arXiv:2501.18823) are not trained here. Each row would be a pair, so a store
would hold twice the values, and the error, its gradient, AuxK's residual, the fused CPU kernels and the GPU kernel
would take a target other than their input, as would `b_dec`, the recipes' scale, sinks and tied encoder, and every
measure. That is a change of each part of the library, not a flag. What is there: both sites' modules, the splice at
`mlp_out`, and one pass for several sites.

## Tested

Tiny random models of these {len(RIGHT)} architectures agree to 1e-5 with eager passes of the whole model, without
padding: rows at each site of a block in the middle, logits, and logits with other rows put in their place (at
`mlp_out` and `attn_out` to 1e-4).
Others may work as well: the check tells.

| Architecture | `model_type` | Attention | Sites |
| --- | --- | --- | --- |
{right}

## Refused

| Architecture | `model_type` | Message |
| --- | --- | --- |
{refused}
"""


if __name__ == "__main__":
    DOC.write_text(document({kind: row(kind) for kind in [*RIGHT, *REFUSED]}))
