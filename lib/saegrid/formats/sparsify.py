"""sparsify folders, before and since version 1.0: `cfg.json` + `sae.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from saegrid.core.sae import SAE, TopK
from saegrid.errors import SaeFileError
from saegrid.formats.exchange import Cfg, Plain, check_k, filled, folded, read_cfg
from saegrid.storage.atomic import write_bytes, write_json
from saegrid.storage.foreign_files import check_sizes, check_tensors, read_json, read_safetensors

SHAPES = {
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "W_dec": ("d_sae", "d_in"),
    "b_dec": ("d_in",),
}
INERT = frozenset({"normalize_decoder", "multi_topk", "saegrid"})
"""Fields that only training reads, and the one that this project adds."""


class _OldCfg(Cfg):
    """The fields before 1.0, when every SAE was a TopK; some versions had `signed`."""

    d_in: int
    k: int
    expansion_factor: int | None = None
    num_latents: int = 0  # both are checked against the weights
    signed: Literal[False] = False

    @property
    def d_sae(self) -> int | None:
        return self.num_latents or (self.expansion_factor and self.d_in * self.expansion_factor)


class _Cfg(_OldCfg):
    activation: Literal["topk"]
    skip_connection: Literal[False]
    transcode: Literal[False]


def read_sparsify(folder: Path) -> SAE:
    """The TopK of a sparsify folder; its encoder subtracts b_dec. Raises `SaeFileError`, for transcoders too."""
    path, weights_path = folder / "cfg.json", folder / "sae.safetensors"
    content = read_json(path)
    newer = (_Cfg.model_fields.keys() - _OldCfg.model_fields.keys()) & content.keys()
    cfg = read_cfg(_Cfg if newer else _OldCfg, content, INERT, path)
    tensors = read_safetensors(weights_path)
    sizes = check_tensors(tensors, SHAPES, weights_path)
    check_sizes(cfg, sizes, path)
    sae = TopK(cfg.d_in, sizes["d_sae"], k=check_k(cfg.k, sizes["d_sae"], path))
    return filled(sae, Plain(*(tensors[name] for name in SHAPES)), centred=True)


def write_sparsify(sae: SAE, folder: Path, facts: dict[str, Any]) -> None:
    """Write a TopK. Raises `SaeFileError` for other architectures."""
    if not isinstance(sae, TopK):
        raise SaeFileError(
            f"sparsify: {sae.arch}: its folders hold TopK only; export to saelens or dictionary_learning"
        )
    cfg = {"activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_in), "normalize_decoder": True}
    cfg |= {"num_latents": sae.d_sae, "k": sae.k, "multi_topk": False, "skip_connection": False, "transcode": False}
    tensors = dict(zip(SHAPES, folded(sae, centred=True), strict=True))
    write_bytes(folder / "sae.safetensors", save(tensors))
    write_json(folder / "cfg.json", {**cfg, "d_in": sae.d_in, "saegrid": facts})
