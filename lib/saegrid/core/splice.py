"""The splice evaluator: put x_hat in place of x and read the model's next-token predictions.

The rows x and the reference passes (clean, zero and mean) do not depend on the SAE: they are made once per store
(`ReferencePasses`) for all SAEs of a grid. In the residual stream, each SAE costs one pass through the blocks after the
site; at `mlp_out` and `attn_out`, one through the whole model. To that comes one through the unembedding
(`clean_logits` says how KL needs no second one). Of the clean pass the final states are stored: log-probabilities would
be a hundred times as large.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from saegrid.config.run_config import Site
from saegrid.data.language_model import LM, final_from, hidden_at, padded_batches
from saegrid.data.models.layout import TOLERANCE, apart
from saegrid.data.prompts import Prompt
from saegrid.errors import DamagedError, StoreError
from saegrid.storage.atomic import write_bytes
from saegrid.storage.checksums import read_bytes, read_sealed, write_sealed

BATCH_TOKENS = 1024
"""Padded tokens per forward pass of the model. Small passes hold prompts of similar length and so less padding."""
HEAD_ROWS = 128
"""Rows per call of the unembedding: bounds the memory of logits, of which a few copies exist at once."""
SHARED_RUN = 8
"""A run of at least this many tokens that is in all evaluation prompts is not scored."""
SUMS = ["prompt", "template", "n_tokens", "ce_clean_sum", "ce_zero_sum", "ce_mean_sum"]
"""Columns of `ReferencePasses.sums`."""
Replace = Callable[[Tensor], Tensor]
"""Maps rows (n, d_in) to those that take their place."""


@dataclass
class ReferencePasses:
    """The evaluation prompts, their rows at the run's site, and the results of the reference passes."""

    prompts: list[Prompt]
    x: list[Tensor]  # per prompt (T, d_in)
    clean: list[Tensor]  # per prompt (n, d_in): final states of the clean pass at the scored positions
    sums: pd.DataFrame  # one row per prompt, with the columns `SUMS`
    expected: list[Tensor] = field(default_factory=list)  # per prompt (n, d_in + 1): `clean_logits`; or nothing


def replaced_positions(prompt: Prompt) -> Tensor:
    """Positions that every pass but the clean one replaces, (n,) int64.

    All but the last (no token follows it) and those of skipped tokens. Of a chat prefix that every prompt shares, only
    position 0 (the attention sink) is replaced.
    """
    return torch.tensor([at for at in prompt.positions if at < len(prompt.tokens) - 1], dtype=torch.int64)


def scored_positions(prompt: Prompt) -> Tensor:
    """Replaced positions whose next token is scored, (n,) int64: that token is not in `Prompt.shared`."""
    replaced = replaced_positions(prompt)
    return replaced[~torch.isin(replaced + 1, torch.tensor(prompt.shared, dtype=torch.int64))]


def with_shared(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with `Prompt.shared`: runs of at least `SHARED_RUN` tokens after the prefix that all prompts have.

    A sentence that every prompt has tells nothing about an SAE. Nothing is marked if all prompts are of one problem
    template, or if a prompt would have no scored position left.
    """
    windows = [
        {start: tuple(prompt.tokens[start : start + SHARED_RUN]) for start in range(prompt.prefix, last + 1)}
        for prompt in prompts
        for last in [len(prompt.tokens) - SHARED_RUN]
    ]
    everywhere = set.intersection(*(set(runs.values()) for runs in windows))
    marked = []
    for prompt, runs in zip(prompts, windows, strict=True):
        shared = {at for start, run in runs.items() if run in everywhere for at in range(start, start + SHARED_RUN)}
        marked.append(dataclasses.replace(prompt, shared=sorted(shared)))
    several = len({prompt.template for prompt in prompts}) > 1
    return marked if several and all(len(scored_positions(prompt)) for prompt in marked) else prompts


def make_references(
    lm: LM, prompts: list[Prompt], layer: int, mean: Tensor, site: Site = "resid_post"
) -> ReferencePasses:
    """Run the reference passes. `mean` (d_in,) is the training rows' mean."""
    prompts = with_shared(prompts)
    x: list[Tensor] = [torch.empty(0)] * len(prompts)
    for indices, ids, mask in padded_batches([prompt.tokens for prompt in prompts], BATCH_TOKENS):
        hidden = hidden_at(lm, ids, mask, layer, site)
        for row, index in enumerate(indices):
            x[index] = hidden[row, : len(prompts[index].tokens)].clone()
    frame = pd.DataFrame(
        {
            "prompt": range(len(prompts)),
            "template": [prompt.template for prompt in prompts],
            "n_tokens": [len(scored_positions(prompt)) for prompt in prompts],
        }
    )
    clean = splice(lm, prompts, x, layer, lambda rows: rows, site)
    frame["ce_clean_sum"] = _sums(token_scores(lm, prompts, clean), frame)["ce"]
    passes = {"zero": torch.zeros_like, "mean": lambda rows: mean.to(rows).expand_as(rows)}
    for name, replace in passes.items():
        final = _ablated(lm, prompts, x, layer, replace, site)
        frame[f"ce_{name}_sum"] = _sums(token_scores(lm, prompts, final), frame)["ce"]
    return ReferencePasses(prompts, x, clean, frame, clean_logits(lm, clean))


def splice(
    lm: LM,
    prompts: list[Prompt],
    x: list[Tensor],
    layer: int,
    replace: Replace,
    site: Site = "resid_post",
) -> list[Tensor]:
    """Final states at each prompt's scored positions, (n, d_in) in the model's dtype.

    Args:
        x: rows of each prompt at `site` of block `layer`, (T, d_in).
        replace: maps the rows at the replaced positions (n, d_in) to their replacements; called once per batch.
    """
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for indices, ids, mask in padded_batches([prompt.tokens for prompt in prompts], BATCH_TOKENS):
        hidden = torch.zeros(*ids.shape, x[0].shape[1], dtype=x[0].dtype, device=str(lm.model.device))
        where = [replaced_positions(prompts[index]) for index in indices]
        for row, index in enumerate(indices):
            hidden[row, : len(x[index])] = x[index]
        rows = torch.cat([torch.full_like(positions, row) for row, positions in enumerate(where)])
        positions = torch.cat(where)
        hidden[rows, positions] = replace(hidden[rows, positions].float()).to(hidden)
        final = final_from(lm, hidden, ids, mask, layer, site)
        for row, index in enumerate(indices):
            found[index] = final[row, scored_positions(prompts[index])]
    return found


def _ablated(lm: LM, prompts: list[Prompt], x: list[Tensor], layer: int, replace: Replace, site: Site) -> list[Tensor]:
    """`splice` if `replace` gives every row the same value: in the residual stream, all prompts get equal states.

    So the two longest prompts are run, and the longest one's states serve all. If the two differ, or if a prompt keeps
    some of its rows, every prompt is run.
    """
    pair = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].tokens))[:2]
    replaced = all(len(replaced_positions(prompt)) == len(prompt.tokens) - 1 for prompt in prompts)
    if len(pair) == 2 and replaced and site in ("resid_post", "resid_pre"):
        whole = [dataclasses.replace(prompts[index], shared=[]) for index in pair]
        states, others = splice(lm, whole, [x[index] for index in pair], layer, replace, site)
        if apart(states[: len(others)], others) < TOLERANCE["float32"]:
            return [states[scored_positions(prompt)] for prompt in prompts]
    return splice(lm, prompts, x, layer, replace, site)


@torch.inference_mode()
def clean_logits(lm: LM, clean: list[Tensor]) -> list[Tensor]:
    """What KL(p ‖ q) needs of the clean predictions p where logits are W h + c: per prompt (n, d_in + 1).

    KL is Σ p log p - Σ p logit_q + logsumexp(logit_q), with Σ p logit_q = (Σ p W) · h + Σ p c. The columns are Σ p W
    and, last, Σ p (log p - c). Nothing for other heads, such as Gemma 2's, and for rounded logits (bfloat16).
    """
    weight, states = lm.unembedding, torch.cat(clean)
    if weight is None or states.dtype == torch.bfloat16 or not len(states):
        return []
    c = lm.head(torch.zeros_like(states[:1]))
    if weight.shape != (c.shape[1], states.shape[1]):
        return []
    linear = states[:HEAD_ROWS].to(weight) @ weight.T + c
    if not torch.allclose(lm.head(states[:HEAD_ROWS]), linear, rtol=1e-4, atol=1e-3):
        return []
    found = []
    for part in torch.split(states, HEAD_ROWS):
        log_p = lm.head(part).double().log_softmax(1)  # a p that sums to 1 + ε would move KL by ε logits
        p = log_p.exp()
        found.append(torch.cat([p.to(weight) @ weight, (p * (log_p - c)).sum(1, keepdim=True).float()], 1).cpu())
    return list(torch.split(torch.cat(found), [len(one) for one in clean]))


@torch.inference_mode()
def token_scores(
    lm: LM,
    prompts: list[Prompt],
    final: list[Tensor],
    clean: list[Tensor] | None = None,
    expected: list[Tensor] | None = None,
) -> pd.DataFrame:
    """One row per scored position, in nats: `prompt`, `ce` of the next token and, with `clean`, `kl`.

    `kl` is KL(p_clean ‖ p) over the whole vocabulary, p being the prediction from the final states `final`.
    `expected`: `clean_logits`, which saves the unembedding of `clean`.
    """
    where = [(index, position + 1) for index, prompt in enumerate(prompts) for position in scored_positions(prompt)]
    frame = pd.DataFrame({"prompt": [index for index, _ in where]}, dtype="int64")
    targets = torch.tensor([prompts[index].tokens[following] for index, following in where], dtype=torch.int64)
    chunks = [torch.split(torch.cat(states), HEAD_ROWS) for states in (final, expected or clean or final)]
    found: dict[str, list[Tensor]] = {"ce": [], "kl": []} if clean else {"ce": []}
    for states, reference, wanted in zip(*chunks, torch.split(targets, HEAD_ROWS), strict=True):
        logits = lm.head(states).float()
        norm = logits.logsumexp(1).double()
        found["ce"].append(norm - logits.gather(1, wanted[:, None].to(logits.device))[:, 0].double())
        if expected:
            h, known = states.double(), reference.to(states.device).double()
            found["kl"].append(((known[:, -1] - (known[:, :-1] * h).sum(1)).to(norm) + norm).clamp_min(0))
        elif clean:
            log_p, log_q = lm.head(reference).float().log_softmax(1), logits.log_softmax(1)
            found["kl"].append((log_p.exp() * (log_p - log_q)).sum(1, dtype=torch.float64))
    return frame.assign(**{name: torch.cat(values).cpu().numpy() for name, values in found.items()})


def evaluate(
    lm: LM, references: ReferencePasses, layer: int, replace: Replace, site: Site = "resid_post"
) -> pd.DataFrame:
    """Per-prompt sums over scored positions: the columns `SUMS`, `ce_spliced_sum` and `kl_sum`."""
    final = splice(lm, references.prompts, references.x, layer, replace, site)
    scores = token_scores(lm, references.prompts, final, references.clean, references.expected)
    found = _sums(scores, references.sums)
    return references.sums.assign(ce_spliced_sum=found["ce"], kl_sum=found["kl"])


def mean_losses(sums: pd.DataFrame) -> dict[str, float]:
    """Nats per token of each pass, and KL: sums over all prompts, divided once."""
    names = {name: f"ce_{name}_sum" for name in ("clean", "spliced", "zero", "mean")} | {"kl": "kl_sum"}
    tokens = sums["n_tokens"].sum()
    return {name: float(sums[column].sum() / tokens) for name, column in names.items()}


def save_references(references: ReferencePasses, folder: Path, data_sha256: str = "") -> None:
    """Write `baseline.safetensors`, then `baseline.json`, into a store's folder; `data_sha256`: hash of its rows."""
    tensors = {"x": references.x, "clean": references.clean, "expected": references.expected}
    content = save({name: torch.cat(parts) for name, parts in tensors.items() if parts})
    write_bytes(folder / "baseline.safetensors", content)
    prompts = [prompt.record() for prompt in references.prompts]
    hashes = {"data_sha256": data_sha256, "x_sha256": hashlib.sha256(content).hexdigest()}
    write_sealed(folder / "baseline.json", {**hashes, "prompts": prompts, "sums": references.sums.to_dict("list")})


def load_references(folder: Path, data_sha256: str = "") -> ReferencePasses | None:
    """Load a store's reference passes, checked against `data_sha256` if that is given; None if they have not been made.

    Raises:
        StoreError: they are damaged, or belong to another store.
    """
    path, weights = folder / "baseline.json", folder / "baseline.safetensors"
    if not path.exists():
        return None
    try:
        content = read_sealed(path)
        if data_sha256 and content["data_sha256"] != data_sha256:
            raise DamagedError(f"{path}: damaged (another store's)")
        prompts = [Prompt(**prompt) for prompt in content["prompts"]]
        stored = read_bytes(weights)
        if hashlib.sha256(stored).hexdigest() != content["x_sha256"]:
            raise DamagedError(f"{weights}: damaged (not the SHA-256 in {path.name})")
        tensors = load(stored)
        x = torch.split(tensors["x"], [len(prompt.tokens) for prompt in prompts])
        scored = [len(scored_positions(prompt)) for prompt in prompts]
        clean = torch.split(tensors["clean"], scored)
        expected = torch.split(tensors["expected"], scored) if "expected" in tensors else ()
        return ReferencePasses(prompts, list(x), list(clean), pd.DataFrame(content["sums"])[SUMS], list(expected))
    except DamagedError as error:
        raise StoreError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path}: damaged ({error!r})") from None


def _sums(scores: pd.DataFrame, of: pd.DataFrame) -> pd.DataFrame:
    """Sums of each prompt's scores, one row for each row of `of`."""
    return scores.groupby("prompt").sum().reindex(of.index, fill_value=0.0)
