"""Prompts: question and worked answer as tokens, split so that evaluation shares nothing with training.

Plain text is `question + "\\n" + answer`, tokenized with the tokenizer's defaults (its own start token, if any).
Chat text is a user turn with the question and an assistant turn with the answer in the chat template; a template that
prints the date gets `DAY`, so that the text is the same every day.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import itertools
import random
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from saegrid.config.run_config import EMBEDDED_DATASET, RunConfig
from saegrid.errors import ConfigError, DamagedError, first_line, shown
from saegrid.storage.checksums import read_bytes, read_json_lines
from saegrid.storage.hub_access import hub_errors, local_folder

TEMPLATE_SHARES = {"eval": 0.2, "val": 0.2}
"""Shares of the problem templates for evaluation and for validation; training gets the rest."""
CHUNK = 10_000
"""Problems drawn at once."""
DAY = datetime.datetime(2026, 11, 25)
"""The current date for chat templates."""
SEED_STEP = 10**9
"""Distance between seeds: reasoning-gym draws problem i from seed + i, so adjacent seeds would overlap."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, its problem template (its own index if there are none), and its shared chat prefix."""

    tokens: list[int]
    template: int
    prefix: int = 0
    """Number of leading tokens that the chat template puts into every prompt; 0 for plain text."""
    shared: list[int] = field(default_factory=list)
    """Indices of tokens that all evaluation prompts share, and that are not scored; none in the other splits."""

    @property
    def positions(self) -> list[int]:
        """Positions stored as rows: all, but only position 0 (the attention sink) of a shared prefix."""
        return [0, *range(max(1, self.prefix), len(self.tokens))]


class Problem(NamedTuple):
    template: int
    question: str
    answer: str


def make_prompts(config: RunConfig, tokenizer: Any) -> dict[str, list[Prompt]]:
    """The prompts of `draw_prompts` alone."""
    return draw_prompts(config, tokenizer)[0]


def draw_prompts(config: RunConfig, tokenizer: Any) -> tuple[dict[str, list[Prompt]], dict[str, Any]]:
    """(prompts, facts) of the three splits `train`, `val` and `eval`; the same config and tokenizer give the same.

    Training and validation have exactly `train_tokens` and `val_tokens` positions: the last prompt is truncated.
    Both are empty if published activation files are read. No two splits share a template (or a dataset row, if there
    are no templates), or a prompt with the same tokens or with the same text up to white space: evaluation is drawn
    first, then validation, and later splits leave out what earlier ones have.

    The facts are `left_out`, the number of prompts that each split left out, and the dataset's `revision`.

    Raises:
        ConfigError: the dataset is missing, malformed or too small, or there is no working chat template.
    """
    encode = _encoder(config, tokenizer)
    _check_encoder(encode, config)
    prefix = _template_prefix(encode, config) if config.text == "chat" else 0
    wanted = {"eval": config.eval_prompts, "val": config.val_tokens, "train": config.train_tokens}
    if config.activations:
        wanted = {"eval": config.eval_prompts}
    problems, revision = _problems(config)
    prompts: dict[str, list[Prompt]] = {"train": [], "val": [], "eval": []}
    taken: set[bytes] = set()
    left_out: dict[str, int] = {}
    for split, amount in wanted.items():
        pool = _Unseen(problems[split], encode, taken)
        prompts[split] = _draw(config, split, amount, pool, prefix)
        taken |= pool.seen
        left_out[split] = pool.left_out
    drawn = list(itertools.chain(*prompts.values()))
    prefix = min((_common(drawn[0].tokens[:prefix], prompt.tokens) for prompt in drawn), default=prefix)
    for split, some in prompts.items():
        prompts[split] = [replace(prompt, prefix=prefix) for prompt in some]
        if split != "eval":
            prompts[split] = _cut(prompts[split], wanted.get(split, 0))
    return prompts, {"revision": revision, "left_out": left_out}


class _Unseen:
    """Iterates over (problem, tokens), leaving out problems that an earlier split has.

    Attributes:
        seen: keys of the text and the tokens of all problems yielded.
        left_out: number of problems left out.
    """

    def __init__(self, problems: Iterator[Problem], encode: Callable[[str, str], list[int]], taken: set[bytes]):
        self.problems, self.encode, self.taken = problems, encode, taken
        self.seen: set[bytes] = set()
        self.left_out = 0

    def __iter__(self) -> Iterator[tuple[Problem, list[int]]]:
        for problem in self.problems:
            tokens = self.encode(problem.question, problem.answer)
            if len(tokens) < 2:  # nothing to predict
                continue
            text = [" ".join(part.split()) for part in (problem.question, problem.answer)]
            content = {_key(text), _key(tokens)}
            if content & self.taken:
                self.left_out += 1
            else:
                self.seen |= content
                yield problem, tokens


def _encoder(config: RunConfig, tokenizer: Any) -> Callable[[str, str], list[int]]:
    """A function from (question, answer) to token ids, truncated to `max_tokens`."""

    def plain(question: str, answer: str) -> list[int]:
        return list(tokenizer(f"{question}\n{answer}")["input_ids"])[: config.max_tokens]

    def chat(question: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        except Exception as error:  # a template is a program and can raise anything
            reason = first_line(error)
            raise ConfigError(f"text = 'chat': the chat template of {config.model} fails: {reason}") from None
        return list(tokens)[: config.max_tokens]

    if config.text == "plain":
        return plain
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"text = 'chat': the tokenizer of {config.model} has no chat template")
    _stop_the_clock(config, tokenizer)
    return chat


def _check_encoder(encode: Callable, config: RunConfig) -> None:
    """Check that question and answer reach the tokens: a template may omit one, a tokenizer may know no text."""
    tokens = encode("a", "a")
    if len(tokens) < config.max_tokens and tokens in (encode("1", "a"), encode("a", "1")):
        source = "tokenizer" if config.text == "plain" else "chat template"
        raise ConfigError(
            f"text = {config.text!r}: the {source} of {config.model} gives the same tokens for any question or answer"
        )


def _stop_the_clock(config: RunConfig, tokenizer: Any) -> None:
    """Make `strftime_now` say `DAY` in the tokenizer's chat template.

    transformers accepts no function for a template, but compiles each template once, so it can be set there.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = _compile_jinja_template(tokenizer.get_chat_template())
    except (ValueError, TemplateError) as error:
        raise ConfigError(f"text = 'chat': the chat template of {config.model} fails: {error}") from None
    template.environment.globals["strftime_now"] = DAY.strftime


def _template_prefix(encode: Callable, config: RunConfig) -> int:
    """Number of tokens that the chat template puts before every question."""
    prefix = _common(encode("a", "a"), encode("1", "1"))
    if prefix >= config.max_tokens - 1:
        raise ConfigError(f"max_tokens = {config.max_tokens}: no room after the chat template's own first tokens")
    return prefix


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _key(content: list) -> bytes:
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _draw(config: RunConfig, split: str, amount: int, pool: _Unseen, prefix: int) -> list[Prompt]:
    """Prompts for at least `amount` rows (training, validation), or `amount` prompts (evaluation)."""
    prompts: list[Prompt] = []
    same: dict[int, int] = {}  # equal token ids share one object
    have = 0
    for problem, tokens in pool:
        prompts.append(Prompt([same.setdefault(token, token) for token in tokens], problem.template, prefix))
        have += 1 if split == "eval" else len(prompts[-1].positions)
        if have >= amount:
            return prompts
    parameter = "eval_prompts" if split == "eval" else f"{split}_tokens"
    also = f" ({pool.left_out} prompts left out, as another split has the same)" if pool.left_out else ""
    raise ConfigError(f"{parameter} = {amount}: {config.dataset} has only {have} left for it{also}")


def _cut(prompts: list[Prompt], rows: int) -> list[Prompt]:
    """The first prompts with exactly `rows` positions in total; the last one is truncated."""
    kept: list[Prompt] = []
    for prompt in prompts:
        if rows <= 0:
            break
        positions = prompt.positions[:rows]
        kept.append(replace(prompt, tokens=prompt.tokens[: positions[-1] + 1]))
        rows -= len(positions)
    return kept


def _problems(config: RunConfig) -> tuple[dict[str, Iterator[Problem]], str]:
    """(one stream of problems per split, the dataset's revision)."""
    if config.dataset.startswith("embedded:"):
        if config.dataset != EMBEDDED_DATASET:
            raise ConfigError(f"dataset = {config.dataset!r}: no such embedded dataset; there is {EMBEDDED_DATASET}")
        templates = split_templates(config.data_seed)
        return {split: gsm_symbolic(config.data_seed, templates[split]) for split in templates}, ""
    train, test, revision = _question_answer(config)
    # one stream for both: validation draws first, training continues after it
    pool = _shuffled(train, config.data_seed)
    return {"val": pool, "train": pool, "eval": _shuffled(test, config.data_seed)}, revision


def split_templates(seed: int) -> dict[str, set[int]]:
    """The problem templates of gsm_symbolic, assigned to the splits by a seeded shuffle."""
    _reasoning_gym()
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    order = random.Random(seed).sample(sorted(tasks_ok), len(tasks_ok))
    split: dict[str, set[int]] = {}
    for name, share in TEMPLATE_SHARES.items():
        count = round(share * len(tasks_ok))
        split[name], order = set(order[:count]), order[count:]
    return {**split, "train": set(order)}


def gsm_symbolic(seed: int, templates: Iterable[int]) -> Iterator[Problem]:
    """Endless GSM8K-style problems of the given templates, from reasoning-gym (arXiv:2505.24760; arXiv:2410.05229)."""
    reasoning_gym = _reasoning_gym()
    for chunk in itertools.count():
        start = seed * SEED_STEP + chunk * CHUNK
        dataset = reasoning_gym.create_dataset("gsm_symbolic", size=CHUNK, seed=start)
        for index, template in enumerate(dataset.task_indices):
            if template in templates:
                item = dataset[index]
                yield Problem(template, item["question"], item["metadata"]["answer_cot"])


def _reasoning_gym() -> types.ModuleType:
    """The package, even without pycosat, which needs a C compiler and serves a puzzle that is not used here."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    return importlib.import_module("reasoning_gym")


def check_dataset(config: RunConfig) -> None:
    """Check that a local dataset exists; a Hub dataset is checked when it is read. Raises `ConfigError`."""
    where = f"dataset = {config.dataset!r}"
    if config.dataset.startswith("embedded:"):
        if config.dataset != EMBEDDED_DATASET:
            raise ConfigError(f"{where}: no such embedded dataset; there is {EMBEDDED_DATASET}")
    elif folder := local_folder("dataset", config.dataset):
        for split in ("train", "test"):
            if not (folder / f"{split}.jsonl").is_file():
                raise ConfigError(f"{where}: no {split}.jsonl in this folder")


def _question_answer(config: RunConfig) -> tuple[Any, Any, str]:
    """(train rows, test rows, revision) of a local folder or a Hub dataset with `question` and `answer`."""
    where = f"dataset = {config.dataset!r}"
    folder = local_folder("dataset", config.dataset)
    if folder:
        check_dataset(config)
        data, revision = _local_rows(folder, where), ""
    else:
        data, revision = _hub_rows(config, where)
    for split in ("train", "test"):
        columns = list(data[split][0]) if split in data and len(data[split]) else []
        if not {"question", "answer"} <= set(columns):
            raise ConfigError(
                f"{where}: {split} needs the columns question and answer, has {', '.join(columns) or 'none'}"
            )
    return data["train"], data["test"], revision


def _local_rows(folder: Path, where: str) -> dict[str, list[dict[str, Any]]]:
    """Read directly: a library's cache would identify a file by its time alone."""
    try:
        paths = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
        return {split: read_json_lines(path, read_bytes(path)) for split, path in paths.items()}
    except DamagedError as error:
        raise ConfigError(f"{where}: can't be read: {error}") from None


def _hub_rows(config: RunConfig, where: str) -> tuple[Any, str]:
    import datasets

    name = "main" if config.dataset == "openai/gsm8k" else None
    datasets.disable_progress_bars()
    try:
        with hub_errors("dataset", config.dataset, config.dataset_revision):
            data = datasets.load_dataset(config.dataset, name, revision=config.dataset_revision or None)
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(f"{where}: can't be read: {reason}") from None
    finally:
        datasets.enable_progress_bars()
    files = [file["filename"] for rows in data.values() for file in rows.cache_files]
    commits = {part for file in files for part in Path(file).parts if re.fullmatch("[0-9a-f]{40}", part)}
    return data, commits.pop() if len(commits) == 1 else config.dataset_revision


def _shuffled(rows: Any, seed: int) -> Iterator[Problem]:
    """Rows as problems in a seeded order; a row's template is its own index. Raises `ConfigError` for missing text."""
    for index in random.Random(seed).sample(range(len(rows)), len(rows)):
        question, answer = (rows[index].get(name) for name in ("question", "answer"))
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ConfigError(
                f"dataset: question and answer of row {index} must be text, are {shown((question, answer))}"
            )
        yield Problem(index, question, answer)
