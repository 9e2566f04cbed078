"""Prompts: a corpus as tokens, split so that evaluation shares nothing with training.

A question and its answer are one prompt, `question + "\\n" + answer`, after the tokenizer's start token if it adds one.
Messages, and questions if `text = "chat"`, are put in the chat template. A template that prints the date gets `DAY`, so
that the text is the same every day. Plain documents are packed into contexts of equal length (`corpora.tokens.packed`):
each begins with the tokenizer's start token if it adds one, and a separator stands between two documents.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from saegrid.config.run_config import RunConfig
from saegrid.data.corpora.documents import Content, Document
from saegrid.data.corpora.embedded_text import check_embedded, embedded_corpus
from saegrid.data.corpora.files import corpus_files, file_documents, local_corpus
from saegrid.data.corpora.hub import hub_corpus
from saegrid.data.corpora.tokens import common, encoder, is_chat, packed, skipped_ids, template_prefix
from saegrid.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, its problem template (or document) and its shared chat prefix."""

    tokens: list[int]
    template: int
    """Problem template; without templates, the number of its document, or of the first one in a packed context."""
    prefix: int = 0
    """Number of leading tokens that the chat template puts into every prompt; 0 for plain text."""
    shared: list[int] = field(default_factory=list)
    """Indices of tokens that all evaluation prompts share, and that are not scored; none in the other splits."""
    skipped: tuple[int, ...] = ()
    """Positions of tokens that `skip_tokens` leaves out."""

    @property
    def positions(self) -> list[int]:
        """Positions stored as rows: all but skipped ones, and only position 0 (the attention sink) of a prefix."""
        every = [0, *range(max(1, self.prefix), len(self.tokens))]
        return [position for position in every if position not in self.skipped] if self.skipped else every

    def record(self) -> dict[str, Any]:
        """Its fields, as the reference passes store them; newer ones only if they are not empty."""
        return {name: value for name, value in vars(self).items() if value or name in ("tokens", "template", "prefix")}


def make_prompts(config: RunConfig, tokenizer: Any) -> dict[str, list[Prompt]]:
    """The prompts of `draw_prompts` alone."""
    return draw_prompts(config, tokenizer)[0]


def draw_prompts(config: RunConfig, tokenizer: Any) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """(prompts, facts) of the three splits `train`, `val` and `eval`; the same config and tokenizer give the same.

    Training and validation have exactly `stored_tokens` and `val_tokens` positions: the last prompt is truncated.
    Both are empty if published activation files are read. No two splits share a template (without templates, a
    document), nor equal tokens, nor equal texts up to white space. Evaluation is drawn first, then validation; each
    split leaves out what an earlier one has.

    The facts are `left_out`, the number of documents that each split left out, and the dataset's `revision`.

    Raises:
        ConfigError: the dataset is missing, malformed or too small, or there is no working chat template.
    """
    wanted = {"eval": config.eval_prompts, "val": config.val_tokens, "train": config.stored_tokens}
    if config.activations:
        wanted = {"eval": config.eval_prompts}
    pools: dict[str, _Unseen] = {}
    splits, revision = _splits(config, tokenizer, wanted, pools)
    prompts: dict[str, list[Prompt]] = {"train": [], "val": [], "eval": []}
    for split, some in splits:
        prompts[split] = list(some)
    drawn = list(itertools.chain(*prompts.values()))
    prefix = drawn[0].prefix
    prefix = min(common(drawn[0].tokens[:prefix], prompt.tokens) for prompt in drawn)
    for split, listed in prompts.items():
        prompts[split] = [replace(prompt, prefix=prefix) for prompt in listed]
        if split != "eval":
            prompts[split] = list(_cut(prompts[split], wanted.get(split, 0)))
    return prompts, {"revision": revision, "left_out": {split: pool.left_out for split, pool in pools.items()}}


def streamed_prompts(config: RunConfig, tokenizer: Any, prefix: int) -> Iterator[Prompt]:
    """All training prompts of a streamed run, one at a time; the first of them are those of `draw_prompts`.

    Args:
        prefix: number of tokens that all prompts of `draw_prompts` share.

    Raises:
        ConfigError: as `draw_prompts`; once the corpus is read, if it has fewer than `train_tokens` positions.
    """
    wanted = {"eval": config.eval_prompts, "val": config.val_tokens, "train": config.train_tokens}
    for split, some in _splits(config, tokenizer, wanted, {})[0]:
        if split == "train":
            yield from _cut((replace(prompt, prefix=prefix) for prompt in some), config.train_tokens)
        else:
            list(some)  # what training must not have


def _splits(
    config: RunConfig, tokenizer: Any, wanted: dict[str, int], pools: dict[str, _Unseen]
) -> tuple[Iterator[tuple[str, Iterator[Prompt]]], str]:
    """(each split's name and prompts, the dataset's revision); one split is read to its end before the next.

    Args:
        wanted: number of prompts (`eval`) or rows of each split, in the order in which they are drawn.
        pools: gets the documents that each split has read.
    """
    streams, revision = _corpus(config)
    first, streams = _first(config, streams)
    encode = encoder(config, tokenizer, first)
    prefix = template_prefix(encode, config, first) if is_chat(config, first) else 0
    skip = skipped_ids(config, tokenizer)

    def splits() -> Iterator[tuple[str, Iterator[Prompt]]]:
        for split, amount in wanted.items():
            taken = set().union(*(pool.seen for pool in pools.values()))
            pool = pools[split] = _Unseen(streams[split], encode, taken, remember=split != "train")
            texts: Iterable[tuple[int, list[int]]] = pool
            if isinstance(first, str):
                texts = filter(pool.is_new_context, packed(config, tokenizer, pool, split))
            yield split, _draw(config, split, amount, texts, pools, prefix, skip)

    return splits(), revision


def check_dataset(config: RunConfig) -> None:
    """Check that a local dataset exists; a Hub dataset is checked when it is read. Raises `ConfigError`."""
    if config.dataset.startswith("embedded:"):
        check_embedded(config.dataset)
    elif path := local_corpus(config):
        corpus_files(config, path)


def _corpus(config: RunConfig) -> tuple[dict[str, Iterator[Document]], str]:
    """(one stream of documents per split, the dataset's revision); splits may share a stream."""
    revision = ""
    if config.dataset.startswith("embedded:"):
        streams = embedded_corpus(config)
    elif path := local_corpus(config):
        files = corpus_files(config, path)
        streams = {split: file_documents(config, some) for split, some in files.items()}
    else:
        streams, revision = hub_corpus(config)
    if "" in streams:  # one stream for all: evaluation draws first, then validation, and training goes on after it
        return dict.fromkeys(("train", "val", "eval"), streams[""]), revision
    if "test" in streams:
        return {"train": streams["train"], "val": streams["train"], "eval": streams["test"]}, revision
    return streams, revision


def _first(config: RunConfig, streams: dict[str, Iterator[Document]]) -> tuple[Content, dict[str, Iterator[Document]]]:
    """(content of the first document, which shows the kind of corpus; the streams, which still begin with it)."""
    peeked = streams["eval"]
    first = next(peeked, None)
    if first is None:
        raise ConfigError(f"dataset = {config.dataset!r}: no text in it for evaluation")
    again = itertools.chain([first], peeked)
    return first.content, {split: again if stream is peeked else stream for split, stream in streams.items()}


class _Unseen:
    """Iterates over (index, tokens) of documents, leaving out those that an earlier split has.

    Attributes:
        seen: keys of the text and the tokens of all documents yielded; none without `remember`, as for the last split.
        left_out: number of documents left out.
        documents, tokens: number of documents and of tokens read.
    """

    def __init__(
        self, stream: Iterator[Document], encode: Callable[[Content], list[int]], taken: set[bytes], remember: bool
    ):
        self.stream, self.encode, self.taken, self.remember = stream, encode, taken, remember
        self.seen: set[bytes] = set()
        self.left_out = self.documents = self.tokens = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for index, content in self.stream:
            tokens = self.encode(content)
            self.documents, self.tokens = self.documents + 1, self.tokens + len(tokens)
            if len(tokens) < 2:  # nothing to predict
                continue
            if self._is_new({_key([" ".join(part.split()) for part in _texts(content)]), _key(tokens)}):
                yield index, tokens

    def is_new_context(self, context: tuple[int, list[int]]) -> bool:
        """Whether no earlier split has a context (document, tokens) with the same tokens."""
        return self._is_new({_key(context[1])})

    def _is_new(self, keys: set[bytes]) -> bool:
        if keys & self.taken:
            self.left_out += 1
            return False
        if self.remember:
            self.seen |= keys
        return True


def _texts(content: Content) -> list[str]:
    if isinstance(content, list):
        return [message[name] for message in content for name in ("role", "content")]
    return [content] if isinstance(content, str) else list(content)


def _key(content: list) -> bytes:
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _draw(
    config: RunConfig,
    split: str,
    amount: int,
    texts: Iterable[tuple[int, list[int]]],
    pools: dict[str, _Unseen],
    prefix: int,
    skip: set[int],
) -> Iterator[Prompt]:
    """Prompts for at least `amount` rows (training, validation), or `amount` prompts (evaluation)."""
    same: dict[int, int] = {}  # equal token ids share one object
    have = 0
    for index, tokens in texts:
        skipped = tuple(position for position, token in enumerate(tokens) if token in skip) if skip else ()
        prompt = Prompt([same.setdefault(token, token) for token in tokens], index, prefix, skipped=skipped)
        if not prompt.positions:
            continue
        yield prompt
        have += 1 if split == "eval" else len(prompt.positions)
        if have >= amount:
            return
    parameter = "eval_prompts" if split == "eval" else f"{split}_tokens"
    left_out = pools[split].left_out
    also = f" ({left_out} prompts left out, as another split has the same)" if left_out else ""
    count, tokens = (sum(getattr(pool, name) for pool in pools.values()) for name in ("documents", "tokens"))
    raise ConfigError(
        f"{parameter} = {getattr(config, parameter)}: {config.dataset} has only {have} left for it{also}; read so far: "
        f"{count} documents with {tokens} tokens"
    )


def _cut(prompts: Iterable[Prompt], rows: int) -> Iterator[Prompt]:
    """The first prompts with exactly `rows` positions in total; the last one is truncated."""
    for prompt in prompts:
        if rows <= 0:
            return
        positions = prompt.positions[:rows]
        yield replace(prompt, tokens=prompt.tokens[: positions[-1] + 1])
        rows -= len(positions)
