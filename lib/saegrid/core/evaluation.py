"""Evaluation of a trained SAE: its reconstruction of held-out rows, and the model's loss with it spliced in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd
import torch

from saegrid.config.run_config import RunConfig
from saegrid.core.metrics import Reconstruction, is_sink, sink_norm, splice_metrics
from saegrid.core.sae import SAE
from saegrid.core.splice import ReferencePasses, evaluate, load_references, mean_losses, scored_positions
from saegrid.core.stability import coherence
from saegrid.data.language_model import evaluating_lm
from saegrid.data.sources import pinned
from saegrid.data.store import Store
from saegrid.errors import StoreError
from saegrid.kernels import Kernel


def evaluate_rows(
    sae: SAE, store: Store, batch_size: int, kernel: Kernel
) -> tuple[dict[str, float], pd.DataFrame, pd.DataFrame]:
    """Validation metrics, firing per latent, and squared error per token position."""
    sums = Reconstruction(sae.d_sae, sink_norm(store.batches("val", batch_size, device=sae.device)))
    errors = []
    for x in store.batches("val", batch_size, device=sae.device):
        codes = sae.codes(x, kernel)
        errors.append(sums.add(x, kernel.decode(sae.params, codes), codes))
    found = sums.result() | {"decoder_coherence": coherence(sae, sums.fired > 0)}
    mean_act = (sums.act_sum / sums.fired.clamp_min(1)).numpy()
    latents = pd.DataFrame({"latent": range(sae.d_sae), "fired": sums.fired, "mean_act": mean_act})
    latents["max_act"] = sums.act_max
    mean = sums.every.mean
    batches = store.batches("val", batch_size, device=sae.device)
    centred = torch.cat([(x.double() - mean).square().sum(1) for x in batches])
    rows = pd.DataFrame({"position": store.meta("val")["positions"], "sq_error": torch.cat(errors).cpu()})
    rows["sq_norm_centred"] = centred.cpu()
    positions = rows.groupby("position").agg(
        n_rows=("sq_error", "size"), sq_error=("sq_error", "mean"), sq_norm_centred=("sq_norm_centred", "mean")
    )
    return found, latents, positions.reset_index()


def spliced(config: RunConfig, store: Store, sae: SAE, kernel: Kernel, leave_sinks: bool = False) -> pd.DataFrame:
    """One row per evaluation prompt: losses with the SAE spliced in (`splice.evaluate`) and columns of `reconstructed`.

    Args:
        leave_sinks: do not replace the rows of attention sinks.
    """
    references = load_references(store.folder, store.data_sha256)
    if references is None:
        raise StoreError(f"{store.folder}: no reference passes here; `python -m saegrid collect GRID STORE` makes them")
    lm = evaluating_lm(pinned(config, store.manifest))
    limit = sink_norm(scored_rows(references)) if leave_sinks else math.inf
    losses = evaluate(lm, references, config.layer, replacement(sae, kernel, limit), config.site)
    return losses.join(reconstructed(references, sae, kernel))


def replacement(sae: SAE, kernel: Kernel, limit: float = math.inf) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function that the splice applies to rows (n, d_in): it reconstructs all but those with a norm above `limit`."""

    def replace(x: torch.Tensor) -> torch.Tensor:
        x = x.to(sae.device)
        x_hat = kernel.decode(sae.params, sae.codes(x, kernel))
        return torch.where(is_sink(x, limit)[:, None], x, x_hat)

    return replace


def reconstructed(references: ReferencePasses, sae: SAE, kernel: Kernel) -> pd.DataFrame:
    """One row per evaluation prompt, over its scored positions.

    active: number of active (position, latent) pairs; sq_error: Σ ‖x - x_hat‖²; sq_norm_centred: Σ ‖x - mean‖², mean
    over all prompts. The last two exclude sinks: the ratio of their sums is the FVU without sinks on the prompts.
    """
    x = scored_rows(references)
    limit = sink_norm(x)
    ordinary = [~is_sink(rows, limit) for rows in x]
    mean = torch.cat([rows[keep] for rows, keep in zip(x, ordinary, strict=True)]).double().mean(0)
    sums = []
    for rows, keep in zip(x, ordinary, strict=True):
        codes = sae.codes(rows.to(sae.device), kernel)
        x_hat = kernel.decode(sae.params, codes).cpu()
        errors = (rows.double() - x_hat.double())[keep].square().sum().item()
        centred = (rows.double() - mean)[keep].square().sum().item()
        sums.append({"active": len(codes.values), "sq_error": errors, "sq_norm_centred": centred})
    return pd.DataFrame(sums)


def on_prompts(sums: pd.DataFrame) -> dict[str, float]:
    """L0, FVU without sinks and splice metrics on the prompts, from the rows of `spliced`."""
    total = sums.sum(numeric_only=True)
    found = {"l0_eval": total["active"] / total["n_tokens"], "fvu_eval": total["sq_error"] / total["sq_norm_centred"]}
    return {name: float(value) for name, value in found.items()} | splice_metrics(**mean_losses(sums))


def scored_rows(references: ReferencePasses) -> list[torch.Tensor]:
    """Rows at each prompt's scored positions, (n, d_in) float32."""
    return [
        rows[scored_positions(prompt)].float() for rows, prompt in zip(references.x, references.prompts, strict=True)
    ]
