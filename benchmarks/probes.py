"""Are latents useful? Sparse probing: a logistic regression on the few latents most correlated with a concept.

    python benchmarks/probes.py runs/RUN_ID [runs/RUN_ID ...]     # runs on one activation store

For each concept in `CONCEPTS`, whose labels are computed from the text, and for each K in `KS`: the K latents of the
largest absolute correlation with the label on balanced training tokens, a logistic regression on them, and its ROC AUC
on the held-out tokens, which come from other problem templates. The same on K coordinates of the residual stream, on K
of its principal components, on K latents of an untrained SAE (random directions), and on all
coordinates. Mean over `DRAWS` draws of the training tokens. Attention sinks are left out. Writes
`results/probes/probes.csv`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from saegrid.config.run_config import make_config
from saegrid.core.metrics import sink_norm
from saegrid.core.sae import SAE, initial_sae
from saegrid.data.collect import open_store
from saegrid.data.language_model import load_lm
from saegrid.data.sources import pinned
from saegrid.data.store import Store
from saegrid.experiment.finished_run import load_config
from saegrid.formats import load_sae
from saegrid.kernels import cpu as kernel
from saegrid.kernels import set_threads
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
KS = (1, 5, 20)
DRAWS, TOKENS_EACH = 3, 2000
"""Number of draws of training tokens, and the most tokens with, and without, the concept in each draw."""
LEAST = 50
"""A concept with fewer held-out tokens with it, or without it, is left out."""
NUMBER, SENTENCE, WORD = r"\d[\d,]*(?:\.\d+)?", r"[^.?!\n]+[.?!\n]*", r"[A-Za-z]{3,}"


class Concept(NamedTuple):
    """A property of tokens."""

    from_token: bool  # whether the current token alone decides it
    where: Callable[[str], list[tuple[int, int]]]  # the characters that have it, as (start, end), from the text


def found(pattern: str, keep: Callable[[re.Match], bool] = lambda _: True) -> Callable[[str], list[tuple[int, int]]]:
    """Where a pattern matches and `keep` is true of the match."""
    return lambda text: [match.span() for match in re.finditer(pattern, text) if keep(match)]


def repeated(pattern: str) -> Callable[[str], list[tuple[int, int]]]:
    """Where a pattern matches what it has matched before in the text."""

    def where(text: str) -> list[tuple[int, int]]:
        seen, spans = set(), []
        for match in re.finditer(pattern, text):
            key = match[0].lower()
            spans += [match.span()] if key in seen else []
            seen.add(key)
        return spans

    return where


CONCEPTS = {
    "digit": Concept(True, found(r"\d")),
    "capital letter": Concept(True, found(r"[A-Z]")),
    "punctuation": Concept(True, found(r"[.,;:?!]")),
    "operator": Concept(True, found(r"[-+*/=×÷%]")),
    "article or preposition": Concept(True, found(r"\b(?:the|an?|of|in|to|for|from|with|at|on|by)\b")),
    "after the first line": Concept(False, lambda text: [(text.find("\n") + 1, len(text))] if "\n" in text else []),
    "first sentence": Concept(
        False, lambda text: [re.match(SENTENCE, text).span()] if re.match(SENTENCE, text) else []
    ),
    "sentence that asks": Concept(False, found(SENTENCE, lambda match: match[0].rstrip().endswith("?"))),
    "number over 100": Concept(False, found(NUMBER, lambda match: float(match[0].replace(",", "")) > 100)),
    "second or later digit": Concept(False, found(r"(?<=\d)\d")),
    "number seen before": Concept(False, repeated(NUMBER)),
    "word seen before": Concept(False, repeated(WORD)),
    "right of an equals sign": Concept(False, found(r"(?<==)[^=\n.]+")),
    "name inside a sentence": Concept(False, found(r"(?<=[a-z,] )[A-Z][a-z]+")),
    "in brackets": Concept(False, found(r"(?<=\()[^()\n]+(?=\))")),
    "in quotes": Concept(False, found(r"(?<=\")[^\"\n]+(?=\")")),
    "right of a hash": Concept(False, found(r"(?<=#)[^#\n]+")),
}
"""Concepts by name. A token has a concept if one of its characters has, leading spaces aside."""


def labelled(pieces: list[str]) -> dict[str, np.ndarray]:
    """Which tokens of a text have each concept, (n,) bool, from the tokens' own texts."""
    text = "".join(pieces)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece.lstrip()) or len(piece) for piece in pieces]  # without a word's leading space
    labels = {}
    for name, concept in CONCEPTS.items():
        has = np.zeros(len(text) + 1, dtype=int)
        for start, end in concept.where(text):
            has[start + 1 : end + 1] = 1
        before = np.cumsum(has)  # characters with the concept before each position
        labels[name] = before[ends] > before[starts]
    return labels


def labels_of(store: Store, split: str, tokenizer) -> dict[str, np.ndarray]:
    """Which rows of a split have each concept."""
    meta = {name: tensor.numpy() for name, tensor in store.meta(split).items()}
    texts = {token: tokenizer.decode([token]) for token in np.unique(meta["token_ids"]).tolist()}
    groups = np.split(meta["token_ids"], np.flatnonzero(np.diff(meta["prompts"])) + 1)
    parts = [labelled([texts[token] for token in tokens.tolist()]) for tokens in groups]
    return {name: np.concatenate([part[name] for part in parts]) for name in CONCEPTS}


Matrix = np.ndarray | scipy.sparse.csc_matrix


def latents(sae: SAE, x: torch.Tensor) -> scipy.sparse.csc_matrix:
    """latent_acts of the rows x (N, d_in), (N, d_sae)."""
    parts = []
    for rows in x.split(2048):
        codes = sae.codes(rows, kernel)
        content = (codes.values.numpy(), codes.latents.numpy(), codes.offsets.numpy())
        parts.append(scipy.sparse.csr_matrix(content, shape=(len(rows), sae.d_sae)))
    return scipy.sparse.vstack(parts).tocsc()


def most_telling(inputs: Matrix, has: np.ndarray, k: int) -> np.ndarray:
    """The k columns of the largest absolute correlation with a label, the largest first; a constant column has none."""
    n, y = len(has), has - has.mean()
    squares = inputs.multiply(inputs) if scipy.sparse.issparse(inputs) else np.square(inputs)
    sums, squares = (np.asarray(some.sum(axis=0)).ravel() for some in (inputs, squares))
    spread = np.sqrt(np.clip(squares / n - np.square(sums / n), 0, None))
    correlation = np.divide(np.abs(inputs.T @ y), spread, out=np.zeros(len(spread)), where=spread > 1e-6)
    return np.argsort(-correlation, kind="stable")[:k]


def auc(train: Matrix, has: np.ndarray, test: Matrix, test_has: np.ndarray, k: int) -> float:
    """ROC AUC on held-out tokens of a logistic regression on the k most telling columns; 0: on all."""
    if k:
        columns = most_telling(train, has, k)
        train, test = (dense(some[:, columns]) for some in (train, test))
    scaler = StandardScaler().fit(train)
    probe = LogisticRegression(max_iter=300).fit(scaler.transform(train), has)
    return float(roc_auc_score(test_has, probe.decision_function(scaler.transform(test))))


def dense(inputs: Matrix) -> np.ndarray:
    return inputs.toarray() if scipy.sparse.issparse(inputs) else inputs


def balanced(has: np.ndarray, seed: int) -> np.ndarray:
    """Indices of equally many rows with and without a concept."""
    rng = np.random.default_rng(seed)
    sides = np.flatnonzero(has), np.flatnonzero(~has)
    count = min(TOKENS_EACH, *map(len, sides))
    return np.concatenate([rng.choice(side, count, replace=False) for side in sides])


def probed(train: Matrix, test: Matrix, labels: dict[str, dict[str, np.ndarray]], ks: tuple[int, ...]) -> pd.DataFrame:
    """Mean AUC over the draws, one row per concept and k; `labels` by split and concept."""
    records = []
    for name, concept in CONCEPTS.items():
        has, test_has = labels["train"][name], labels["val"][name]
        if min(test_has.sum(), (~test_has).sum(), has.sum(), (~has).sum()) < LEAST:
            continue
        draws = [balanced(has, seed) for seed in range(DRAWS)]
        told = {"concept": name, "from_token": concept.from_token, "share_pct": 100 * test_has.mean()}
        for k in ks:
            found = [auc(train[draw], has[draw], test, test_has, k) for draw in draws]
            records.append(told | {"k": k, "auc": np.mean(found), "auc_sd": np.std(found, ddof=1)})
    return pd.DataFrame(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--store-dir", type=Path, default=Path("activations"))
    parser.add_argument("--out", type=Path, default=ROOT / "results/probes")
    options = parser.parse_args()
    set_threads(1)
    configs = [load_config(run, run.name, store_dir=str(options.store_dir)) for run in options.runs]
    if len({config.store_id for config in configs}) > 1:
        parser.error(f"runs: must be on one activation store, not on {', '.join(c.store_id for c in configs)}")
    store = open_store(configs[0])
    tokenizer = load_lm(pinned(configs[0], store.manifest), device="cpu").tokenizer
    limit, rows, labels = sink_norm(store.batches("train", 2048)), {}, {}
    for split in ("train", "val"):
        x = store.rows(split)
        keep = x.norm(dim=1) <= limit
        rows[split] = x[keep]
        labels[split] = {name: has[keep.numpy()] for name, has in labels_of(store, split, tokenizer).items()}
    mean = rows["train"].mean(0)
    directions = torch.linalg.eigh(torch.cov(rows["train"].T.double()))[1].flip(1).float()  # one per column
    principal_rows = {split: ((x - mean) @ directions).numpy() for split, x in rows.items()}
    start = initial_sae(make_config(arch="TopK", k=64, recipe="improved"), store.d_in, mean)
    parts = [
        probed(*(x.numpy() for x in rows.values()), labels, (*KS, 0)).assign(inputs="residual"),
        probed(*principal_rows.values(), labels, KS).assign(inputs="PCA"),
        probed(*(latents(start, x) for x in rows.values()), labels, KS).assign(inputs="untrained SAE"),
    ]
    for run, config in zip(options.runs, configs, strict=True):
        told = {"inputs": "latents", "name": config.name, "arch": config.arch, "recipe": config.recipe}
        sae = load_sae(run)
        found = probed(*(latents(sae, x) for x in rows.values()), labels, KS)
        parts.append(found.assign(**told, seed=config.seed, run_id=run.name))
        print(found.groupby("k")["auc"].mean().round(3).to_dict(), run.name, flush=True)
    columns = ["inputs", "name", "arch", "recipe", "seed", "run_id", *parts[0].columns[:-1]]
    table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "probes.csv", table.round(5).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
