"""Tokenize documents: plain text, the chat template, contexts packed with documents, and tokens to leave out."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from saegrid.config.run_config import RunConfig
from saegrid.data.corpora.documents import Content
from saegrid.errors import ConfigError, first_line

DAY = datetime.datetime(2026, 11, 25)
"""The current date for chat templates."""
EVAL_CONTEXTS = 2
"""Evaluation contexts per document, so that they come from many documents."""
KINDS = {str: "text", tuple: "questions", list: "messages"}
Encode = Callable[[Any], list[int]]


def encoder(config: RunConfig, tokenizer: Any, first: Content) -> Encode:
    """A function from a document of the kind of `first` to token ids.

    Prompts are truncated. Plain text, which `packed` divides, is whole and has no special tokens. Raises `ConfigError`
    if question or answer do not change the tokens: a chat template may drop them, a tokenizer may lack all characters.
    """
    encode = _encoder_of(config, tokenizer, type(first))
    source = "chat template" if is_chat(config, first) else "tokenizer"
    where = f"text = {config.text!r}: the {source} of {config.model}"

    def checked(content: Content) -> list[int]:
        if type(content) is not type(first):
            kinds = " and ".join(KINDS[kind] for kind in KINDS if kind in (type(first), type(content)))
            raise ConfigError(f"dataset = {config.dataset!r}: holds both {kinds}; it must hold one of them")
        try:
            return encode(content)
        except Exception as error:  # a template is a program and can raise anything; tokenizers raise Exception itself
            raise ConfigError(f"{where} fails: {first_line(error)}") from None

    tokens = checked(_sample(first, "a", "a"))
    if len(tokens) < config.max_tokens and tokens in [checked(_sample(first, *pair)) for pair in ("1a", "a1")]:
        raise ConfigError(f"{where} gives the same tokens for any question or answer")
    return checked


def _encoder_of(config: RunConfig, tokenizer: Any, kind: type) -> Encode:
    def text(content: str) -> list[int]:
        return list(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"])

    def plain(content: tuple[str, str]) -> list[int]:
        return list(tokenizer("\n".join(content))["input_ids"])[: config.max_tokens]

    def chat(content: tuple[str, str] | list[dict[str, str]]) -> list[int]:
        turns = content if isinstance(content, list) else _turns(*content)
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))[: config.max_tokens]

    if kind is str and config.text == "chat":
        raise ConfigError(f"text = 'chat': {config.dataset} holds plain text, not questions or messages")
    if kind is str:
        return text
    if kind is tuple and config.text == "plain":
        return plain
    if not getattr(tokenizer, "chat_template", None):
        what = "text = 'chat'" if kind is tuple else f"dataset = {config.dataset!r}: holds messages"
        raise ConfigError(f"{what}: the tokenizer of {config.model} has no chat template")
    _stop_the_clock(config, tokenizer)
    return chat


def is_chat(config: RunConfig, first: Content) -> bool:
    """Whether documents of the kind of `first` go through the chat template."""
    return isinstance(first, list) or config.text == "chat"


def template_prefix(encode: Encode, config: RunConfig, first: Content) -> int:
    """Number of tokens that the chat template, and the system message of `first`, put before every question."""
    prefix = common(encode(_sample(first, "a", "a")), encode(_sample(first, "1", "1")))
    if prefix >= config.max_tokens - 1:
        raise ConfigError(f"max_tokens = {config.max_tokens}: no room for text after the chat template's first tokens")
    return prefix


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def packed(
    config: RunConfig, tokenizer: Any, documents: Iterable[tuple[int, list[int]]], split: str
) -> Iterator[tuple[int, list[int]]]:
    """(first document, tokens) of each context: documents are joined, and cut where a context is full.

    In evaluation, a long document fills up to `EVAL_CONTEXTS` contexts alone, and its remaining tokens are dropped.
    Documents shorter than a context fill one together and are in no other.
    """
    start, separator = _marks(tokenizer)
    room = (config.context or config.max_tokens) - len(start)
    first, body = 0, list[int]()
    for index, tokens in documents:
        if split == "eval" and len(tokens) >= room:
            for n in range(min(len(tokens) // room, EVAL_CONTEXTS)):
                yield index, start + tokens[n * room : (n + 1) * room]
            continue
        first = first if body else index
        body += [*separator, *tokens] if body else tokens
        while len(body) >= room:
            yield first, start + body[:room]
            first, body = index, [] if split == "eval" else body[room:]
    if body:
        yield first, start + body


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(start token if the tokenizer adds one, separator of documents: end token, else start token, else blank line)."""
    start, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    begins = start is not None and list(tokenizer("a")["input_ids"])[:1] == [start]
    known = next((token for token in (end, start) if token is not None), None)
    separator = [known] if known is not None else list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    return [start] if start is not None and begins else [], separator


def skipped_ids(config: RunConfig, tokenizer: Any) -> set[int]:
    """The token ids that `skip_tokens` names. Raises `ConfigError` for one that the tokenizer lacks."""
    found: set[int] = set()
    for name in filter(None, config.skip_tokens.replace(" ", "").split(",")):
        if name == "special":
            found |= set(tokenizer.all_special_ids)
            found |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        elif name == "bos" and tokenizer.bos_token_id is not None:
            found.add(tokenizer.bos_token_id)
        elif name.isdigit() and int(name) < len(tokenizer):
            found.add(int(name))
        else:
            raise ConfigError(f"skip_tokens = {config.skip_tokens!r}: the tokenizer of {config.model} has no {name}")
    return found


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _sample(first: Content, question: str, answer: str) -> Content:
    """A short document of the kind of `first`, with its system message if it has one."""
    if isinstance(first, list):
        return [*itertools.takewhile(lambda message: message["role"] == "system", first), *_turns(question, answer)]
    return (question, answer) if isinstance(first, tuple) else question + answer


def _stop_the_clock(config: RunConfig, tokenizer: Any) -> None:
    """Make `strftime_now` return `DAY` in the tokenizer's chat template.

    transformers takes no functions for a template, but compiles it once: the function is set in the compiled one.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = _compile_jinja_template(tokenizer.get_chat_template())
    except (ValueError, TemplateError) as error:
        raise ConfigError(f"text = 'chat': the chat template of {config.model} fails: {error}") from None
    template.environment.globals["strftime_now"] = DAY.strftime
