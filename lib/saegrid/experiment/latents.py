"""What an SAE's latents respond to and what they write, from a finished run: the content of the latents page.

Everything is computed from the run's weights and the activation store's validation rows, whose tokens, positions and
prompts are stored with them. Needs torch and the language model; the page itself needs neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saegrid.config import settings
from saegrid.core.metrics import is_sink, sink_norm
from saegrid.core.sae import SAE
from saegrid.data.collect import open_store
from saegrid.data.language_model import LM, final_from, load_lm
from saegrid.data.sources import pinned
from saegrid.data.store import Store
from saegrid.experiment import finished_run, stability
from saegrid.formats.run_folder import load_folder

SAMPLE = 240
"""Latents on the page."""
BINS = 12
"""Equal bins of log firing frequency, from each of which the sample takes the same number."""
CONTEXTS = 8
BEFORE, AFTER = 20, 8
"""Context tokens before and after the one where the latent fires most."""
TOKENS, NEIGHBOURS = 10, 5
BATCH_ROWS = 2048


def describe(run_dir: Path, store_dir: Path, size: int = SAMPLE, other_seeds: Sequence[Path] = ()) -> dict[str, Any]:
    """The run's facts and, for a sample of its latents, firing, contexts, unembedded tokens and neighbours.

    `other_seeds` are the folders of runs that differ in their seed alone: `found_again` says with how many of them a
    latent is stable, and `match_cosine` the mean cosine of its matches (None: it has no match).
    """
    config = finished_run.load_config(run_dir, run_dir.name, store_dir=str(store_dir))
    facts = finished_run.load_run(run_dir)
    sae, store = load_folder(run_dir), open_store(config)
    lm = load_lm(pinned(config, store.manifest))
    fired = finished_run.load_latents(pd.DataFrame([facts]), run_dir.parent)["fired"].to_numpy()
    chosen = sample(fired, size)
    acts = activations(sae, store, chosen)  # (n_val, size)
    limit = sink_norm(store.batches("val", BATCH_ROWS))
    sinks = torch.cat([is_sink(x, limit) for x in store.batches("val", BATCH_ROWS)])
    meta = {name: tensor.numpy() for name, tensor in store.meta("val").items()}
    tokens = Tokens(lm.tokenizer)
    effects = unembed(lm, sae.W_dec[chosen])
    near = neighbours(sae.W_dec, chosen)
    seeds = stability.again(run_dir, list(other_seeds), store, config) if other_seeds else {}
    entries = []
    for n, latent in enumerate(chosen.tolist()):
        own = acts[:, n]
        again, cosine = seeds.get(latent, (0, None))
        quiet = own.masked_fill(sinks, 0.0)
        entries.append(
            {"latent": latent, "fired": int(fired[latent]), "fired_on_sinks": int((own[sinks] > 0).sum())}
            | {"mean_act": float(quiet.sum() / (quiet > 0).sum().clamp_min(1)), "max_act": float(quiet.max())}
            | {"contexts": contexts(quiet.numpy(), meta, tokens), **_extremes(effects[n], tokens)}
            | {"found_again": again, "match_cosine": cosine}
            | {"neighbours": [[other, round(near_cosine, 3), int(fired[other])] for other, near_cosine in near[n]]}
        )
    names = ("run_id", "name", "arch", "model", "layer", "sinks", "d_sae", "n_val_rows", "dead_pct")
    kept = {name: facts[name] for name in names} | {"label": settings.label(facts)}
    counts = {
        "all_fired": fired.tolist(),
        "n_alive": int((fired > 0).sum()),
        "n_sink_rows": int(sinks.sum()),
        "other_seeds": len(other_seeds),
    }
    return kept | counts | {"tokens_known": bool((meta["token_ids"] >= 0).all()), "latents": entries}


def sample(fired: np.ndarray, size: int = SAMPLE) -> np.ndarray:
    """Up to `size` latents that fire, spread over the range of log firing frequency, from rare to frequent.

    Bins with fewer latents than their share give all they have; the others share what is left.
    """
    alive = np.flatnonzero(fired)
    order = alive[np.argsort(fired[alive], kind="stable")]
    if len(order) <= size:
        return order
    level = np.log(fired[order])
    edges = np.linspace(level[0], level[-1], BINS + 1)[1:-1]
    groups = [order[np.digitize(level, edges) == step] for step in range(BINS)]
    taken: list[int] = []
    for n, group in enumerate(sorted(groups, key=len)):
        share = min(len(group), (size - len(taken)) // (BINS - n))
        taken += group[np.linspace(0, len(group) - 1, share).round().astype(int)].tolist() if share else []
    return np.array(sorted(taken, key=lambda latent: (fired[latent], latent)))


@torch.inference_mode()
def activations(sae: SAE, store: Store, chosen: np.ndarray) -> Tensor:
    """latent_acts of the chosen latents on the validation rows, (n_val, len(chosen)), by the inference rule."""
    column = torch.full((sae.d_sae,), -1)
    column[torch.from_numpy(chosen)] = torch.arange(len(chosen))
    acts = torch.zeros(store.n_val, len(chosen))
    done = 0
    for x in store.batches("val", BATCH_ROWS):
        codes = sae.codes(x)
        rows = torch.repeat_interleave(torch.arange(done, done + len(x)), codes.offsets.diff())
        columns = column[codes.latents.long()]
        kept = columns >= 0
        acts[rows[kept], columns[kept]] = codes.values[kept]
        done += len(x)
    return acts


def contexts(acts: np.ndarray, meta: dict[str, np.ndarray], tokens: Tokens) -> list[dict[str, Any]]:
    """Contexts where a latent fires most: at most one per prompt, no two with the same five tokens up to the peak.

    Args:
        acts: the latent's activation on each validation row, (n_val,).
        meta: `token_ids`, `positions`, `prompts` of the rows; token id -1: unknown, gives no contexts.
    """
    ids, prompts, positions = meta["token_ids"], meta["prompts"], meta["positions"]
    found: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for peak in np.argsort(-acts, kind="stable")[: 50 * CONTEXTS]:
        if acts[peak] <= 0 or ids[peak] < 0 or len(found) == CONTEXTS:
            break
        first, last = max(peak - BEFORE, 0), min(peak + AFTER + 1, len(acts))
        rows = np.arange(first, last)
        rows = rows[prompts[rows] == prompts[peak]]
        keys = {int(prompts[peak]), tuple(ids[rows[rows <= peak]][-5:])}
        if seen & keys:
            continue
        seen |= keys
        found.append(
            {"tokens": [tokens[i] for i in ids[rows]], "acts": [round(float(a), 3) for a in acts[rows]]}
            | {"peak": int(peak - rows[0]), "whole": bool(positions[rows[0]] == 0)}
        )
    return found


@torch.inference_mode()
def unembed(lm: LM, directions: Tensor) -> Tensor:
    """Logits (n, vocabulary) of directions (n, d_in) alone, centred over the vocabulary.

    A direction passes through the final norm (its scale, and its centring if it has one) and the head; the logits of a
    zero vector are subtracted. The blocks after the hook are skipped: this is the direct path only.
    """
    zero = torch.zeros_like(directions[:1])
    size = min(64, lm.max_positions or 64)
    logits = []
    for part in directions.split(size - 1):
        x = torch.cat([zero, part])[None]  # (1, n + 1, d_in)
        ids = torch.zeros(x.shape[:2], dtype=torch.long)
        states = final_from(lm, x, ids, torch.ones_like(ids), lm.n_layers - 1)[0]
        both = lm.head(states).float()[:, : len(lm.tokenizer)].cpu()
        logits.append(both[1:] - both[:1])
    effect = torch.cat(logits)
    return effect - effect.mean(1, keepdim=True)


@torch.inference_mode()
def neighbours(w_dec: Tensor, chosen: np.ndarray) -> list[list[tuple[int, float]]]:
    """For each chosen latent, those whose decoder directions have the largest cosine with its own: (latent, cosine)."""
    unit = w_dec / w_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosines = unit[chosen] @ unit.T  # (n, d_sae)
    cosines[torch.arange(len(chosen)), torch.from_numpy(chosen)] = -2.0
    top = cosines.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
    return [
        list(zip(rows, values, strict=True))
        for rows, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


class Tokens(dict):
    """Maps a token id to its text, with the leading space that the tokenizer means."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        raw = self.tokenizer.convert_ids_to_tokens(int(token))
        text = self.tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
        text = raw or "" if "\ufffd" in text else text  # a part of a character: the tokenizer's own name for it
        self[token] = f" {text}" if (raw or "").startswith("▁") and not text.startswith(" ") else text
        return self[token]


def _extremes(effect: Tensor, tokens: Tokens) -> dict[str, list]:
    """The tokens that a direction raises and lowers most, with their centred logits."""
    found = {}
    for name, sign in (("promoted", 1), ("demoted", -1)):
        top = (sign * effect).topk(min(TOKENS, len(effect)))
        pairs = zip(top.indices.tolist(), (sign * top.values).tolist(), strict=True)
        found[name] = [[tokens[token], round(value, 2)] for token, value in pairs]
    return found
