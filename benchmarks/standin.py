"""What `params/qwen05b.yaml` takes from the Hub, made on this machine: model, tokenizer, dataset, activation files.

    model/         Qwen2 of Qwen2.5-0.5B-Instruct's shape with random weights in bfloat16, as the real ones are stored,
                   and a byte-level BPE tokenizer with Qwen's pre-tokenizer, special tokens and chat format
    dataset/       train.jsonl and test.jsonl in GSM8K's format, from reasoning-gym, with no template in both
    published/     instruct_base_layer12_train.pt and _val.pt, float16: ordinary rows of low rank and noise, attention
                   sinks of a hundred times their norm in one direction

Shapes, sizes, files and formats are those of the real ones; losses mean nothing, because the model is not trained.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding_bag

from saegrid.data.corpora.embedded_text import gsm_symbolic, split_templates
from saegrid.storage.atomic import write_json

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROOM = 293
"""Tokens of the model's vocabulary after the ordinary ones; of these the tokenizer has only the special ones."""
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEMS = {"train": 7_473, "test": 1_319}
"""As many as GSM8K has."""
VARIANCE, SINK_EVERY, SINK_RATIO = 47.5, 125, 100.0
"""Pooled variance of all elements; one row in so many is a sink; ratio of a sink's norm to an ordinary row's."""
DIRECTIONS, ACTIVE, RANK, NOISE = 4096, 24, 256, 0.1
CHUNK = 8192


class Size(NamedTuple):
    """Rows of the two files, and the shape of model and tokenizer."""

    train_rows: int
    val_rows: int
    d_in: int = 896
    n_layers: int = 24
    intermediate: int = 4864
    words: int = 151_643
    """Ordinary tokens."""
    merges: int = 32_000
    heads: int = 14

    def __str__(self) -> str:
        return f"{self.train_rows:,} + {self.val_rows:,} rows of {self.d_in}, {self.n_layers} blocks"


FULL = Size(285_277, 71_319)
SMALL = Size(2_000, 600, 56, 14, 304, 2_000, 500)
"""For the tests: K = 220 still fits into 4x 56 latents, and block 12 is not the last one."""


def make(folder: Path, size: Size) -> dict[str, str]:
    """Make what is missing. Returns the grid file's parameters that name it: model, dataset, activations."""
    parts: dict[str, Callable[[Path, Size], None]] = {"model": model, "dataset": dataset, "published": activations}
    for name, maker in parts.items():
        marker, facts = folder / name / "stand-in.json", list(size)
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == facts:
            continue
        print(f"stand-in: {name}", flush=True)
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        maker(folder / name, size)
        write_json(marker, facts)  # last, so that an interrupted part is made again
    return {name: str(folder / part) for name, part in zip(("model", "dataset", "activations"), parts, strict=True)}


def model(folder: Path, size: Size) -> None:
    """A seeded model, and its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        **{"hidden_size": size.d_in, "num_hidden_layers": size.n_layers, "intermediate_size": size.intermediate},
        **{
            "num_attention_heads": size.heads,
            "num_key_value_heads": 2,
            "vocab_size": size.words + ROOM,
            "tie_word_embeddings": True,
        },
        **{"max_position_embeddings": 32_768, "max_window_layers": 21, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
        **{"bos_token_id": size.words, "eos_token_id": size.words + 2},
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer(size).save_pretrained(folder)


def tokenizer(size: Size) -> Any:
    """A tokenizer with merges learnt from problems and Python's own sources; the remaining tokens have only a name."""
    from tokenizers import pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + size.merges, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(_texts(size.merges > 1000), trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = {token: index for index, token in enumerate(sorted(learnt["vocab"], key=learnt["vocab"].get))}
    vocab |= {f"<|unused_{index}|>": index for index in range(len(vocab), size.words)}
    made = Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in learnt["merges"]])
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.chat_template, made.model_max_length = CHAT, 131_072
    return made


def _texts(sources: bool) -> Iterator[str]:
    """Problems, and if wanted the sources of Python's standard library."""
    templates = split_templates(0)["train"]
    for problem in itertools.islice(gsm_symbolic(0, templates), 1000):
        yield "\n".join(problem.content)
    if sources:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield path.read_text(encoding="utf-8", errors="replace")


def dataset(folder: Path, size: Size) -> None:
    """Problems with `question` and `answer`."""
    templates = split_templates(0)
    for split, part in (("train", "train"), ("test", "eval")):
        problems = itertools.islice(gsm_symbolic(0, templates[part]), min(PROBLEMS[split], size.train_rows))
        pairs = [dict(zip(("question", "answer"), problem.content, strict=True)) for problem in problems]
        lines = [json.dumps(pair) for pair in pairs]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def activations(folder: Path, size: Size) -> None:
    """The two files of rows."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, min(RANK, size.d_in), generator=generator)
    directions = directions @ torch.randn(directions.shape[1], size.d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    sink = torch.randn(size.d_in, generator=generator)
    for split, count in (("train", size.train_rows), ("val", size.val_rows)):
        acts = torch.empty(count, size.d_in, dtype=torch.float16)
        for part in acts.split(CHUNK):
            part.copy_(_rows(len(part), directions, sink / sink.norm(), generator))
        torch.save(acts, folder / f"instruct_base_layer12_{split}.pt")


def _rows(count: int, directions: torch.Tensor, sink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows (count, d_in): sparse sums of directions and noise, scaled to the norm that gives the pooled variance."""
    d_in = directions.shape[1]
    chosen = torch.randint(len(directions), (count, ACTIVE), generator=generator)
    weights = torch.rand(count, ACTIVE, generator=generator) + 0.5
    rows = embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
    rows /= rows.norm(dim=1).mean()
    rows += NOISE * torch.randn(count, d_in, generator=generator) / d_in**0.5
    norm = (d_in * VARIANCE / (1 + SINK_RATIO**2 / SINK_EVERY)) ** 0.5
    is_sink = torch.rand(count, generator=generator) < 1 / SINK_EVERY
    rows[is_sink] += SINK_RATIO * sink
    return norm * rows
