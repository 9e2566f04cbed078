"""The splice evaluator against a direct computation: one prompt at a time, full passes, nothing shared."""

import math

import pandas as pd
import pytest
import torch
import transformers
from tiny import replacing

from saegrid.config.run_config import SITES, make_config
from saegrid.core.evaluation import on_prompts, reconstructed
from saegrid.core.metrics import splice_metrics
from saegrid.core.sae import TopK
from saegrid.core.splice import (
    ReferencePasses,
    evaluate,
    load_references,
    make_references,
    mean_losses,
    replaced_positions,
    save_references,
    scored_positions,
    token_scores,
    with_shared,
)
from saegrid.data.language_model import load_lm, narrow_products, take_apart
from saegrid.data.prompts import Prompt, make_prompts
from saegrid.errors import StoreError
from saegrid.kernels import cpu, reference

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4}
CONFIGS = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)),
    "Qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(num_key_value_heads=3, **SIZES)),
    "GPT-NeoX": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SIZES)),
    "GPT-2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=61, n_embd=24, n_head=3, n_layer=4)),
}
ATTENTION = {"GPTNeoXForCausalLM": "attention", "GPT2LMHeadModel": "attn"}
"""A block's attention; elsewhere `self_attn`."""


@pytest.fixture(params=CONFIGS)
def lm(request):
    model_class, config = CONFIGS[request.param]
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # initial weights are so small that every block is nearly the identity
    return take_apart(model.eval(), None, {})


def some_prompts(prefix=0):
    generator = torch.Generator().manual_seed(1)
    lengths = [9, 31, 2, 17, 12]
    tokens = [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(ids, template=index // 2, prefix=prefix) for index, ids in enumerate(tokens)]


def shift(x):
    return x.roll(1, dims=-1)


def direct(lm, prompt, layer, replace, site="resid_post"):
    """Summed loss of one prompt."""
    positions, log_q = predicted(lm, prompt, layer, replace, site)
    targets = torch.tensor(prompt.tokens)[[position + 1 for position in positions]]
    return -log_q[range(len(positions)), targets].sum().item()


def predicted(lm, prompt, layer, replace, site="resid_post"):
    """One prompt's scored positions and log-probabilities there: a full forward pass with the site's rows replaced."""
    positions = [0, *range(max(1, prompt.prefix), len(prompt.tokens) - 1)] if len(prompt.tokens) > 1 else []

    def replaced(x):
        x = x.clone()
        x[0, positions] = replace(x[0, positions]).to(x)
        return x

    name = {"mlp_out": "mlp", "attn_out": ATTENTION.get(type(lm.model).__name__, "self_attn")}.get(site, "")
    module = lm.blocks[layer].get_submodule(name)
    with replacing(module, replaced, before=site == "resid_pre"), torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt.tokens])).logits[0].double()
    scored = [position for position in positions if position + 1 not in prompt.shared]
    return scored, logits[scored].log_softmax(-1)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("site", SITES)
def test_agrees_with_the_direct_computation(lm, layer, prefix, site):
    """Nats per token within 1e-4 of a hook on the module that the layout's code names, at every site."""
    prompts = [prompt for prompt in some_prompts(prefix) if len(prompt.tokens) > prefix + 1]
    mean = torch.linspace(-1, 1, 24)
    sums = evaluate(lm, make_references(lm, prompts, layer, mean, site), layer, shift, site)
    passes = {"clean": lambda x: x, "spliced": shift, "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    for name, replace in passes.items():
        expected = [direct(lm, prompt, layer, replace, site) for prompt in prompts]
        assert sums[f"ce_{name}_sum"].tolist() == pytest.approx(expected, abs=1e-4), name
    assert sums["ce_spliced_sum"].tolist() != pytest.approx(sums["ce_clean_sum"].tolist(), abs=1e-2)


def test_agrees_on_the_embedded_model():
    """Nats per token within 1e-4, prompts of different lengths in one batch against one at a time."""
    config = make_config(k=64, train_tokens=10, val_tokens=10, eval_prompts=4)
    lm = load_lm(config)
    mean = torch.linspace(-1, 1, lm.d_in)
    baseline = make_references(lm, make_prompts(config, lm.tokenizer)["eval"], 12, mean)
    prompts = baseline.prompts
    shared = lm.tokenizer.decode([prompts[0].tokens[index] for index in prompts[0].shared])
    assert shared == "? Give the result as your final answer. Do not include units.\n"
    sums = evaluate(lm, baseline, 12, shift)
    for name, replace in {"clean": lambda x: x, "spliced": shift, "zero": torch.zeros_like}.items():
        expected = [direct(lm, prompt, 12, replace) for prompt in prompts]
        difference = (sums[f"ce_{name}_sum"] - expected) / sums["n_tokens"]
        assert difference.abs().max() < 1e-4, name
    assert 1 < mean_losses(sums)["clean"] < 4  # it reads English


@pytest.mark.parametrize("layer", [0, 3])
def test_kl_is_that_of_whole_passes_in_float64(lm, layer):
    """Nats per token within 1e-6, and the cross-entropies too: what is left is the float32 of the log-probabilities."""
    lm.model.double()
    prompts = some_prompts(prefix=2)[:2] + some_prompts()[3:]
    prompts = [Prompt([*p.tokens[:7], *range(8), *p.tokens[7:]], p.template, p.prefix) for p in prompts]
    baseline = make_references(lm, prompts, layer, torch.zeros(24))
    sums = evaluate(lm, baseline, layer, shift)
    for index, prompt in enumerate(baseline.prompts):
        (_, log_p), (_, log_q) = (predicted(lm, prompt, layer, how) for how in (lambda x: x.float(), shift_32))
        expected = sum(p.exp().item() * (p - q).item() for p, q in zip(log_p.flatten(), log_q.flatten(), strict=True))
        assert sums["kl_sum"][index] / len(log_p) == pytest.approx(expected / len(log_p), abs=1e-6)
        spliced = direct(lm, prompt, layer, shift_32) / len(log_p)
        assert sums["ce_spliced_sum"][index] / len(log_p) == pytest.approx(spliced, abs=1e-6)
        assert sums["n_tokens"][index] == len(log_p) == len(prompt.tokens) - 1 - max(prompt.prefix - 1, 0) - 8
    assert mean_losses(sums)["kl"] == sums["kl_sum"].sum() / sums["n_tokens"].sum() > 0.01


def test_kl_from_the_clean_pass_unembedded_once(lm):
    """Per token within 1e-5 of the sum over the vocabulary; capped logits are not linear in the states."""
    prompts = some_prompts()
    baseline = make_references(lm, prompts, 2, torch.zeros(24))
    assert [one.shape for one in baseline.expected] == [(len(p.tokens) - 1, 25) for p in prompts]
    final = [shift(states) for states in baseline.clean]
    whole = token_scores(lm, prompts, final, baseline.clean)
    short = token_scores(lm, prompts, final, baseline.clean, baseline.expected)
    assert short["kl"].to_numpy() == pytest.approx(whole["kl"].to_numpy(), abs=1e-5) and whole["kl"].min() > 1e-3
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 24, "head_dim": 8, "num_key_value_heads": 3, "pad_token_id": 0}
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=1.0, attn_implementation="eager")
    capped = take_apart(transformers.Gemma2ForCausalLM(config).eval(), None, {})
    baseline = make_references(capped, prompts, 2, torch.zeros(24))
    assert baseline.expected == []
    assert evaluate(capped, baseline, 2, shift)["kl_sum"].min() > 0


def shift_32(x):
    return shift(x.float())


class Words:
    """A model whose final states are its logits."""

    @staticmethod
    def head(states):
        return states


def test_kl_by_hand():
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): ½ log 2 - ¼ log 2; p = (1, 0) and q = (1/4, 3/4): log 4."""
    p = [[0.5, 0.25, 0.25], [1.0, 1e-38, 1e-38], [0.2, 0.3, 0.5]]
    q = [[0.25, 0.5, 0.25], [0.25, 0.375, 0.375], [0.2, 0.3, 0.5]]
    clean, final = ([torch.tensor(rows[:2]).log() + 3, torch.tensor(rows[2:]).log()] for rows in (p, q))
    prompts = [Prompt([1, 0, 2], 0), Prompt([0, 1], 1)]
    found = token_scores(Words, prompts, final, clean)
    assert found["prompt"].tolist() == [0, 0, 1]
    assert found["kl"].tolist() == pytest.approx([math.log(2) / 4, math.log(4), 0], abs=1e-6)
    assert found["ce"].tolist() == pytest.approx([math.log(4), -math.log(0.375), -math.log(0.3)], abs=1e-6)
    assert list(token_scores(Words, prompts, final)) == ["prompt", "ce"]


def test_a_sentence_that_all_prompts_share_is_replaced_but_not_scored():
    """0 to 8 are in all three prompts. 20, 21 are too, but are shorter than `SHARED_RUN`."""
    sentence = [*range(9)]
    prompts = [
        Prompt([30, *sentence, 31, 20, 21], 0),
        Prompt([32, 33, *sentence, 34, 20, 21, 35], 1),
        Prompt([36, 36, 36, 20, 21, *sentence], 2),
    ]
    marked = with_shared(prompts)
    assert [prompt.shared for prompt in marked] == [[*range(1, 10)], [*range(2, 11)], [*range(5, 14)]]
    assert [scored_positions(p).tolist() for p in marked] == [[9, 10, 11], [0, 10, 11, 12, 13], [0, 1, 2, 3]]
    assert replaced_positions(marked[0]).tolist() == [*range(12)]
    assert with_shared([*prompts, Prompt(sentence[:-1], 3)]) == [*prompts, Prompt(sentence[:-1], 3)]  # no such run
    short = [*prompts, Prompt([*sentence, 5][1:], 3)]  # 1 to 8 are shared, and 5 is left to score
    assert scored_positions(with_shared(short)[3]).tolist() == [7]
    bare = [*prompts, Prompt(sentence, 3)]  # would have nothing to score
    assert with_shared(bare) == bare
    assert with_shared(prompts[:1]) == prompts[:1]
    chat = [Prompt([*sentence, 30 + n, *sentence], n, prefix=9) for n in (0, 1)]
    assert [scored_positions(prompt).tolist() for prompt in with_shared(chat)] == [[0], [0]]


def test_the_true_activations_recover_everything(lm):
    baseline = make_references(lm, some_prompts(), 2, torch.zeros(24))
    result = splice_metrics(**mean_losses(evaluate(lm, baseline, 2, lambda x: x)))
    assert result["delta_loss"] == 0 and result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["loss_recovered_zero"] == 1 and result["frac_rec_pct"] == 100


def test_the_losses_are_summed_before_they_are_divided():
    sums = pd.DataFrame({"n_tokens": [1, 3], **{f"ce_{name}_sum": [4.0, 0.0] for name in PASSES}})
    assert mean_losses(sums.assign(kl_sum=[2.0, 0.0])) == dict.fromkeys(PASSES, 1.0) | {"kl": 0.5}


PASSES = ("clean", "spliced", "zero", "mean")


def test_what_is_replaced_and_scored():
    assert scored_positions(Prompt([7, 8, 9, 10], 0)).tolist() == [0, 1, 2]
    assert scored_positions(Prompt([7, 8, 9, 10, 11], 0, prefix=3)).tolist() == [0, 3]


def test_a_baseline_comes_back_as_it_was_saved(lm, tmp_path):
    assert load_references(tmp_path) is None
    baseline = make_references(lm, some_prompts(), 1, torch.zeros(24))
    save_references(baseline, tmp_path)
    back = load_references(tmp_path)
    assert back.prompts == baseline.prompts
    pd.testing.assert_frame_equal(back.sums, baseline.sums)
    for name in ("x", "clean", "expected"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(back, name), getattr(baseline, name), strict=True))
    content = (tmp_path / "baseline.safetensors").read_bytes()
    (tmp_path / "baseline.safetensors").write_bytes(content[:-8])
    with pytest.raises(StoreError, match=r"baseline\.safetensors: damaged"):
        load_references(tmp_path)


@pytest.mark.parametrize("kernel", [reference, cpu])
def test_fvu_on_the_prompts_leaves_sinks_out_and_l0_does_not(kernel):
    prompts = [*some_prompts(), Prompt([7], template=9, prefix=0)]
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(len(prompt.tokens), 24, generator=generator) for prompt in prompts]
    for rows in x:
        rows[0] *= 500
    sae = TopK(24, 48, k=4)
    for tensor in sae.params[:5]:
        tensor.normal_(0, 0.3, generator=generator)
    lengths = [len(scored_positions(prompt)) for prompt in prompts]
    sums = reconstructed(ReferencePasses(prompts, x, [], pd.DataFrame()), sae, kernel)
    rows = torch.cat([acts[: len(acts) - 1][1:] for acts in x]).double()  # no last one, and no sink
    assert sums["sq_norm_centred"].sum() == pytest.approx((rows - rows.mean(0)).square().sum().item())
    assert sums["sq_error"].sum() == pytest.approx((rows - sae(rows.float())).square().sum().item(), rel=1e-5)
    scored = torch.cat([acts[: len(acts) - 1] for acts in x])
    assert sums["active"].sum() == (sae.encode(scored) > 0).sum() and list(sums["sq_error"] > 0)[-1] is False
    losses = {f"ce_{name}_sum": 1.0 for name in PASSES} | {"kl_sum": 1.0}
    found = on_prompts(sums.assign(n_tokens=lengths, **losses))
    assert found["fvu_eval"] == pytest.approx(
        (rows - sae(rows.float())).square().sum().item() / sums["sq_norm_centred"].sum(), rel=1e-5
    )
    assert found["l0_eval"] == pytest.approx((sae.encode(scored) > 0).sum().item() / len(scored))


def test_bf16_products_change_the_losses_little():
    """On the embedded model: cross-entropy moves by less than 2e-3 nats/token and KL by less than 1%, but they move."""
    config = make_config(k=64, train_tokens=10, val_tokens=10, eval_prompts=4)
    lm = load_lm(config)
    baseline = make_references(lm, make_prompts(config, lm.tokenizer)["eval"], 12, torch.zeros(lm.d_in))

    def halved(x):
        return x * torch.where(x.norm(dim=1, keepdim=True) > 5000, 1.0, 0.5)

    exact = mean_losses(evaluate(lm, baseline, 12, halved))
    narrow_products(lm, 12)
    narrow = mean_losses(evaluate(lm, baseline, 12, halved))
    assert 0 < abs(narrow["spliced"] - exact["spliced"]) < 2e-3 and exact["kl"] > 0.05
    assert narrow["kl"] == pytest.approx(exact["kl"], rel=0.01)
    assert narrow["clean"] == exact["clean"]
