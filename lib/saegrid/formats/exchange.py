"""Code shared by the SAELens, dictionary_learning and sparsify formats: weights, configurations and facts.

Their SAEs have one decoder bias, here b = b_pre + b_dec, and an encoder that either subtracts it or does not:

    centred:  pre = (x - b) W_encᵀ + b_enc'    b_enc' = b_enc + W_enc b_dec
    plain:    pre = x W_encᵀ + b_enc'          b_enc' = b_enc - W_enc b_pre

Each field of a configuration is either used or known to have no effect; a file with any other field is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saegrid.config.run_config import Site
from saegrid.core.sae import SAE, Gated, JumpReLU
from saegrid.errors import SaeFileError, shown
from saegrid.formats.run_folder import check_folded
from saegrid.storage.foreign_files import as_model


class Plain(NamedTuple):
    """An SAE with one decoder bias, as in other libraries; each latent is a row of both matrices."""

    W_enc: Tensor  # (d_sae, d_in)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in)
    b_dec: Tensor  # (d_in,)


def folded(sae: SAE, centred: bool) -> Plain:
    """The SAE's weights with its biases folded into two; sums are in float64, because sink rows cause large terms."""
    check_folded(sae)
    b_pre, b_dec, W_enc = sae.b_pre.data.double(), sae.b_dec.data.double(), sae.W_enc.data.double()
    shift = W_enc @ b_dec if centred else -(W_enc @ b_pre)
    b_enc = (sae.b_enc.data.double() + shift).float()
    return Plain(sae.W_enc.data.clone(), b_enc, sae.W_dec.data.clone(), (b_pre + b_dec).float())


def filled(sae: SAE, weights: Plain, centred: bool) -> SAE:
    """`sae` with another library's weights: their b_dec becomes b_pre if their encoder subtracts it, else b_dec."""
    for name in ("W_enc", "b_enc", "W_dec"):
        getattr(sae, name).data.copy_(getattr(weights, name))
    (sae.b_pre if centred else sae.b_dec).data.copy_(weights.b_dec)
    return sae


def rescaled(weights: Plain, where: Path) -> Plain:
    """Scale decoder rows to norm 1 and latents by the old norms: the same x_hat. Raises `SaeFileError`."""
    norms = weights.W_dec.norm(dim=1, keepdim=True)  # (d_sae, 1)
    if not norms.all():
        raise SaeFileError(f"{where}: latents are scaled by the norms of their decoder rows, and one of these is 0")
    return Plain(weights.W_enc * norms, weights.b_enc * norms[:, 0], weights.W_dec / norms, weights.b_dec)


def jumprelu(thresholds: Tensor, d_in: int) -> JumpReLU:
    """JumpReLU, with a single theta if all are equal. A theta below 0 acts as 0: every peer also applies a ReLU."""
    thresholds = thresholds.float().clamp_min(0)
    if (thresholds == thresholds[0]).all():
        return JumpReLU(d_in, len(thresholds), threshold=thresholds[0].item())
    return JumpReLU(d_in, len(thresholds), theta=thresholds)


def gated(weights: Plain, r_mag: Tensor, b_mag: Tensor, centred: bool, where: Path) -> Gated:
    """The Gated SAE (arXiv:2404.16014, §3) with gate x W_encᵀ + b_enc > 0 and magnitude exp(r_mag) x W_encᵀ + b_mag.

    Here the magnitude is pre, and the gate is open where pre > theta = b_mag - exp(r_mag) b_enc.
    """
    gain = r_mag.double().exp()
    W_enc, theta = weights.W_enc.double() * gain[:, None], b_mag.double() - gain * weights.b_enc.double()
    if not (W_enc.float().isfinite().all() and theta.float().isfinite().all()):
        raise SaeFileError(f"{where}: r_mag is too large: exp(r_mag) makes weights that are not finite")
    sae = Gated(W_enc.shape[1], len(W_enc), theta=theta.clamp_min(0).float())
    filled(sae, weights._replace(W_enc=W_enc, b_enc=b_mag), centred)
    return sae


def gate_bias(sae: SAE, weights: Plain) -> Tensor:
    """Gate bias (d_sae,) for which the gate opens where pre > theta, with r_mag = 0 and b_mag = `weights.b_enc`."""
    return (weights.b_enc.double() - sae.theta.data.double()).float()


def thresholds(sae: SAE, format: str) -> Tensor:
    """Inference thresholds (d_sae,) of an SAE. Raises `SaeFileError` for a BatchTopK that still cuts per batch."""
    if len(sae.theta):
        return sae.theta.data.clone()
    theta = sae.threshold if isinstance(sae, JumpReLU) else sae.inference_threshold
    if theta is None:
        raise SaeFileError(
            f"{format}: this {sae.arch} has no calibrated threshold and cuts per batch, which {format} can't hold; "
            "load it with threshold=, or from its run's folder"
        )
    return torch.full((sae.d_sae,), float(theta))


def check_k(k: int | None, d_sae: int, where: Path) -> int:
    if k is None or not 1 <= k <= d_sae:
        raise SaeFileError(f"{where}: k = {k}: must be from 1 to d_sae = {d_sae}")
    return k


# --- configurations ---


class Cfg(BaseModel):
    """The fields of a foreign configuration that determine codes or reconstruction; no default is a guess."""

    model_config = ConfigDict(strict=True, extra="forbid")


Model = TypeVar("Model", bound=Cfg)


def names(text: str) -> frozenset[str]:
    """Field names, from a whitespace-separated text."""
    return frozenset(text.split())


def read_cfg(model: type[Model], content: dict[str, Any], inert: frozenset[str], where: Path) -> Model:
    """A configuration, checked against its model.

    Args:
        inert: fields that are known to change neither codes nor reconstruction; they are ignored.

    Raises:
        SaeFileError: a field is unknown, missing, or has an unsupported value; the message names field and value.
    """
    known = {field.alias or name for name, field in model.model_fields.items()}
    cfg = as_model(model, {name: content[name] for name in content if name in known}, where)
    for name, value in content.items():
        if name not in known and name not in inert:
            field = f"{name[:40]} = {shown(value)}"
            raise SaeFileError(f"{where}: {field}: an unknown field, which may change the SAE's output")
    return cfg


# --- facts of an export ---


class Facts(BaseModel):
    """Facts about an SAE that the formats have a field for; None: unknown. Other facts are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    layer: int | None = Field(None, ge=0)
    site: Site | None = None
    dataset: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    context_size: int | None = Field(None, ge=1)
    """Tokens of the longest training prompt."""
    prepend_bos: bool | None = None
    """Whether the training prompts begin with the tokenizer's start token."""
    activations: str | None = None
    """Source of training rows that were read from files; `dataset` then holds only evaluation prompts."""


def check_facts(facts: dict[str, Any]) -> None:
    """Raises `SaeFileError` for a fact that JSON can't hold or that is of the wrong type."""
    if not isinstance(facts, dict):
        raise SaeFileError(f"facts = {shown(facts)}: must be a dict of names and values")
    for name, value in facts.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            reason = str(error).split("\n")[0]
            raise SaeFileError(f"facts: {name!s:.40} = {shown(value)}: JSON can't hold it: {reason}") from None
    as_model(Facts, facts, Path("facts"))


def told(**values: Any) -> dict[str, Any]:
    """The values that are known."""
    return {name: value for name, value in values.items() if value is not None}
