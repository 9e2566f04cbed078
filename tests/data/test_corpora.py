"""Any text: what a corpus may be, how it becomes prompts and contexts, and one clear line for a malformed one."""

import hashlib
import itertools
import json
import os
import re
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from tiny import finished, save_dataset, save_model, tiny_tokenizer
from transformers import AutoTokenizer

from saegrid.config.run_config import make_config
from saegrid.core.splice import load_references, scored_positions
from saegrid.data.collect import _identity, collect, open_store
from saegrid.data.corpora.documents import FEW, PART, documents
from saegrid.data.corpora.tokens import EVAL_CONTEXTS
from saegrid.data.prompts import Prompt, check_dataset, draw_prompts, make_prompts
from saegrid.errors import ConfigError, StoreError
from saegrid.experiment.run import prepare_store

END = 0
"""The tiny tokenizer's end token; every other token is a byte."""
NOBODY = 65534


def config_for(dataset, **parameters):
    small = {"train_tokens": 400, "val_tokens": 100, "eval_prompts": 4, "max_tokens": 32}
    return make_config(k=4, dataset=str(dataset), **{**small, **parameters})


def text_of(number, words=12):
    return " ".join(f"w{number}x{i}" for i in range(words))


def write_texts(folder, count=40, words=12, ending=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:03d}{ending}").write_text(text_of(number, words))
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(number, system=""):
    turns = [{"role": "user", "content": f"what is {number}?"}, {"role": "assistant", "content": f"{number} it is"}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def chat_tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_model(tmp_path / "chat model", chat=True))


def rows(prompts):
    return sum(len(prompt.positions) for prompt in prompts)


def decoded(prompts):
    return [tiny_tokenizer().decode(prompt.tokens) for prompt in prompts]


# --- what was there before ---


@pytest.mark.parametrize(
    ("folder", "text", "identity"),
    [
        (False, "plain", "6557aefa816b24d5d4834c16787a8cfefa0f62ff2ed72bf45835fb4b3a4dcd41"),
        (False, "chat", "816be3ac05b06d61a67ab0ab0aafeaa66b60160b04e37514bd090fa2f68b3e1e"),
        (True, "plain", "992d815ff5efccc1ec0d155c88b93c03e60bc86a19cec77ba8360852448d6174"),
        (True, "chat", "aae3a0a6ccfd1bab7e6a834707343510e0238ff4c18dffdd9c5e341f79161430"),
    ],
)
def test_questions_and_answers_give_the_prompts_that_they_gave_before_other_texts_were_read(
    tmp_path, folder, text, identity
):
    amounts = {"train_tokens": 2000, "val_tokens": 500, "eval_prompts": 6, "text": text}
    if folder:
        amounts |= {"dataset": save_dataset(tmp_path / "data", 80, 20), "train_tokens": 900, "val_tokens": 200}
    prompts = make_prompts(
        make_config(k=4, **amounts), chat_tokenizer(tmp_path) if text == "chat" else tiny_tokenizer()
    )
    assert _identity(prompts) == identity


def test_stores_keep_their_ids():
    assert make_config(k=4, train_tokens=2000, val_tokens=500, eval_prompts=6).store_id == "layer12_e4378d40"
    other = {"context": 64, "skip_tokens": "bos", "text_field": "a", "dataset_config": "b", "dataset_split": "c"}
    ids = {make_config(k=4, **{name: value}).store_id for name, value in other.items()}
    assert len(ids | {make_config(k=4).store_id}) == 6


# --- plain text ---


@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "parquet", "one jsonl", "one parquet", "named field"])
def test_each_kind_of_file_gives_packed_contexts(tmp_path, kind):
    folder, texts, field = tmp_path / "texts", [text_of(number) for number in range(40)], {}
    if kind in ("txt", "md"):
        write_texts(folder, ending=f".{kind}")
        (folder / ".hidden.txt").write_text("not this")
    else:
        folder.mkdir()
        column = "body" if kind == "named field" else "text"
        frame = pd.DataFrame({column: texts, "id": range(40)})
        name = f"part.{'parquet' if 'parquet' in kind else 'jsonl'}"
        if "parquet" in kind:
            frame.to_parquet(folder / name)
        else:
            frame.to_json(folder / name, orient="records", lines=True)
        (folder / "README.md").write_text("About these rows.")
        field = {"text_field": "body"} if kind == "named field" else {}
        folder = folder / name if kind.startswith("one") else folder
    config = config_for(folder, **field)
    prompts, facts = draw_prompts(config, tiny_tokenizer())
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (400, 100, 4)
    assert all(len(prompt.tokens) == 32 for prompt in prompts["eval"] + prompts["train"][:-1])
    assert draw_prompts(config, tiny_tokenizer()) == (prompts, facts)
    stream = "".join(decoded(prompts["train"]))
    first, *whole, _ = stream.split("<end>")
    assert set(whole) <= set(texts) and first in texts and len(whole) > 3  # nothing is lost or joined in between
    assert not any("About" in text or "not this" in text for some in prompts.values() for text in decoded(some))


def test_splits_share_no_document(tmp_path):
    prompts = make_prompts(config_for(write_texts(tmp_path / "texts", 60), context=16), tiny_tokenizer())
    numbers = {split: set(re.findall(r"w(\d+)x", " ".join(decoded(some)))) for split, some in prompts.items()}
    templates = {split: {prompt.template for prompt in some} for split, some in prompts.items()}
    for a, b in itertools.combinations(prompts, 2):
        assert templates[a].isdisjoint(templates[b])
        assert numbers[a] and numbers[a].isdisjoint(numbers[b])
    assert {len(prompt.tokens) for prompt in prompts["eval"]} == {16}


def test_the_context_defaults_to_max_tokens_and_has_room_for_a_next_token(tmp_path):
    folder = write_texts(tmp_path / "texts")
    assert len(make_prompts(config_for(folder, max_tokens=20), tiny_tokenizer())["train"][0].tokens) == 20
    assert len(make_prompts(config_for(folder, max_tokens=9, context=50), tiny_tokenizer())["train"][0].tokens) == 50
    with pytest.raises(ConfigError, match="context = 1: at least 2, or 0 for max_tokens"):
        config_for(folder, context=1)


def test_a_context_begins_with_the_start_token_if_the_tokenizer_puts_it_there(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<start>"})
    start = tokenizer.bos_token_id
    config = config_for(write_texts(tmp_path / "texts"))
    has_one = [prompt.tokens[0] == start for prompt in make_prompts(config, tokenizer)["train"]]
    assert not any(has_one)  # it has a start token and does not put it before a text
    single = TemplateProcessing(single="<start> $A", special_tokens=[("<start>", start)])
    tokenizer.backend_tokenizer.post_processor = single
    for prompt in make_prompts(config, tokenizer)["train"]:
        assert prompt.tokens.count(start) == 1 and prompt.tokens[0] == start and len(prompt.tokens) <= 32


def test_without_an_end_token_the_start_token_or_an_empty_line_separates(tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    prompts = make_prompts(config_for(write_texts(tmp_path / "texts")), bare)
    stream = "".join(decoded(prompts["train"]))
    assert set(stream.split("\n\n")[1:-1]) <= {text_of(number) for number in range(40)} and "\n\n" in stream


def test_evaluation_contexts_come_from_many_documents_and_share_none(tmp_path):
    config = config_for(write_texts(tmp_path / "long", 12, words=200), eval_prompts=12)
    prompts = make_prompts(config, tiny_tokenizer())["eval"]
    assert {sum(other.template == prompt.template for other in prompts) for prompt in prompts} == {EVAL_CONTEXTS}
    assert not any(END in prompt.tokens for prompt in prompts)  # a context of a long document holds it alone
    short = make_prompts(config_for(write_texts(tmp_path / "short", 60, words=3)), tiny_tokenizer())["eval"]
    assert all(END in prompt.tokens for prompt in short)  # short documents fill a context together
    assert len({prompt.template for prompt in short}) == len(short)


def test_a_long_text_is_several_documents_where_there_are_few(tmp_path):
    book = "\n\n".join(text_of(number) for number in range(2000))
    parts = [document.content for document in documents([book, "short", " \n"], count=3)]
    assert "".join(parts[:-1]) == book and parts[-1] == "short"
    assert max(map(len, parts)) <= PART and all(part.endswith("\n\n") for part in parts[:-2])
    assert [len(part.content) for part in documents(["x" * (2 * PART + 5)], 1)] == [PART, PART, 5]
    assert [part.content for part in documents([book], count=FEW)] == [book]
    (tmp_path / "book.txt").write_text(book)
    prompts = make_prompts(config_for(tmp_path / "book.txt"), tiny_tokenizer())
    templates = [{prompt.template for prompt in some} for some in prompts.values()]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(templates, 2))


@pytest.mark.parametrize("names", [("train", "test"), ("train-00000-of-00001", "test-00000-of-00001")])
def test_files_or_folders_named_train_and_test_are_the_splits(tmp_path, names):
    for name, word in zip(names, ("learn", "judge"), strict=True):
        write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{word} {text_of(number)}"} for number in range(40)])
    write_lines(tmp_path / "validation.jsonl", [{"text": "neither"}])
    prompts = make_prompts(config_for(tmp_path), tiny_tokenizer())
    assert all("judge" not in text and "neither" not in text for text in decoded(prompts["train"] + prompts["val"]))
    assert all("learn" not in text for text in decoded(prompts["eval"]))
    one = make_prompts(config_for(tmp_path, dataset_split="test"), tiny_tokenizer())
    assert not any("learn" in text for some in one.values() for text in decoded(some))
    with pytest.raises(ConfigError, match=r"dataset_split = 'dev': no such split in "):
        make_prompts(config_for(tmp_path, dataset_split="dev"), tiny_tokenizer())
    for name in ("train", "test"):
        write_texts(tmp_path / "sorted" / name, 30)
    assert make_prompts(config_for(tmp_path / "sorted"), tiny_tokenizer())


def test_no_split_has_text_of_another(tmp_path):
    """Neither an equal text nor one that differs in white space."""
    folder = write_texts(tmp_path / "texts", 30, words=4)
    for number in range(30):
        (folder / f"copy{number}.txt").write_text(text_of(number, 4).replace(" ", " \n"))
        (folder / f"again{number}.txt").write_text(text_of(number, 4))
    prompts, facts = draw_prompts(config_for(folder, context=12, train_tokens=1000), tiny_tokenizer())
    numbers = {split: set(re.findall(r"w(\d+)x0", " ".join(decoded(some)))) for split, some in prompts.items()}
    for a, b in itertools.combinations(prompts, 2):
        assert numbers[a] and numbers[a].isdisjoint(numbers[b])
    assert facts["left_out"]["eval"] == 0 and facts["left_out"]["train"] > 0


def test_no_split_has_a_context_of_another(tmp_path):
    same = "the same beginning of 32 letters"
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"{same}{text_of(number)}"} for number in range(60)])
    prompts, facts = draw_prompts(config_for(path), tiny_tokenizer())
    assert decoded(prompts["eval"])[0] == same and facts["left_out"]["val"] == 1
    assert same not in decoded(prompts["train"] + prompts["val"])


def test_a_corpus_that_is_too_small_says_how_much_it_has(tmp_path):
    folder = write_texts(tmp_path / "texts", 10)
    with pytest.raises(ConfigError) as error:
        make_prompts(config_for(folder, train_tokens=10_000), tiny_tokenizer())
    total = sum(len(text_of(number)) for number in range(10))
    assert f"train_tokens = 10000: {folder} has only" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith(f"read so far: 10 documents with {total} tokens")
    for name, amount in (("eval_prompts", 100), ("val_tokens", 10_000)):
        with pytest.raises(ConfigError, match=rf"{name} = {amount}: .* has only \d+ left for it"):
            make_prompts(config_for(folder, **{name: amount}), tiny_tokenizer())


# --- messages ---


def test_messages_go_through_the_template(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": conversation(number)} for number in range(60)])
    prompts = make_prompts(config_for(path, max_tokens=128), tokenizer)
    everyone = [prompt for some in prompts.values() for prompt in some]
    assert {tokenizer.decode(p.tokens[: p.prefix]) for p in everyone} == {"<end>system\nBe brief.\n<end>user\n"}
    assert tokenizer.decode(prompts["eval"][0].tokens).count("<end>assistant\n") == 1
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (400, 100, 4)
    with pytest.raises(ConfigError, match=r"holds messages: the tokenizer of .* has no chat template"):
        make_prompts(config_for(path), tiny_tokenizer())


def test_a_system_message_that_all_conversations_share_is_part_of_the_prefix(tmp_path):
    tokenizer = chat_tokenizer(tmp_path)
    shared = [{"messages": conversation(number, "Answer.")} for number in range(60)]
    prompts = make_prompts(config_for(write_lines(tmp_path / "a.jsonl", shared), max_tokens=128), tokenizer)
    prefix = prompts["eval"][0].prefix
    assert tokenizer.decode(prompts["eval"][0].tokens[:prefix]).endswith("<end>system\nAnswer.\n<end>user\n")
    some = [{"messages": conversation(number, f"{number % 2}." if number % 2 else "")} for number in range(60)]
    prompts = make_prompts(config_for(write_lines(tmp_path / "b.jsonl", some), max_tokens=128), tokenizer)
    assert tokenizer.decode(prompts["eval"][0].tokens[: prompts["eval"][0].prefix]) == "<end>system\nBe brief.\n<end>"


def test_plain_text_does_not_go_through_a_template(tmp_path):
    with pytest.raises(ConfigError, match=r"text = 'chat': .* holds plain text, not questions or messages"):
        make_prompts(config_for(write_texts(tmp_path / "texts"), text="chat"), chat_tokenizer(tmp_path))


# --- tokens left out ---


def test_skipped_tokens_are_neither_rows_nor_scored(tmp_path):
    assert Prompt([5, 6, 7, 6], 0, skipped=(1, 3)).positions == [0, 2]
    tokenizer = tiny_tokenizer()
    skip = {END, tokenizer("w")["input_ids"][0]}
    config = config_for(write_texts(tmp_path / "texts"), skip_tokens=f"special,{max(skip)}")
    prompts = make_prompts(config, tokenizer)
    assert rows(prompts["train"]) == 400
    assert any(skip & set(prompt.tokens) for prompt in prompts["train"])
    for prompt in prompts["train"] + prompts["eval"]:
        assert not skip & {prompt.tokens[position] for position in prompt.positions}
        assert set(scored_positions(prompt).tolist()) == set(prompt.positions) - {len(prompt.tokens) - 1}


def test_a_store_and_its_baseline_keep_what_is_skipped(tmp_path):
    model = save_model(tmp_path / "model")
    config = config_for(
        write_texts(tmp_path / "texts"), model=model, layer=1, skip_tokens="special", store_dir=str(tmp_path)
    )
    store = prepare_store(config)
    assert store.n_train == 400 and END not in store.meta("train")["token_ids"].tolist()
    baseline = load_references(store.folder)
    assert [prompt.positions for prompt in baseline.prompts] == [
        prompt.positions for prompt in make_prompts(config, tiny_tokenizer())["eval"]
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pad", "skip_tokens = 'pad': must be special, bos or token ids, separated by commas"),
        ("bos,", "skip_tokens = 'bos,': must be special, bos or token ids"),
        ("bos", "skip_tokens = 'bos': the tokenizer of .* has no bos"),
        ("3,9999", "skip_tokens = '3,9999': the tokenizer of .* has no 9999"),
    ],
)
def test_token_classes_that_are_not_there_are_one_line(tmp_path, value, message):
    with pytest.raises(ConfigError, match=message):
        make_prompts(config_for(write_texts(tmp_path / "texts"), skip_tokens=value), tiny_tokenizer())


# --- embedded texts ---


@pytest.mark.parametrize("name", ["embedded:python_docs", "embedded:python_code"])
def test_pythons_own_texts_need_no_network(name):
    config = config_for(name, max_tokens=64, train_tokens=100_000)
    prompts = make_prompts(config, tiny_tokenizer())
    assert (rows(prompts["train"]), rows(prompts["val"]), len(prompts["eval"])) == (100_000, 100, 4)
    text = "".join(decoded(prompts["train"]))
    assert text.count("def ") > 50 if name.endswith("code") else text.count(" the ") > 500
    assert make_prompts(config.model_copy(update={"data_seed": 1}), tiny_tokenizer()) != prompts


# --- from text to metrics ---


@pytest.mark.parametrize("kind", ["texts", "messages"])
def test_a_run_on_any_text_has_all_metrics(tmp_path, kind):
    model = save_model(tmp_path / "model", chat=True)
    data = write_texts(tmp_path / "texts", 60)
    if kind == "messages":
        data = write_lines(tmp_path / "chats.jsonl", [{"messages": conversation(number)} for number in range(80)])
    small = {"arch": "TopK", "expansion": 2, "layer": 1, "epochs": 1, "batch_size": 64, "threads": 1, "max_tokens": 64}
    places = {"runs_dir": str(tmp_path / "runs"), "store_dir": str(tmp_path / "stores"), "kernel": "reference"}
    run = finished(config_for(data, model=model, **small, **places))
    row = run.metrics
    assert row["n_train_rows"] == 400 and row["n_eval_prompts"] == 4 and row["n_eval_tokens"] > 40
    assert row["delta_loss"] == row["ce_spliced"] - row["ce_clean"] and row["dataset"] == str(data)
    manifest = open_store(run.config).manifest
    assert manifest["data"]["prompts"]["eval"] == 4
    assert ("dataset/chats.jsonl" in manifest["sources"]) == (kind == "messages")


def test_a_change_in_a_folder_of_many_texts_is_noticed(tmp_path):
    folder = write_texts(tmp_path / "texts")
    config = config_for(folder, model=save_model(tmp_path / "model"), layer=1, store_dir=str(tmp_path / "stores"))
    collect(config)
    assert open_store(config).manifest["sources"]["dataset"]
    (folder / "007.txt").rename(folder / "7.txt")  # another order, so other rows
    with pytest.raises(StoreError, match=r": dataset changed since it was made"):
        open_store(config)


# --- malformed ---


def lines(*rows):
    return lambda folder: write_lines(folder / "a.jsonl", rows)


def raw(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def nothing(folder):
    return folder


def damaged_parquet(folder):
    pd.DataFrame({"text": ["a"] * 100}).to_parquet(folder / "a.parquet")
    content = bytearray((folder / "a.parquet").read_bytes())
    content[20:-200] = bytes(len(content) - 220)
    return raw("a.parquet", bytes(content))(folder)


def parquet(**columns):
    def write(folder):
        pd.DataFrame(columns).to_parquet(folder / "a.parquet")
        return folder

    return write


def fifo(folder):
    os.mkfifo(folder / "a.txt")
    return folder


def chats(*messages):
    return lines(*({"messages": some} for some in messages))


USER = {"role": "user", "content": "a"}


def mixed_files(folder):
    write_lines(folder / "a.jsonl", [{"text": "one text"}])
    write_lines(folder / "b.jsonl", [{"question": "a", "answer": "b"}])
    return folder


MALFORMED = {
    "empty folder": (nothing, {}, "no .jsonl, .parquet, .txt or .md file in this folder"),
    "no such file": (lambda folder: folder / "a.txt", {}, "no such file"),
    "no such folder": (lambda folder: folder / "nowhere", {}, "no such folder"),
    "no such embedded text": (lambda folder: "embedded:other", {}, "there are embedded:gsm_symbolic, embedded:py"),
    "another kind of file": (raw("a.csv", b"a,b\n"), {}, "a file; must be a folder, a .jsonl, .parquet, "),
    "empty file": (raw("a.txt", b""), {}, "no text in it"),
    "only white space": (raw("a.md", b" \n\t\n"), {}, "no text in it"),
    "empty lines": (raw("a.jsonl", b"\n\n"), {}, "no text in it"),
    "only empty texts": (lines({"text": ""}, {"text": " "}), {}, "no text in it"),
    "not UTF-8": (raw("a.txt", b"caf\xe9 au lait"), {}, "a.txt: not UTF-8 at byte 3"),
    "UTF-16": (raw("a.txt", "text".encode("utf-16")), {}, "a.txt: not UTF-8 at byte 0"),
    "NUL bytes": (raw("a.txt", b"a\0b"), {}, "a.txt: holds NUL characters, so it is not text"),
    "NUL in JSON": (lines({"text": "fine"}, {"text": "a\0b"}), {}, "a.jsonl, line 2: holds NUL characters"),
    "half a surrogate pair": (raw("a.jsonl", rb'{"text": "a\ud800"}'), {}, "line 1: holds half of a surrogate pair"),
    "a pipe": (fifo, {}, "a.txt: not a plain file"),
    "broken line": (raw("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n'), {}, "a.jsonl: line 3: not JSON: "),
    "line in Latin-1": (raw("a.jsonl", b'{"text": "\xe9"}\n'), {}, "a.jsonl: line 1: not JSON: "),
    "nested too deeply": (raw("a.jsonl", b"[" * 100_000), {}, "a.jsonl: line 1: not JSON: nested too deeply"),
    "line without fields": (raw("a.jsonl", b'"text"\n'), {}, "a.jsonl: line 1: not a JSON object"),
    "list of rows": (raw("a.jsonl", b'[{"text": "a"}]'), {}, "a.jsonl: line 1: not a JSON object"),
    "no known field": (lines({"prompt": "a"}), {}, "needs text, messages, or question and answer, or a text_field"),
    "no field at all": (lines({}), {}, "it has no fields"),
    "wrong text_field": (lines({"text": "a"}), {"text_field": "body"}, "text_field = 'body': no such field in "),
    "text_field of a text": (raw("a.txt", b"a"), {"text_field": "text"}, "a.txt is a text file and has no fields"),
    "field is missing later": (lines({"text": "a"}, {"txt": "b"}), {}, "a.jsonl, line 2: no field text"),
    "a number for a text": (lines({"text": "a"}, {"text": 5}), {}, "a.jsonl, line 2: text must be text, is 5"),
    "no text": (lines({"text": None}), {}, "a.jsonl, line 1: text must be text, is None"),
    "answer is no text": (lines({"question": "a", "answer": 4}), {}, "line 1: answer must be text, is 4"),
    "text and messages": (lines({"text": "a"}, {"text": [USER]}), {}, "holds both text and messages"),
    "text and questions": (mixed_files, {}, "holds both text and questions"),
    "no messages": (chats([USER], []), {}, "a.jsonl, line 2: messages is empty"),
    "messages are texts": (chats(["a"]), {}, "line 1: message 1 needs role and content, is 'a'"),
    "other names": (chats([{"from": "human", "value": "a"}]), {}, "line 1: message 1 needs role and content, is {"),
    "unknown role": (chats([USER, {"role": "bot", "content": "a"}]), {}, "message 2: role = 'bot': must be one of sys"),
    "role is a list": (chats([{"role": [], "content": "a"}]), {}, "message 1: role = []: must be one of"),
    "content is no text": (chats([{"role": "user", "content": [1]}]), {}, "message 1: content must be text, is [1]"),
    "not Parquet": (raw("a.parquet", b"PAR1 no PAR1"), {}, "a.parquet: not a Parquet file that can be read"),
    "empty Parquet file": (raw("a.parquet", b""), {}, "a.parquet: not a Parquet file that can be read"),
    "damaged Parquet": (damaged_parquet, {}, "a.parquet: not a Parquet file that can be read"),
    "Parquet without the field": (parquet(body=["a"]), {}, "or a text_field that exists; it has body"),
    "Parquet with numbers": (parquet(text=[1, 2]), {}, "a.parquet, row 1: text must be text, is 1"),
    "Parquet without rows": (parquet(text=pd.Series([], dtype=str)), {}, "no text in it"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_corpus_is_one_clear_line(tmp_path, kind):
    make, parameters, message = MALFORMED[kind]
    (tmp_path / "corpus").mkdir()
    config = config_for(make(tmp_path / "corpus"), train_tokens=1, val_tokens=1, eval_prompts=1, **parameters)
    with pytest.raises(ConfigError) as error:
        make_prompts(config, chat_tokenizer(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert config.dataset in str(error.value)


@pytest.mark.parametrize("kind", ["a folder", "a folder in it", "a file"])
def test_files_that_may_not_be_read_are_one_line(kind):
    place = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    place.chmod(0o755)
    write_texts(place / "corpus" / "part")
    closed = {"a folder": place / "corpus", "a folder in it": place / "corpus" / "part"}.get(kind)
    closed = closed or place / "corpus" / "part" / "000.txt"
    closed.chmod(0)
    config = config_for(closed if kind == "a file" else place / "corpus")
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        with pytest.raises(ConfigError, match=r"dataset = .*: can't be read: .*Permission denied") as error:
            check_dataset(config)
            make_prompts(config, tiny_tokenizer())
        assert "\n" not in str(error.value)
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o755)


def test_the_hash_of_a_dataset_of_few_files_is_that_of_their_bytes(tmp_path):
    from saegrid.data.sources import local_sources

    data = Path(save_dataset(tmp_path / "data"))
    content = b"".join((data / name).read_bytes() for name in ("test.jsonl", "train.jsonl"))
    found = local_sources(config_for(data, model=save_model(tmp_path / "model")))
    assert found["dataset"] == hashlib.sha256(content).hexdigest()
    assert {"dataset/test.jsonl", "dataset/train.jsonl"} < found.keys()
