"""dictionary_learning folders: `config.json` + `ae.pt`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saegrid.core.sae import SAE, BatchTopK, Gated, ReLU, TopK
from saegrid.errors import SaeFileError
from saegrid.formats import exchange
from saegrid.storage.atomic import write_bytes, write_json
from saegrid.storage.foreign_files import check_sizes, check_tensors, number, read_json, read_pt

LINEAR = {"encoder.weight": ("d_sae", "d_in"), "encoder.bias": ("d_sae",), "decoder.weight": ("d_in", "d_sae")}
MATRICES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_enc": ("d_sae",), "b_dec": ("d_in",)}
GATES = {name: ("d_sae",) for name in ("r_mag", "gate_bias", "mag_bias")}
SHAPES = {
    "AutoEncoder": LINEAR | {"bias": ("d_in",)},
    "GatedAutoEncoder": {name: LINEAR[name] for name in ("encoder.weight", "decoder.weight")}
    | GATES
    | {"decoder_bias": ("d_in",)},
    "AutoEncoderTopK": LINEAR | {"b_dec": ("d_in",)},
    "BatchTopKSAE": LINEAR | {"b_dec": ("d_in",)},
    "MatryoshkaBatchTopKSAE": MATRICES,
    "JumpReluAutoEncoder": MATRICES | {"threshold": ("d_sae",)},
}
"""Tensors of each class, without `BUFFERS`."""
BUFFERS = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k", "threshold"),
    "MatryoshkaBatchTopKSAE": ("k", "threshold", "group_sizes"),
}

INERT = exchange.names(
    """
    trainer_class lr steps seed device layer lm_name wandb_name submodule_name warmup_steps decay_start resample_steps
    sparsity_warmup_steps l1_penalty sparsity_penalty sparsity_function sparsity_queue_length n_sparsity_updates p_start
    p_end anneal_start bandwidth target_l0 auxk_alpha top_k_aux threshold_beta threshold_start_step group_fractions
    group_weights group_sizes lambda_warm_steps
    """
)
"""Fields of `trainer` that only training reads."""


class _Trainer(exchange.Cfg):
    dict_class: Literal[*SHAPES]  # type: ignore[valid-type]
    k: int | None = None
    d_in: int | None = Field(None, alias="activation_dim")
    d_sae: int | None = Field(None, alias="dict_size")


class _Buffer(BaseModel):
    """The field of `buffer` that is read: trained on inputs or on outputs; pairs of both (a transcoder) are refused."""

    model_config = ConfigDict(strict=True, extra="ignore")
    io: Literal["in", "out"] | None = None


class _Config(exchange.Cfg):
    trainer: dict[str, Any]
    buffer: _Buffer | None = None


def read_dictionary(folder: Path) -> SAE:
    """The SAE of a dictionary_learning folder: AutoEncoder (as ReLU), GatedAutoEncoder, AutoEncoderTopK, BatchTopKSAE,
    MatryoshkaBatchTopKSAE (as BatchTopK) or JumpReluAutoEncoder.

    A BatchTopKSAE whose threshold was never set (below 0) cuts per batch here, while its own `encode` keeps every
    positive latent. Raises `SaeFileError`.
    """
    path, weights_path = folder / "config.json", folder / "ae.pt"
    config = exchange.read_cfg(_Config, read_json(path), frozenset({"saegrid"}), path)
    trainer = exchange.read_cfg(_Trainer, config.trainer, INERT, path)
    name, state = trainer.dict_class, read_pt(weights_path)
    if trainer.k is not None and name in ("AutoEncoder", "GatedAutoEncoder"):
        raise SaeFileError(f"{path}: k = {trainer.k}: {name} takes none")
    buffers = {}
    if isinstance(state, dict):
        buffers = {key: state[key] for key in BUFFERS.get(name, ()) if key in state}
        state = {key: value for key, value in state.items() if key not in buffers}
    sizes = check_tensors(state, SHAPES[name], weights_path)
    check_sizes(trainer, sizes, path)
    weights = _plain(name, state)
    if name == "GatedAutoEncoder":
        return exchange.gated(weights, state["r_mag"], state["mag_bias"], True, weights_path)
    if name == "JumpReluAutoEncoder":
        return exchange.filled(exchange.jumprelu(state["threshold"], sizes["d_in"]), weights, centred=False)
    if name == "AutoEncoder":
        return _relu(weights, weights_path)
    return exchange.filled(_cut_by_k(trainer, buffers, sizes, folder), weights, centred=True)


def _plain(name: str, state: dict[str, Tensor]) -> exchange.Plain:
    """The weights of a class; for GatedAutoEncoder, those of its gate."""
    if "W_enc" in state:
        return exchange.Plain(state["W_enc"].T, state["b_enc"], state["W_dec"], state["b_dec"])
    b_enc = state["gate_bias" if name == "GatedAutoEncoder" else "encoder.bias"]
    b_dec = state[next(key for key in ("bias", "decoder_bias", "b_dec") if key in state)]
    return exchange.Plain(
        *(tensor.float() for tensor in (state["encoder.weight"], b_enc, state["decoder.weight"].T, b_dec))
    )


def _relu(weights: exchange.Plain, where: Path) -> SAE:
    """An AutoEncoder, with decoder rows scaled to norm 1, as the library does on loading."""
    weights = weights if _unit_norms(weights.W_dec) else exchange.rescaled(weights, where)
    return exchange.filled(ReLU(weights.W_enc.shape[1], len(weights.W_enc)), weights, centred=True)


def _unit_norms(W_dec: Tensor) -> bool:
    """Whether the library leaves the decoder rows unchanged."""
    norms = W_dec.norm(dim=1)
    return torch.allclose(norms, torch.ones_like(norms))


def _cut_by_k(trainer: _Trainer, buffers: dict[str, Any], sizes: dict[str, int], folder: Path) -> SAE:
    """An SAE of a class that takes a k, with weights still to be filled.

    `ae.pt` holds k; an older AutoEncoderTopK has it only in `config.json`.
    """
    path, weights_path, name = folder / "config.json", folder / "ae.pt", trainer.dict_class
    if "k" not in buffers and (trainer.k is None or name != "AutoEncoderTopK"):
        raise SaeFileError(f"{weights_path}: k is missing")
    k: Any = number(buffers["k"], "k", weights_path) if "k" in buffers else trainer.k
    if k != int(k):
        raise SaeFileError(f"{weights_path}: k = {k}: must be a whole number")
    k = int(k)
    if trainer.k not in (None, k):
        raise SaeFileError(f"{path}: k = {trainer.k}, but ae.pt has {k}")
    shape: dict[str, Any] = sizes | {"k": exchange.check_k(k, sizes["d_sae"], weights_path)}
    if name == "AutoEncoderTopK":  # its `encode` uses the threshold only on request
        return TopK(**shape)
    for key in BUFFERS[name]:
        if key not in buffers:
            raise SaeFileError(f"{weights_path}: {key} is missing")
    if name == "MatryoshkaBatchTopKSAE":
        _check_groups(buffers["group_sizes"], sizes["d_sae"], weights_path)
    theta = number(buffers["threshold"], "threshold", weights_path)
    return BatchTopK(**shape, inference_threshold=theta if theta >= 0 else None)


def _check_groups(groups: Any, d_sae: int, where: Path) -> None:
    """Raises `SaeFileError` unless the nested groups, which only training uses, cover all latents."""
    plain = isinstance(groups, Tensor) and groups.layout == torch.strided and groups.device.type == "cpu"
    if not plain or groups.ndim != 1 or groups.dtype not in (torch.int32, torch.int64) or len(groups) > d_sae:
        raise SaeFileError(f"{where}: group_sizes is not a list of whole numbers")
    if groups.untyped_storage().nbytes() < groups.nbytes or (groups < 1).any() or groups.sum() != d_sae:
        raise SaeFileError(f"{where}: group_sizes: must each be at least 1 and sum to d_sae = {d_sae}")


def write_dictionary(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """Write TopK as AutoEncoderTopK, BatchTopK and Matryoshka as BatchTopKSAE with the cut, Gated as GatedAutoEncoder,
    ReLU as AutoEncoder, all others (and a ReLU that AutoEncoder would rescale) as JumpReluAutoEncoder.
    """
    known, name = exchange.Facts.model_validate(facts), _class_of(sae)
    weights = exchange.folded(sae, centred=name != "JumpReluAutoEncoder")
    state = {"encoder.weight": weights.W_enc, "decoder.weight": weights.W_dec.T.contiguous()}
    if name == "JumpReluAutoEncoder":
        state = {**weights._asdict(), "W_enc": weights.W_enc.T.contiguous()}
        state["threshold"] = exchange.thresholds(sae, "dictionary_learning")
    elif name == "GatedAutoEncoder":
        state |= {"decoder_bias": weights.b_dec, "r_mag": torch.zeros(sae.d_sae)}
        state |= {"gate_bias": exchange.gate_bias(sae, weights), "mag_bias": weights.b_enc}
    elif name == "AutoEncoder":
        state |= {"encoder.bias": weights.b_enc, "bias": weights.b_dec}
    else:
        theta = (
            torch.tensor(-1.0) if isinstance(sae, TopK) else exchange.thresholds(sae, "dictionary_learning")[0].clone()
        )
        state |= {"encoder.bias": weights.b_enc, "b_dec": weights.b_dec}
        state |= {"k": torch.tensor(sae.k, dtype=torch.int32), "threshold": theta}
    trainer = {"trainer_class": TRAINERS[name], "dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae}
    trainer |= {"k": sae.k} if name in BUFFERS else {}
    place = f"{known.site}_layer_{known.layer}" if known.site and known.layer is not None else None
    trainer |= exchange.told(layer=known.layer, lm_name=known.model, submodule_name=place)
    buffer = io.BytesIO()  # with a path, torch.save would store the file's name
    torch.save(state, buffer)
    write_bytes(folder / "ae.pt", buffer.getvalue())
    write_json(folder / "config.json", {"trainer": trainer, "saegrid": facts})


TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


def _class_of(sae: SAE) -> str:
    if isinstance(sae, TopK):
        return "AutoEncoderTopK"
    if isinstance(sae, BatchTopK):
        return "BatchTopKSAE"
    if isinstance(sae, Gated):
        return "GatedAutoEncoder"
    return "AutoEncoder" if isinstance(sae, ReLU) and _unit_norms(sae.W_dec.data) else "JumpReluAutoEncoder"
