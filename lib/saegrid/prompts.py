"""Prompts: question and worked answer as tokens, split so that evaluation sees nothing of training.

Plain text is `question + "\\n" + answer`, tokenized as the tokenizer does by default (its own start token, if any).
Chat text is a user turn with the question and an assistant turn with the answer through the chat template.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from saegrid.config import EMBEDDED_DATASET, RunConfig
from saegrid.errors import ConfigError, first_line, shown
from saegrid.fetch import hub_errors, local_folder

TEMPLATE_SHARES = {"eval": 0.2, "val": 0.2}
"""Shares of the problem templates that are kept for evaluation and for validation; training has the rest."""
CHUNK = 10_000
"""Problems drawn at once."""
SEED_STEP = 10**9
"""Distance of two seeds: problem i of a reasoning-gym dataset draws from seed + i, so neighbours would overlap."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, its problem template (its own index where there are none), and its shared chat prefix."""

    tokens: list[int]
    template: int
    prefix: int = 0
    """How many of the first tokens are the same in every prompt by the chat template; 0 for plain text."""

    @property
    def positions(self) -> list[int]:
        """Positions that are rows: all of them, but of a shared prefix only position 0 (the attention sink)."""
        return [0, *range(max(1, self.prefix), len(self.tokens))]


class Problem(NamedTuple):
    template: int
    question: str
    answer: str


def make_prompts(config: RunConfig, tokenizer: Any) -> dict[str, list[Prompt]]:
    """Prompts of the three splits, `train`, `val` and `eval`; the same config and tokenizer give the same prompts.

    Training and validation have exactly `train_tokens` and `val_tokens` positions: the last prompt is cut behind the
    last one. Both are empty where published activation files are read. No split shares a template, or a prompt where
    the dataset has no templates, with another.

    Raises:
        ConfigError: the dataset is missing, not of the expected form, or too small; or no chat template that works.
    """
    encode = _encoder(config, tokenizer)
    _check_encoder(encode, config)
    prefix = _template_prefix(encode, config) if config.text == "chat" else 0
    wanted = {"val": config.val_tokens, "train": config.train_tokens, "eval": config.eval_prompts}
    if config.activations:
        wanted = {"eval": config.eval_prompts}
    problems = _problems(config)
    prompts: dict[str, list[Prompt]] = {"train": [], "val": [], "eval": []}
    for split, amount in wanted.items():
        prompts[split] = _draw(config, split, amount, problems[split], encode, prefix)
    drawn = list(itertools.chain(*prompts.values()))
    prefix = min((_common(drawn[0].tokens[:prefix], prompt.tokens) for prompt in drawn), default=prefix)
    for split, some in prompts.items():
        prompts[split] = [replace(prompt, prefix=prefix) for prompt in some]
        if split != "eval":
            prompts[split] = _cut(prompts[split], wanted.get(split, 0))
    return prompts


def _encoder(config: RunConfig, tokenizer: Any) -> Callable[[str, str], list[int]]:
    """(question, answer) to token ids, cut behind `max_tokens`."""

    def plain(question: str, answer: str) -> list[int]:
        return list(tokenizer(f"{question}\n{answer}")["input_ids"])[: config.max_tokens]

    def chat(question: str, answer: str) -> list[int]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        except Exception as error:  # a template is a program, and raises what it likes
            reason = first_line(error)
            raise ConfigError(f"text = 'chat': the chat template of {config.model} fails: {reason}") from None
        return list(tokens)[: config.max_tokens]

    if config.text == "plain":
        return plain
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"text = 'chat': the tokenizer of {config.model} has no chat template")
    return chat


def _check_encoder(encode: Callable, config: RunConfig) -> None:
    """Whether question and answer reach the tokens: a template may leave one out, a tokenizer may know no text."""
    tokens = encode("a", "a")
    if len(tokens) < config.max_tokens and tokens in (encode("1", "a"), encode("a", "1")):
        source = "tokenizer" if config.text == "plain" else "chat template"
        raise ConfigError(
            f"text = {config.text!r}: the {source} of {config.model} gives the same tokens for any question or answer"
        )


def _template_prefix(encode: Callable, config: RunConfig) -> int:
    """Number of tokens that the chat template puts before every question."""
    prefix = _common(encode("a", "a"), encode("1", "1"))
    if prefix >= config.max_tokens - 1:
        raise ConfigError(f"max_tokens = {config.max_tokens}: no room behind the chat template's own first tokens")
    return prefix


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _draw(
    config: RunConfig, split: str, amount: int, problems: Iterator[Problem], encode: Callable, prefix: int
) -> list[Prompt]:
    """Prompts for at least `amount` rows (training, validation), or `amount` prompts (evaluation)."""
    prompts: list[Prompt] = []
    same: dict[int, int] = {}  # equal token ids are one object
    have = 0
    while have < amount:
        problem = next(problems, None)
        if problem is None:
            parameter = "eval_prompts" if split == "eval" else f"{split}_tokens"
            raise ConfigError(f"{parameter} = {amount}: {config.dataset} has only {have} left for it")
        tokens = encode(problem.question, problem.answer)
        if len(tokens) < 2:  # nothing to predict
            continue
        prompts.append(Prompt([same.setdefault(token, token) for token in tokens], problem.template, prefix))
        have += 1 if split == "eval" else len(prompts[-1].positions)
    return prompts


def _cut(prompts: list[Prompt], rows: int) -> list[Prompt]:
    """The first prompts, the last one shortened, so that they have exactly `rows` positions."""
    kept: list[Prompt] = []
    for prompt in prompts:
        if rows <= 0:
            break
        positions = prompt.positions[:rows]
        kept.append(replace(prompt, tokens=prompt.tokens[: positions[-1] + 1]))
        rows -= len(positions)
    return kept


def _problems(config: RunConfig) -> dict[str, Iterator[Problem]]:
    """A stream of problems for each split."""
    if config.dataset.startswith("embedded:"):
        if config.dataset != EMBEDDED_DATASET:
            raise ConfigError(f"dataset = {config.dataset!r}: no such embedded dataset; there is {EMBEDDED_DATASET}")
        templates = split_templates(config.data_seed)
        return {split: gsm_symbolic(config.data_seed, templates[split]) for split in templates}
    train, test = _question_answer(config)
    # one stream for both: validation takes its prompts first, training goes on behind them
    pool = _shuffled(train, config.data_seed)
    return {"val": pool, "train": pool, "eval": _shuffled(test, config.data_seed)}


def split_templates(seed: int) -> dict[str, set[int]]:
    """The problem templates of gsm_symbolic, dealt out to the splits by a seeded shuffle."""
    _reasoning_gym()
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    order = random.Random(seed).sample(sorted(tasks_ok), len(tasks_ok))
    split: dict[str, set[int]] = {}
    for name, share in TEMPLATE_SHARES.items():
        count = round(share * len(tasks_ok))
        split[name], order = set(order[:count]), order[count:]
    return {**split, "train": set(order)}


def gsm_symbolic(seed: int, templates: Iterable[int]) -> Iterator[Problem]:
    """Endless GSM8K-style problems of some templates, by reasoning-gym (arXiv:2505.24760; arXiv:2410.05229)."""
    reasoning_gym = _reasoning_gym()
    for chunk in itertools.count():
        start = seed * SEED_STEP + chunk * CHUNK
        dataset = reasoning_gym.create_dataset("gsm_symbolic", size=CHUNK, seed=start)
        for index, template in enumerate(dataset.task_indices):
            if template in templates:
                item = dataset[index]
                yield Problem(template, item["question"], item["metadata"]["answer_cot"])


def _reasoning_gym() -> types.ModuleType:
    """The package, also where pycosat is absent: it needs a C compiler, for a puzzle that is never made here."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    return importlib.import_module("reasoning_gym")


def check_dataset(config: RunConfig) -> None:
    """Whether a dataset on this machine is there; one on the Hub shows when it is read. Raises `ConfigError`."""
    where = f"dataset = {config.dataset!r}"
    if config.dataset.startswith("embedded:"):
        if config.dataset != EMBEDDED_DATASET:
            raise ConfigError(f"{where}: no such embedded dataset; there is {EMBEDDED_DATASET}")
    elif folder := local_folder("dataset", config.dataset):
        for split in ("train", "test"):
            if not (folder / f"{split}.jsonl").is_file():
                raise ConfigError(f"{where}: no {split}.jsonl in this folder")


def _question_answer(config: RunConfig) -> tuple[Any, Any]:
    """The train and test splits of a local folder or a Hub dataset, with the columns `question` and `answer`."""
    import datasets

    where = f"dataset = {config.dataset!r}"
    folder = local_folder("dataset", config.dataset)
    datasets.disable_progress_bars()
    try:
        if folder:
            data = {}
            check_dataset(config)
            for split in ("train", "test"):
                data[split] = datasets.load_dataset("json", data_files=str(folder / f"{split}.jsonl"), split="train")
        else:
            name = "main" if config.dataset == "openai/gsm8k" else None
            with hub_errors("dataset", config.dataset, config.dataset_revision):
                data = datasets.load_dataset(config.dataset, name, revision=config.dataset_revision or None)
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ConfigError(f"{where}: can't be read: {reason}") from None
    finally:
        datasets.enable_progress_bars()
    for split in ("train", "test"):
        columns = data[split].column_names if split in data else []
        if not {"question", "answer"} <= set(columns):
            raise ConfigError(
                f"{where}: {split} needs the columns question and answer, has {', '.join(columns) or 'none'}"
            )
    return data["train"], data["test"]


def _shuffled(rows: Any, seed: int) -> Iterator[Problem]:
    """Rows as problems in a seeded order; a row's template is its own index. Raises `ConfigError` for missing text."""
    for index in random.Random(seed).sample(range(len(rows)), len(rows)):
        question, answer = rows[index]["question"], rows[index]["answer"]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ConfigError(
                f"dataset: question and answer of row {index} must be text, are {shown((question, answer))}"
            )
        yield Problem(index, question, answer)
