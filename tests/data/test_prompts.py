"""Prompts: splits that share nothing, exact row counts, the shared chat prefix, and datasets that do not fit."""

import itertools
import json
from pathlib import Path

import pytest
from tiny import save_dataset, save_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from saegrid.config.run_config import make_config
from saegrid.data.corpora.embedded_text import gsm_symbolic, split_templates
from saegrid.data.prompts import Prompt, draw_prompts, make_prompts
from saegrid.errors import ConfigError

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def config_for(**parameters):
    return make_config(k=4, **{"train_tokens": 2000, "val_tokens": 500, "eval_prompts": 6, **parameters})


def rows(prompts):
    return sum(len(prompt.positions) for prompt in prompts)


def test_positions_are_all_but_of_a_shared_prefix_only_the_first():
    assert Prompt([5, 6, 7], 0).positions == [0, 1, 2]
    assert Prompt([5, 6, 7, 8, 9], 0, prefix=3).positions == [0, 3, 4]
    assert Prompt([5], 0, prefix=3).positions == [0]


def test_templates_are_dealt_out_once_each():
    split = split_templates(0)
    assert {name: len(some) for name, some in split.items()} == {"train": 51, "val": 17, "eval": 17}
    assert len(set.union(*split.values())) == 85
    assert split == split_templates(0) and split != split_templates(1)


def test_embedded_splits_share_no_template_and_have_exact_row_counts():
    config = config_for()
    prompts = make_prompts(config, tiny_tokenizer())
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (2000, 500, 6)
    templates = {name: {prompt.template for prompt in some} for name, some in prompts.items()}
    for name, allowed in split_templates(config.data_seed).items():
        assert templates[name] <= allowed
    assert make_prompts(config, tiny_tokenizer()) == prompts
    assert make_prompts(config_for(data_seed=1), tiny_tokenizer()) != prompts


def test_neighbouring_data_seeds_draw_other_problems():
    def questions(seed):
        problems = gsm_symbolic(seed, range(100))
        return {next(problems).content[0] for _ in range(300)}

    assert len(questions(0)) > 290
    assert len(questions(0) & questions(1)) <= 3  # a template with few variants may come out alike


def test_plain_text_is_question_newline_answer(tmp_path):
    tokenizer = tiny_tokenizer()
    prompts = make_prompts(config_for(dataset=save_dataset(tmp_path), train_tokens=100, val_tokens=50), tokenizer)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for prompt in prompts["eval"]:
        line = lines[prompt.template]
        assert tokenizer.decode(prompt.tokens) == line["question"] + "\n" + line["answer"]
        assert prompt.prefix == 0


def test_local_dataset_splits_share_no_prompt(tmp_path):
    config = config_for(dataset=save_dataset(tmp_path), train_tokens=300, val_tokens=100)
    prompts = make_prompts(config, tiny_tokenizer())
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (300, 100, 6)
    texts = {split: {tiny_tokenizer().decode(p.tokens) for p in some} for split, some in prompts.items()}
    assert all("train".startswith(text[:5]) for text in texts["train"] | texts["val"])  # the last one may be cut
    assert all(text.startswith("test") for text in texts["eval"])
    assert not {p.template for p in prompts["train"]} & {p.template for p in prompts["val"]}


NUMBERS = [f"{i:03d}" for i in range(60)]
TWINS = {
    "same text": (["{} is a question", "{} is a question"], ["{} is a question"]),
    "other white space": (["{} is a question ", "{}  is a question ", "{}\nis a question "], ["{}\tis a question"]),
    "same tokens": (
        ["{} is a question of x", "{} is a question of xx"],
        ["{} is a question of y"],
    ),  # within max_tokens
}


@pytest.mark.parametrize("kind", TWINS)
def test_no_split_has_a_prompt_of_another(tmp_path, kind):
    for split, forms in zip(("train", "test"), TWINS[kind], strict=True):
        questions = [form.format(number) for number in NUMBERS for form in forms]
        lines = [json.dumps({"question": question, "answer": "an answer"}) + "\n" for question in questions]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    config = config_for(dataset=str(tmp_path), train_tokens=200, val_tokens=100, max_tokens=16)
    tokenizer = tiny_tokenizer()
    prompts, facts = draw_prompts(config, tokenizer)
    whole = {split: some if split == "eval" else some[:-1] for split, some in prompts.items()}  # the last one is cut
    texts = {split: {" ".join(tokenizer.decode(p.tokens).split()) for p in some} for split, some in whole.items()}
    assert all(texts[a].isdisjoint(texts[b]) for a, b in itertools.combinations(texts, 2))
    assert sum(facts["left_out"].values()) > 0 and facts["left_out"]["eval"] == 0


def test_a_prompt_is_cut_at_max_tokens(tmp_path):
    config = config_for(dataset=save_dataset(tmp_path), train_tokens=100, val_tokens=50, max_tokens=9)
    prompts = make_prompts(config, tiny_tokenizer())
    assert {len(prompt.tokens) for prompt in prompts["eval"]} == {9}
    assert rows(prompts["train"]) == 100


def test_shared_chat_prefix_is_found_and_kept_only_at_position_0(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model", chat=True))
    config = config_for(dataset=save_dataset(tmp_path / "data"), text="chat", train_tokens=300, val_tokens=100)
    prompts = make_prompts(config, tokenizer)
    everyone = [prompt for some in prompts.values() for prompt in some]
    prefix = everyone[0].prefix
    assert tokenizer.decode(everyone[0].tokens[:prefix]) == "<end>system\nBe brief.\n<end>user\n"
    assert {prompt.prefix for prompt in everyone} == {prefix}
    assert {tuple(prompt.tokens[:prefix]) for prompt in everyone} == {tuple(everyone[0].tokens[:prefix])}
    assert prompts["eval"][0].positions[:2] == [0, prefix]
    assert (rows(prompts["train"]), rows(prompts["val"])) == (300, 100)


def test_chat_needs_a_template_and_room_after_its_prefix(tmp_path):
    data = save_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"text = 'chat': the tokenizer of .* has no chat template"):
        make_prompts(config_for(dataset=data, text="chat"), tiny_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model", chat=True))
    with pytest.raises(ConfigError, match="max_tokens = 10: no room"):
        make_prompts(config_for(dataset=data, text="chat", max_tokens=10), tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message is needed') }}", "fails: a system message is needed"),
        ("{% for %}", "fails: "),
        ("{{ messages[2].content }}{{ 1 / 0 }}", "fails: "),
        ("{{ messages[0].content }}", "gives the same tokens for any question or answer"),
        ("{{ messages[1].content }}", "gives the same tokens for any question or answer"),
        ("<end>", "gives the same tokens for any question or answer"),
    ],
)
def test_a_chat_template_that_fails_or_leaves_text_out_is_one_line(tmp_path, template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=f"text = 'chat': the chat template of .* {message}"):
        make_prompts(config_for(dataset=save_dataset(tmp_path), text="chat"), tokenizer)


def test_a_tokenizer_without_special_tokens_will_do_and_one_without_vocabulary_will_not(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    config = config_for(dataset=save_dataset(tmp_path), train_tokens=300, val_tokens=100)
    assert bare.eos_token is None and bare.pad_token is None
    assert make_prompts(config, bare) == make_prompts(config, tiny_tokenizer())
    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match=r"text = 'plain': the tokenizer of .* gives the same tokens for any"):
        make_prompts(config, empty)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ConfigError, match=r"text = 'plain': the tokenizer of .* fails: .*UNK"):
        make_prompts(config, words)


def test_published_activations_need_evaluation_prompts_only(tmp_path):
    config = config_for(dataset=save_dataset(tmp_path), activations="some/files", train_tokens=10**9)
    prompts = make_prompts(config, tiny_tokenizer())
    assert (prompts["train"], prompts["val"], len(prompts["eval"])) == ([], [], 6)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"GSM8K's own files are not beside the checkout ({GSM8K})")
def test_gsm8k_itself():
    config = config_for(dataset=str(GSM8K), train_tokens=20_000, val_tokens=5000, eval_prompts=50)
    tokenizer = tiny_tokenizer()
    prompts = make_prompts(config, tokenizer)
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (20_000, 5000, 50)
    assert all("\n#### " in tokenizer.decode(prompt.tokens) for prompt in prompts["eval"] if len(prompt.tokens) < 512)
