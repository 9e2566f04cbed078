"""SAE folders of SAELens, dictionary_learning and sparsify, read and written without those libraries.

They have one bias behind the decoder, b = b_pre + b_dec here, and an encoder that either subtracts it or does not:

    centred:  pre = (x - b) W_encᵀ + b_enc'    b_enc' = b_enc + W_enc b_dec
    plain:    pre = x W_encᵀ + b_enc'          b_enc' = b_enc - W_enc b_pre
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor

from saegrid.atomic import write_bytes, write_json
from saegrid.errors import SaeFileError
from saegrid.files import check_folded
from saegrid.sae import SAE, BatchTopK, JumpReLU, TopK
from saegrid.untrusted import as_model, check_sizes, check_tensors, number, read_json, read_pt, read_safetensors

SAELENS_FORMAT = "6.0.0"
"""Oldest SAELens version that reads the folder as it is; a lower one in its cfg.json calls an old migrator."""


class Plain(NamedTuple):
    """An SAE as other libraries hold it: a latent is a row of both matrices, one bias behind the decoder."""

    W_enc: Tensor  # (d_sae, d_in)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in)
    b_dec: Tensor  # (d_in,)


def _folded(sae: SAE, centred: bool) -> Plain:
    """The SAE's weights with its biases folded into two; sums in float64, as sink rows make for large terms."""
    check_folded(sae)
    b_pre, b_dec, W_enc = sae.b_pre.data.double(), sae.b_dec.data.double(), sae.W_enc.data.double()
    shift = W_enc @ b_dec if centred else -(W_enc @ b_pre)
    b_enc = (sae.b_enc.data.double() + shift).float()
    return Plain(sae.W_enc.data.clone(), b_enc, sae.W_dec.data.clone(), (b_pre + b_dec).float())


def _filled(sae: SAE, weights: Plain, centred: bool) -> SAE:
    """`sae` with another library's weights: their bias is b_pre where their encoder subtracts it, else b_dec."""
    for name in ("W_enc", "b_enc", "W_dec"):
        getattr(sae, name).data.copy_(getattr(weights, name))
    (sae.b_pre if centred else sae.b_dec).data.copy_(weights.b_dec)
    return sae


def _jumprelu(thresholds: Tensor, d_in: int) -> JumpReLU:
    """JumpReLU with one theta where all are equal. Below 0 they act as 0: every peer applies a ReLU besides."""
    thresholds = thresholds.float().clamp_min(0)
    if (thresholds == thresholds[0]).all():
        return JumpReLU(d_in, len(thresholds), threshold=thresholds[0].item())
    return JumpReLU(d_in, len(thresholds), theta=thresholds)


def _thresholds(sae: SAE, format: str) -> Tensor:
    """Thresholds (d_sae,) of an SAE in use. Raises `SaeFileError` for a BatchTopK that still cuts per batch."""
    if len(sae.theta):
        return sae.theta.data.clone()
    theta = sae.threshold if isinstance(sae, JumpReLU) else sae.inference_threshold
    if theta is None:
        raise SaeFileError(
            f"{format}: this {sae.arch} has no calibrated threshold and cuts per batch, which {format} can't hold; "
            "load it with threshold=, or from the folder of its run"
        )
    return torch.full((sae.d_sae,), float(theta))


def _check_k(k: int, d_sae: int, where: Path) -> int:
    if not 1 <= k <= d_sae:
        raise SaeFileError(f"{where}: k = {k}: from 1 to d_sae = {d_sae}")
    return k


class _Cfg(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


# --- SAELens: cfg.json + sae_weights.safetensors ---

SAELENS_SHAPES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_enc": ("d_sae",), "b_dec": ("d_in",)}


class _SaeLensCfg(_Cfg):
    architecture: str = "standard"
    d_in: int
    d_sae: int
    k: int = 100
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool = False
    normalize_activations: Literal["none"] = "none"
    reshape_activations: Literal["none"] = "none"
    finetuning_scaling_factor: Literal[False, None] = False


def read_saelens(folder: Path) -> SAE:
    """The SAE of a SAELens folder, architecture `topk` or `jumprelu`. Raises `SaeFileError`.

    `rescale_acts_by_decoder_norm` ranks pre-activations times the norm of their decoder rows: the norms go into the
    encoder and out of the decoder, which leaves codes and reconstruction as SAELens has them.
    """
    path, weights_path = folder / "cfg.json", folder / "sae_weights.safetensors"
    cfg = as_model(_SaeLensCfg, read_json(path), path)
    if cfg.architecture not in ("topk", "jumprelu"):
        raise SaeFileError(
            f"{path}: architecture = {cfg.architecture[:40]!r}: only topk and jumprelu have a counterpart"
        )
    tensors = read_safetensors(weights_path)
    own = {"threshold": ("d_sae",)} if cfg.architecture == "jumprelu" else {}
    check_sizes(cfg, check_tensors(tensors, SAELENS_SHAPES | own, weights_path), path)
    weights = Plain(tensors["W_enc"].float().T, tensors["b_enc"].float(), tensors["W_dec"].float(), tensors["b_dec"])
    if cfg.architecture == "jumprelu":
        return _filled(_jumprelu(tensors["threshold"], cfg.d_in), weights, cfg.apply_b_dec_to_input)
    if cfg.rescale_acts_by_decoder_norm:
        norms = weights.W_dec.norm(dim=1, keepdim=True)  # (d_sae, 1)
        if not norms.all():
            raise SaeFileError(f"{weights_path}: rescale_acts_by_decoder_norm divides by a decoder row of norm 0")
        W_enc, b_enc = weights.W_enc * norms, weights.b_enc * norms[:, 0]
        weights = Plain(W_enc, b_enc, weights.W_dec / norms, weights.b_dec)
    sae = TopK(cfg.d_in, cfg.d_sae, k=_check_k(cfg.k, cfg.d_sae, path))
    return _filled(sae, weights, cfg.apply_b_dec_to_input)


def write_saelens(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """TopK as `topk`, all others as `jumprelu` with a threshold per latent; encoder plain, decoder rows as they are."""
    topk = isinstance(sae, TopK)
    own = {} if topk else {"threshold": _thresholds(sae, "SAELens")}
    weights = _folded(sae, centred=False)
    tensors = {**weights._asdict(), "W_enc": weights.W_enc.T.contiguous(), **own}
    cfg = {
        "architecture": "topk" if topk else "jumprelu",
        **{"d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False},
        **{"normalize_activations": "none", "reshape_activations": "none"},
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if topk else {}),
        "metadata": {
            "sae_lens_version": SAELENS_FORMAT,
            "sae_lens_training_version": None,
            "model_name": facts.get("model"),
            "hook_name": f"blocks.{facts['layer']}.hook_resid_post" if "layer" in facts else None,
            "context_size": facts.get("max_tokens"),
            "prepend_bos": False,
            "dataset_path": facts.get("dataset"),
            "saegrid": {"arch": sae.arch, "k": sae.k, **facts},
        },
    }
    write_bytes(folder / "sae_weights.safetensors", save(tensors))
    write_json(folder / "cfg.json", cfg)


# --- dictionary_learning: config.json + ae.pt ---

LINEAR_SHAPES = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_in", "d_sae"),
    "b_dec": ("d_in",),
}


BY_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


class _Trainer(_Cfg):
    dict_class: str
    k: int | None = None
    d_in: int | None = Field(None, alias="activation_dim")
    d_sae: int | None = Field(None, alias="dict_size")


class _DictionaryCfg(_Cfg):
    trainer: _Trainer


def read_dictionary(folder: Path) -> SAE:
    """The SAE of a dictionary_learning folder: AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE (as BatchTopK) or
    JumpReluAutoEncoder.

    A BatchTopKSAE whose threshold was never set (below 0) cuts per batch here; its own `encode` keeps every positive
    latent then. Raises `SaeFileError`.
    """
    path, weights_path = folder / "config.json", folder / "ae.pt"
    trainer = as_model(_DictionaryCfg, read_json(path), path).trainer
    state = read_pt(weights_path)
    if trainer.dict_class == "JumpReluAutoEncoder":
        sizes = check_tensors(state, SAELENS_SHAPES | {"threshold": ("d_sae",)}, weights_path)
        check_sizes(trainer, sizes, path)
        return _filled(_jumprelu(state["threshold"], sizes["d_in"]), _turned(state), centred=False)
    if trainer.dict_class not in BY_K:
        known = f"only {', '.join(BY_K)} and JumpReluAutoEncoder can be read"
        raise SaeFileError(f"{path}: dict_class = {trainer.dict_class[:40]!r}: {known}")
    nested = trainer.dict_class == "MatryoshkaBatchTopKSAE"
    state = dict(state) if isinstance(state, dict) else state
    facts = ("k", "threshold", *(["group_sizes"] if nested else []))
    cuts = {name: state.pop(name, None) for name in facts} if isinstance(state, dict) else {}
    sizes = check_tensors(state, SAELENS_SHAPES if nested else LINEAR_SHAPES, weights_path)
    check_sizes(trainer, sizes, path)
    k, theta = int(number(cuts["k"], "k", weights_path)), number(cuts["threshold"], "threshold", weights_path)
    if trainer.k not in (None, k):
        raise SaeFileError(f"{path}: k = {trainer.k}, and ae.pt has {k}")
    shape = {"d_in": sizes["d_in"], "d_sae": sizes["d_sae"], "k": _check_k(k, sizes["d_sae"], weights_path)}
    if trainer.dict_class == "AutoEncoderTopK":
        sae = TopK(**shape)
    else:
        sae = BatchTopK(**shape, inference_threshold=theta if theta >= 0 else None)
    if nested:
        weights = _turned(state)
    else:
        weights = Plain(state["encoder.weight"], state["encoder.bias"], state["decoder.weight"].T, state["b_dec"])
    return _filled(sae, weights, centred=True)


def _turned(state: dict[str, Tensor]) -> Plain:
    """Weights in the names of `SAELENS_SHAPES`, whose encoder has the latents as columns."""
    return Plain(state["W_enc"].T, state["b_enc"], state["W_dec"], state["b_dec"])


def write_dictionary(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """TopK as AutoEncoderTopK, BatchTopK and Matryoshka as BatchTopKSAE with the threshold, all others as
    JumpReluAutoEncoder."""
    name = "TopK" if isinstance(sae, TopK) else "BatchTopK" if isinstance(sae, BatchTopK) else "JumpRelu"
    classes = {"TopK": "AutoEncoderTopK", "BatchTopK": "BatchTopKSAE", "JumpRelu": "JumpReluAutoEncoder"}
    weights = _folded(sae, centred=name != "JumpRelu")
    if name == "JumpRelu":
        state = {**weights._asdict(), "W_enc": weights.W_enc.T.contiguous()}
        state["threshold"] = _thresholds(sae, "dictionary_learning")
    else:
        theta = torch.tensor(-1.0) if name == "TopK" else _thresholds(sae, "dictionary_learning")[0].clone()
        state = {"encoder.weight": weights.W_enc, "encoder.bias": weights.b_enc}
        state |= {"decoder.weight": weights.W_dec.T.contiguous(), "b_dec": weights.b_dec}
        state |= {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": theta}
    trainer = {"trainer_class": f"{name}Trainer", "dict_class": classes[name]}
    trainer |= {"activation_dim": sae.d_in, "dict_size": sae.d_sae} | ({"k": sae.k} if sae.k else {})
    trainer |= {"layer": facts.get("layer"), "lm_name": facts.get("model")}
    buffer = io.BytesIO()  # a path would put the file's name into its bytes
    torch.save(state, buffer)
    write_bytes(folder / "ae.pt", buffer.getvalue())
    write_json(folder / "config.json", {"trainer": trainer, "saegrid": facts})


# --- sparsify: cfg.json + sae.safetensors ---

SPARSIFY_SHAPES = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
}


class _SparsifyCfg(_Cfg):
    d_in: int
    k: int = 32
    activation: Literal["topk"] = "topk"
    expansion_factor: int = 32
    num_latents: int = 0
    skip_connection: Literal[False] = False
    transcode: Literal[False] = False

    @property
    def d_sae(self) -> int:
        return self.num_latents or self.d_in * self.expansion_factor


def read_sparsify(folder: Path) -> SAE:
    """The TopK of a sparsify folder; its encoder subtracts b_dec. Raises `SaeFileError`, for transcoders too."""
    path, weights_path = folder / "cfg.json", folder / "sae.safetensors"
    cfg = as_model(_SparsifyCfg, read_json(path), path)
    tensors = read_safetensors(weights_path)
    check_sizes(cfg, check_tensors(tensors, SPARSIFY_SHAPES, weights_path), path)
    sae = TopK(cfg.d_in, cfg.d_sae, k=_check_k(cfg.k, cfg.d_sae, path))
    return _filled(sae, Plain(*(tensors[name] for name in SPARSIFY_SHAPES)), centred=True)


def write_sparsify(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """TopK alone. Raises `SaeFileError` for the others."""
    if not isinstance(sae, TopK):
        raise SaeFileError(
            f"sparsify: {sae.arch}: its folders hold TopK only; export to saelens or dictionary_learning"
        )
    cfg = {"activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": True}
    cfg |= {"num_latents": sae.d_sae, "k": sae.k, "multi_topk": False, "skip_connection": False, "transcode": False}
    tensors = dict(zip(SPARSIFY_SHAPES, _folded(sae, centred=True), strict=True))
    write_bytes(folder / "sae.safetensors", save(tensors))
    write_json(folder / "cfg.json", {**cfg, "d_in": sae.d_in, "saegrid": facts})
