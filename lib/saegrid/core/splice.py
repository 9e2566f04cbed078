"""The splice evaluator: put x_hat in place of the residual stream and read the model's next-token loss.

The prefix up to the hooked block and the reference passes (clean, zero and mean) do not depend on the SAE: they run
once per store (`Baseline`) for all SAEs of a grid. Each SAE costs one pass through the blocks after the hooked one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from saegrid.data.language_model import LM, final_from, hidden_at, padded_batches
from saegrid.data.prompts import Prompt
from saegrid.errors import DamagedError, StoreError
from saegrid.storage.atomic import write_bytes
from saegrid.storage.checksums import read_bytes, read_sealed, write_sealed

BATCH_TOKENS = 4096
"""Padded tokens per forward pass of the model."""
HEAD_ROWS = 1024
"""Rows per call of the unembedding: bounds the logits' memory."""
SUMS = ["prompt", "template", "n_tokens", "ce_clean_sum", "ce_zero_sum", "ce_mean_sum"]
"""Columns of `Baseline.sums`."""


@dataclass
class Baseline:
    """The evaluation prompts, their residual stream at the hooked block, and their losses in the reference passes."""

    prompts: list[Prompt]
    x: list[Tensor]  # per prompt (T, d_in)
    sums: pd.DataFrame  # one row per prompt, with the columns `SUMS`


def scored_positions(prompt: Prompt) -> Tensor:
    """Positions that are replaced and whose next token is scored, (n,) int64.

    All positions except the last (no token follows it) and a chat prefix that every prompt shares, of which only
    position 0 (the attention sink) is kept. The clean, spliced, zero and mean passes use the same positions.
    """
    scored = [position for position in prompt.positions if position < len(prompt.tokens) - 1]
    return torch.tensor(scored, dtype=torch.int64)


def make_baseline(lm: LM, prompts: list[Prompt], layer: int, mean: Tensor) -> Baseline:
    """Run the reference passes. `mean` (d_in,) is the training rows' mean."""
    x: list[Tensor] = [torch.empty(0)] * len(prompts)
    for indices, ids, mask in padded_batches([prompt.tokens for prompt in prompts], BATCH_TOKENS):
        hidden = hidden_at(lm, ids, mask, layer)
        for row, index in enumerate(indices):
            x[index] = hidden[row, : len(prompts[index].tokens)].clone()
    frame = pd.DataFrame(
        {
            "prompt": range(len(prompts)),
            "template": [prompt.template for prompt in prompts],
            "n_tokens": [len(scored_positions(prompt)) for prompt in prompts],
        }
    )
    passes = {"clean": lambda rows: rows, "zero": torch.zeros_like, "mean": lambda rows: mean.to(rows).expand_as(rows)}
    for name, replace in passes.items():
        frame[f"ce_{name}_sum"] = [losses.sum().item() for losses in splice(lm, prompts, x, layer, replace)]
    return Baseline(prompts, x, frame)


def splice(
    lm: LM, prompts: list[Prompt], x: list[Tensor], layer: int, replace: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Cross-entropy at each prompt's scored positions, (n,) float64, in nats.

    Args:
        x: residual stream of each prompt after block `layer`, (T, d_in).
        replace: maps the rows at the scored positions (n, d_in) to their replacements; called once per batch.
    """
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for indices, ids, mask in padded_batches([prompt.tokens for prompt in prompts], BATCH_TOKENS):
        hidden = torch.zeros(*ids.shape, x[0].shape[1], dtype=x[0].dtype, device=str(lm.model.device))
        where = [scored_positions(prompts[index]) for index in indices]
        for row, index in enumerate(indices):
            hidden[row, : len(x[index])] = x[index]
        rows = torch.cat([torch.full_like(positions, row) for row, positions in enumerate(where)])
        positions = torch.cat(where)
        hidden[rows, positions] = replace(hidden[rows, positions].float()).to(hidden)
        final = final_from(lm, hidden, ids, mask, layer)[rows, positions]
        losses = _cross_entropy(lm, final, ids[rows, positions + 1])
        for row, index in enumerate(indices):
            found[index] = losses[rows == row]
    return found


def evaluate(lm: LM, baseline: Baseline, layer: int, replace: Callable[[Tensor], Tensor]) -> pd.DataFrame:
    """Per-prompt loss sums of all four passes: the columns `SUMS` and `ce_spliced_sum`."""
    losses = splice(lm, baseline.prompts, baseline.x, layer, replace)
    return baseline.sums.assign(ce_spliced_sum=[of_prompt.sum().item() for of_prompt in losses])


def mean_losses(sums: pd.DataFrame) -> dict[str, float]:
    """Nats per token of each pass: sums over all prompts, divided once."""
    tokens = sums["n_tokens"].sum()
    return {name: float(sums[f"ce_{name}_sum"].sum() / tokens) for name in ("clean", "spliced", "zero", "mean")}


def save_baseline(baseline: Baseline, folder: Path, data_sha256: str = "") -> None:
    """Write `baseline.safetensors`, then `baseline.json`, into a store's folder; `data_sha256`: hash of its rows."""
    content = save({"x": torch.cat(baseline.x)})
    write_bytes(folder / "baseline.safetensors", content)
    prompts = [prompt.record() for prompt in baseline.prompts]
    hashes = {"data_sha256": data_sha256, "x_sha256": hashlib.sha256(content).hexdigest()}
    write_sealed(folder / "baseline.json", {**hashes, "prompts": prompts, "sums": baseline.sums.to_dict("list")})


def load_baseline(folder: Path, data_sha256: str = "") -> Baseline | None:
    """Load a store's baseline, checked against `data_sha256` if that is given; None if it has not been made.

    Raises:
        StoreError: the baseline is damaged, or belongs to another store.
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
        x = torch.split(load(stored)["x"], [len(p.tokens) for p in prompts])
        return Baseline(prompts, list(x), pd.DataFrame(content["sums"])[SUMS])
    except DamagedError as error:
        raise StoreError(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path}: damaged ({error!r})") from None


@torch.inference_mode()
def _cross_entropy(lm: LM, final: Tensor, targets: Tensor) -> Tensor:
    """Loss of each row, (n,) float64 nats, from final states (n, d_in)."""
    losses = [
        F.cross_entropy(lm.head(states).float(), wanted, reduction="none").double()
        for states, wanted in zip(
            torch.split(final, HEAD_ROWS), torch.split(targets.to(final.device), HEAD_ROWS), strict=True
        )
    ]
    return torch.cat(losses)
