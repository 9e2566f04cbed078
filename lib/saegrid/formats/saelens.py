"""SAELens folders, of version 6 and older: `cfg.json` + `sae_weights.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save
from torch import Tensor

from saegrid.core.sae import SAE, Gated, ReLU, TopK
from saegrid.errors import SaeFileError
from saegrid.formats import exchange
from saegrid.storage.atomic import write_bytes, write_json
from saegrid.storage.foreign_files import check_sizes, check_tensors, read_json, read_safetensors

FORMAT = "6.0.0"
"""Oldest SAELens version that reads the folder as it is; a lower one in cfg.json triggers an old migrator."""
RESCALES = (6, 14)
"""The first version with `rescale_acts_by_decoder_norm`; older ones never rescaled."""

SHAPES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
OWN_SHAPES = {
    "standard": {"b_enc": ("d_sae",)},
    "topk": {"b_enc": ("d_sae",)},
    "jumprelu": {"b_enc": ("d_sae",), "threshold": ("d_sae",)},
    "gated": {name: ("d_sae",) for name in ("b_gate", "b_mag", "r_mag")},
}
SCALING = "scaling_factor"
"""An unused tensor of ones that old versions wrote."""

INERT = exchange.names(
    """
    device sae_lens_version sae_lens_training_version
    decoder_init_norm l1_coefficient lp_norm l1_warm_up_steps l0_coefficient l0_warm_up_steps target_l0
    aux_loss_coefficient use_sparse_activations pre_act_loss_coefficient
    jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale
    """
)
"""Fields of SAELens 6 outside `metadata` that only training reads."""
OLD_INERT = INERT | exchange.names(
    """
    model_name model_class_name hook_eval hook_layer dataset_path dataset_trust_remote_code streaming
    is_dataset_tokenized context_size prepend_bos seqpos_slice exclude_special_tokens neuronpedia_id model_kwargs
    model_from_pretrained_kwargs use_cached_activations cached_activations_path expansion_factor b_dec_init_method
    normalize_sae_decoder noise_scale from_pretrained_path decoder_orthogonal_init decoder_heuristic_init
    decoder_heuristic_init_norm init_encoder_as_decoder_transpose n_batches_in_buffer training_tokens finetuning_tokens
    store_batch_size_prompts train_batch_size_tokens tokens_per_buffer act_store_device seed autocast autocast_lm
    compile_llm llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2 mse_loss_normalization
    scale_sparsity_penalty_by_decoder_norm lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles
    finetuning_method use_ghost_grads feature_sampling_window dead_feature_window dead_feature_threshold n_eval_batches
    eval_batch_size_prompts log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project
    wandb_id run_name wandb_entity wandb_log_frequency eval_every_n_wandb_logs resume n_checkpoints checkpoint_path
    verbose
    """
)
"""Fields of versions 3 to 5 on data, training and logging: their final cfg.json describes the whole training run."""
OLD_NAMES = {
    "activation_fn_str": "activation_fn",
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
}

DTYPES = ("float32", "float64", "float16", "bfloat16")


class _Metadata(BaseModel):
    """The fields of `metadata` that are read. The others describe the language model and the training."""

    model_config = ConfigDict(strict=True, extra="ignore")
    sae_lens_version: str | None = None
    hook_head_index: None = None


class _Cfg(exchange.Cfg):
    architecture: Literal["standard", "topk", "jumprelu", "gated"]
    d_in: int
    d_sae: int
    dtype: Literal[*DTYPES, *(f"torch.{name}" for name in DTYPES)]  # type: ignore[valid-type]
    apply_b_dec_to_input: bool
    normalize_activations: Literal["none"]
    finetuning_scaling_factor: Literal[False, None] = None  # True comes with a tensor, which is refused too
    k: int | None = None
    rescale_acts_by_decoder_norm: bool | None = None

    def check_sparsity(self, where: Path) -> None:
        """Raises `SaeFileError` if topk lacks k or its rescaling, or another architecture has one of them."""
        for name in ("k", "rescale_acts_by_decoder_norm"):
            value = getattr(self, name)
            if self.architecture == "topk" and value is None:
                raise SaeFileError(f"{where}: {name} is missing")
            if self.architecture != "topk" and value is not None:
                raise SaeFileError(f"{where}: {name} = {value}: {self.architecture} takes none")


class _NewCfg(_Cfg):
    reshape_activations: Literal["none"]
    metadata: _Metadata


class _Kwargs(exchange.Cfg):
    k: int | None = None


class _OldCfg(_Cfg):
    activation_fn: Literal["relu", "topk"]
    activation_fn_kwargs: _Kwargs | None = None
    hook_name: str
    hook_head_index: None = None
    reshape_activations: Literal["none"] = "none"  # hook_name decides, and is checked


def read_saelens(folder: Path) -> SAE:
    """The SAE of a SAELens folder of architecture `standard` (as ReLU), `topk`, `jumprelu` or `gated`.

    `rescale_acts_by_decoder_norm` ranks pre-activations times the norm of their decoder row: these norms are moved from
    the decoder to the encoder, which gives SAELens' codes and reconstruction. Raises `SaeFileError`.
    """
    path, weights_path = folder / "cfg.json", folder / "sae_weights.safetensors"
    content = read_json(path)
    cfg = _new_cfg(content, path) if "metadata" in content else _old_cfg(content, path)
    tensors = _weights(cfg, weights_path, old="metadata" not in content)
    check_sizes(cfg, {"d_in": len(tensors["W_enc"]), "d_sae": len(tensors["W_dec"])}, path)
    b_enc = tensors["b_gate" if cfg.architecture == "gated" else "b_enc"]
    weights = exchange.Plain(tensors["W_enc"].T, b_enc, tensors["W_dec"], tensors["b_dec"])
    centred = cfg.apply_b_dec_to_input
    if cfg.architecture == "gated":
        return exchange.gated(weights, tensors["r_mag"], tensors["b_mag"], centred, weights_path)
    if cfg.architecture == "jumprelu":
        return exchange.filled(exchange.jumprelu(tensors["threshold"], cfg.d_in), weights, centred)
    if cfg.architecture == "standard":
        return exchange.filled(ReLU(cfg.d_in, cfg.d_sae), weights, centred)
    if cfg.rescale_acts_by_decoder_norm:
        weights = exchange.rescaled(weights, weights_path)
    return exchange.filled(TopK(cfg.d_in, cfg.d_sae, k=exchange.check_k(cfg.k, cfg.d_sae, path)), weights, centred)


def _new_cfg(content: dict[str, Any], path: Path) -> _NewCfg:
    cfg = exchange.read_cfg(_NewCfg, content, INERT, path)
    version = re.match(r"(\d{1,9})\.(\d{1,9})\.", cfg.metadata.sae_lens_version or "")
    if cfg.architecture == "topk" and version and (int(version[1]), int(version[2])) < RESCALES:
        cfg = cfg.model_copy(update={"rescale_acts_by_decoder_norm": bool(cfg.rescale_acts_by_decoder_norm)})
    cfg.check_sparsity(path)
    return cfg


def _old_cfg(content: dict[str, Any], path: Path) -> _OldCfg:
    """The configuration of a version before 6: no `metadata`, and k is an argument of the activation function."""
    renamed: dict[str, Any] = {}
    for name, value in content.items():
        new = OLD_NAMES.get(name, name)
        if renamed.setdefault(new, value) != value:
            raise SaeFileError(f"{path}: {name} = {value!r:.40}, but its other name has {renamed[new]!r:.40}")
    normalize = renamed.get("normalize_activations", "")
    if normalize is None or normalize is False:
        renamed["normalize_activations"] = "none"
    cfg = exchange.read_cfg(_OldCfg, renamed, OLD_INERT, path)
    if cfg.hook_name.endswith("_z") or "hook_z" in cfg.hook_name:
        raise SaeFileError(f"{path}: hook_name = {cfg.hook_name!r:.80}: SAEs of attention heads can't be read")
    inner = cfg.activation_fn_kwargs.k if cfg.activation_fn_kwargs else None
    found = {k for k in (cfg.k, inner) if k is not None}
    if len(found) > 1:
        raise SaeFileError(f"{path}: k = {cfg.k}, but activation_fn_kwargs.k = {inner}")
    topk = cfg.activation_fn == "topk"
    if cfg.architecture not in (("standard", "topk") if topk else ("standard", "jumprelu", "gated")):
        raise SaeFileError(f"{path}: activation_fn = {cfg.activation_fn!r}: does not fit {cfg.architecture}")
    k = found.pop() if found else None
    update = {"architecture": "topk" if topk else cfg.architecture, "k": k}
    if topk and cfg.rescale_acts_by_decoder_norm is None:
        update["rescale_acts_by_decoder_norm"] = False  # no version before 6 had it
    cfg = cfg.model_copy(update=update)
    cfg.check_sparsity(path)
    return cfg


def _weights(cfg: _Cfg, path: Path, old: bool) -> dict[str, Tensor]:
    """The tensors in float32, rounded to the configuration's dtype as SAELens does on loading."""
    tensors = read_safetensors(path)
    scaling = {SCALING: ("d_sae",)} if old and SCALING in tensors else {}
    check_tensors(tensors, SHAPES | OWN_SHAPES[cfg.architecture] | scaling, path)
    factors = tensors.pop(SCALING, torch.ones(1)).float()
    if not torch.allclose(factors, torch.ones_like(factors)):
        raise SaeFileError(f"{path}: {SCALING} is not all ones: scaled latents are not supported")
    dtype = getattr(torch, cfg.dtype.removeprefix("torch."))
    rounded = {name: tensor.to(dtype).float() for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise SaeFileError(f"{path}: {name} holds values that dtype = {cfg.dtype!r} can't hold")
    return rounded


def write_saelens(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """Write TopK as `topk`, ReLU as `standard`, Gated as `gated`, all others as `jumprelu` with a threshold per latent;
    the encoder is plain, decoder rows are unchanged."""
    weights, known = exchange.folded(sae, centred=False), exchange.Facts.model_validate(facts)
    tensors = {**weights._asdict(), "W_enc": weights.W_enc.T.contiguous()}
    kinds = {TopK: "topk", ReLU: "standard", Gated: "gated"}
    architecture = kinds.get(type(sae), "jumprelu")
    if architecture == "jumprelu":
        tensors["threshold"] = exchange.thresholds(sae, "SAELens")
    if architecture == "gated":
        b_mag = tensors.pop("b_enc")
        tensors |= {"b_gate": exchange.gate_bias(sae, weights), "b_mag": b_mag, "r_mag": torch.zeros(sae.d_sae)}
    collected = not known.activations  # if not, dataset and max_tokens describe the evaluation prompts
    cfg = {
        "architecture": architecture,
        **{"d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False},
        **{"normalize_activations": "none", "reshape_activations": "none"},
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "metadata": {
            "sae_lens_version": FORMAT,
            "sae_lens_training_version": None,
            **exchange.told(
                model_name=known.model,
                hook_name=None if known.layer is None else f"blocks.{known.layer}.hook_{known.site or 'resid_post'}",
                context_size=known.context_size or (known.max_tokens if collected else None),
                prepend_bos=known.prepend_bos,
                dataset_path=known.dataset if collected else None,
            ),
            "saegrid": {"arch": sae.arch, "k": sae.k, **facts},
        },
    }
    write_bytes(folder / "sae_weights.safetensors", save(tensors))
    write_json(folder / "cfg.json", cfg)
