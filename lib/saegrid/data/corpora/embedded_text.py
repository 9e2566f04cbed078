"""Texts that need no network: generated problems, and the prose and sources that come with Python.

`python_docs` and `python_code` differ a little between versions of Python: a store records the text's SHA-256.
Both are under the PSF licence (PSF-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import itertools
import random
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from saegrid.config.run_config import EMBEDDED_DATASET, RunConfig
from saegrid.data.corpora.documents import Document, documents
from saegrid.errors import ConfigError

PYTHON_DOCS, PYTHON_CODE = "embedded:python_docs", "embedded:python_code"
SHARES = {"eval": 0.2, "val": 0.2}
"""Shares of the templates (or modules) for evaluation and for validation; training gets the rest."""
CHUNK = 10_000
"""Problems drawn at once."""
SEED_STEP = 10**9
"""Distance between seeds: reasoning-gym draws problem i from seed + i, so adjacent seeds would overlap."""
OPTIONAL = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}
"""Parts of the standard library that some systems leave out; `python_code` leaves them out everywhere."""
TABLES = {"encodings", "pydoc_data"}
"""Packages that hold tables, or the text of `python_docs`; `python_code` leaves them out."""


def check_embedded(name: str) -> None:
    """Check that there is an embedded dataset of this name. Raises `ConfigError`."""
    if name not in (EMBEDDED_DATASET, PYTHON_DOCS, PYTHON_CODE):
        there = f"there are {EMBEDDED_DATASET}, {PYTHON_DOCS} and {PYTHON_CODE}"
        raise ConfigError(f"dataset = {name!r}: no such embedded dataset; {there}")


def embedded_corpus(config: RunConfig) -> dict[str, Iterator[Document]]:
    """The streams of an embedded dataset: one per split if it has templates or modules. Raises `ConfigError`."""
    check_embedded(config.dataset)
    if config.dataset == EMBEDDED_DATASET:
        templates = split_templates(config.data_seed)
        return {split: gsm_symbolic(config.data_seed, templates[split]) for split in templates}
    texts = [text for _, text in _texts(config.dataset)]
    if config.dataset == PYTHON_DOCS:
        return {"": _shuffled(documents(texts, len(texts)), config.data_seed)}
    modules = _dealt_out(list(enumerate(texts)), config.data_seed)
    return {
        split: _shuffled(
            (part._replace(index=n) for n, text in some for part in documents([text], 1)), config.data_seed
        )
        for split, some in modules.items()
    }


def embedded_identity(name: str) -> str:
    """Changes whenever the embedded text may have changed: the generator's version, or the SHA-256 of the text."""
    check_embedded(name)
    if name == EMBEDDED_DATASET:
        return f"reasoning-gym {importlib.metadata.version('reasoning-gym')}"
    return hashlib.sha256("\0".join(itertools.chain(*_texts(name))).encode()).hexdigest()


def split_templates(seed: int) -> dict[str, set[int]]:
    """The problem templates of gsm_symbolic, assigned to the splits by a seeded shuffle."""
    _reasoning_gym()
    from reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic import tasks_ok

    return {name: set(some) for name, some in _dealt_out(sorted(tasks_ok), seed).items()}


def gsm_symbolic(seed: int, templates: Iterable[int]) -> Iterator[Document]:
    """Endless GSM8K-style problems of the given templates, from reasoning-gym (arXiv:2505.24760; arXiv:2410.05229)."""
    reasoning_gym = _reasoning_gym()
    for chunk in itertools.count():
        start = seed * SEED_STEP + chunk * CHUNK
        dataset = reasoning_gym.create_dataset("gsm_symbolic", size=CHUNK, seed=start)
        for index, template in enumerate(dataset.task_indices):
            if template in templates:
                item = dataset[index]
                yield Document(template, (item["question"], item["metadata"]["answer_cot"]))


def _dealt_out(items: list[Any], seed: int) -> dict[str, list[Any]]:
    """The items in a seeded order, divided among the splits by `SHARES`."""
    order = random.Random(seed).sample(items, len(items))
    split: dict[str, list[Any]] = {}
    for name, share in SHARES.items():
        count = round(share * len(items))
        split[name], order = order[:count], order[count:]
    return {**split, "train": order}


def _shuffled(of_corpus: Iterable[Document], seed: int) -> Iterator[Document]:
    listed = list(of_corpus)
    return iter(random.Random(seed).sample(listed, len(listed)))


def _texts(name: str) -> Iterator[tuple[str, str]]:
    """(name, text) of Python's help topics, or of the standard library's modules, sorted by name."""
    if name == PYTHON_DOCS:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
        return
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - OPTIONAL - TABLES):
        for path in sorted([*root.glob(f"{module}.py"), *root.glob(f"{module}/**/*.py")]):
            parts = path.relative_to(root).parts
            if not {"test", "tests"} & set(parts):
                yield "/".join(parts), path.read_text(encoding="utf-8")


def _reasoning_gym() -> types.ModuleType:
    """The package, even without pycosat, which needs a C compiler and serves a puzzle that is not used here."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    return importlib.import_module("reasoning_gym")
