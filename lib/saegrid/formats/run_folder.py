"""An SAE on disk: the published `.pt` state dict, and `sae.safetensors` with a `cfg.json` that rebuilds it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from saegrid.core.sae import SAE, SAE_CLASSES
from saegrid.errors import DamagedError, SaeFileError
from saegrid.kernels.state import Params
from saegrid.storage.atomic import write_bytes, write_json
from saegrid.storage.checksums import SUMS, file_sha256, read_sums

PUBLISHED_SHAPES = {
    "b_pre": ("d_in",),
    "encoder.weight": ("d_sae", "d_in"),
    "encoder.bias": ("d_sae",),
    "decoder.weight": ("d_in", "d_sae"),
    "decoder.bias": ("d_in",),
}
"""State dict of the published files; `decoder.weight` is the transpose of `W_dec`."""
THETA = "threshold"
"""Name, in a state dict, of JumpReLU's or Gated's theta per latent, (d_sae,); the published files have none."""


def published_state_dict(sae: SAE) -> dict[str, Tensor]:
    """The SAE's weights under the published names and in the published layout, contiguous.

    Raises `SaeFileError` for a Gated SAE that is still in its training form.
    """
    check_folded(sae)
    return {
        "b_pre": sae.b_pre.data,
        "encoder.weight": sae.W_enc.data,
        "encoder.bias": sae.b_enc.data,
        "decoder.weight": sae.W_dec.data.T.contiguous(),
        "decoder.bias": sae.b_dec.data,
    } | ({THETA: sae.theta.data} if len(sae.theta) else {})


def check_folded(sae: SAE) -> None:
    """Raises `SaeFileError` for a Gated SAE that is still in its training form, which no file can hold."""
    if len(sae.gain):
        raise SaeFileError("Gated: this SAE is still in its training form; call finish() first")


def from_published(state: dict[str, Tensor], arch: str, k: int = 0, threshold: float = 0.0) -> SAE:
    """The SAE of a published state dict with valid shapes; a BatchTopK has no calibrated cut and cuts per batch.

    `formats.load_sae` reads files and checks their content.
    """
    d_sae, d_in = state["encoder.weight"].shape
    theta = state[THETA].float().clone() if THETA in state else None
    sae = SAE_CLASSES[arch](d_in, d_sae, k=k, threshold=threshold, theta=theta)
    sae.b_pre.data.copy_(state["b_pre"])
    sae.W_enc.data.copy_(state["encoder.weight"])
    sae.b_enc.data.copy_(state["encoder.bias"])
    sae.W_dec.data.copy_(state["decoder.weight"].T)
    sae.b_dec.data.copy_(state["decoder.bias"])
    return sae


def write_state_dict(sae: SAE, path: Path) -> None:
    """Write the published `.pt` file; the same SAE gives the same bytes."""
    buffer = io.BytesIO()  # with a path, torch.save would store the file's name
    torch.save(published_state_dict(sae), buffer)
    write_bytes(path, buffer.getvalue())


def shape_and_rule(sae: SAE) -> dict[str, Any]:
    """The fields that rebuild the SAE, together with its weights."""
    return {field: getattr(sae, field) for field in ("arch", "d_in", "d_sae", "k", "threshold", "inference_threshold")}


def save_sae(sae: SAE, folder: str | Path, name: str, facts: dict[str, Any]) -> str:
    """Write `{name}.pt`, `sae.safetensors` and `cfg.json` into `folder`; the same SAE gives the same bytes.

    Args:
        name: the published file name without its ending.
        facts: further fields of `cfg.json` (model, layer, how it was trained, …).

    Returns:
        SHA-256 of `sae.safetensors`.
    """
    folder = Path(folder)
    write_state_dict(sae, folder / f"{name}.pt")
    content = save({key: tensor.contiguous() for key, tensor in sae.params._asdict().items() if tensor.numel()})
    write_bytes(folder / "sae.safetensors", content)
    digest = hashlib.sha256(content).hexdigest()
    write_json(folder / "cfg.json", {**shape_and_rule(sae), "weights_sha256": digest, **facts})
    return digest


def load_folder(folder: str | Path) -> SAE:
    """The SAE of a run's folder, as `save_sae` wrote it; checks its weights against `cfg.json`'s hash.

    Raises:
        SaeFileError: a file is missing, damaged, or not of this form.
    """
    folder = Path(folder)
    weights = folder / "sae.safetensors"
    _check_sums(folder)
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        tensors = load_file(weights)
        sae = SAE_CLASSES[cfg["arch"]](
            **{name: cfg[name] for name in ("d_in", "d_sae", "k", "threshold", "inference_threshold")},
            theta=torch.zeros(cfg["d_sae"]) if "theta" in tensors else None,
        )
        expected = cfg["weights_sha256"]
    except OSError as error:
        raise SaeFileError(f"{error.filename or folder}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise SaeFileError(f"{folder}: cfg.json and sae.safetensors are not a saved SAE: {error!r}") from None
    if digest != expected:
        raise SaeFileError(f"{weights}: SHA-256 {digest[:12]}… is not the {expected[:12]}… that cfg.json states")
    for name in Params._fields:
        target = getattr(sae, name)
        if not target.numel():
            continue
        if name not in tensors or tensors[name].shape != target.shape:
            raise SaeFileError(f"{weights}: {name} is missing or not of shape {tuple(target.shape)}")
        target.data.copy_(tensors[name])
    return sae


def _check_sums(folder: Path) -> None:
    """Check the SAE's files against `SHA256SUMS`, which a finished run writes. Raises `SaeFileError`."""
    try:
        sums = read_sums(folder) if (folder / SUMS).exists() else {}
        for name in ("cfg.json", "sae.safetensors"):
            if name in sums and file_sha256(folder / name) != sums[name]:
                raise SaeFileError(f"{folder / name}: damaged (not the SHA-256 in {SUMS})")
    except DamagedError as error:
        raise SaeFileError(str(error)) from None
