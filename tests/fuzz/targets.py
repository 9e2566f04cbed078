"""Every parser and loader of this project, each as a function of bytes: only `SaegridError` may come out.

`fuzz.py` drives them by coverage, `tests/test_resilience_input.py` by hypothesis and by what was found.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

from saegrid.config import make_config
from saegrid.errors import SaegridError
from saegrid.exchange import read_dictionary, read_saelens, read_sparsify
from saegrid.files import save_sae
from saegrid.formats import export, load_sae
from saegrid.grid import load_grid, papermill_arguments
from saegrid.published import _load
from saegrid.sae import BatchTopK, JumpReLU, TopK

SPLIT = b"\n--\n"
"""Between the parts of an input that stands for several files."""


def grid(data: bytes, folder: Path) -> None:
    path = folder / "grid.yaml"
    path.write_bytes(data)
    for run in load_grid(path).runs()[:10]:
        papermill_arguments(run)


def config(data: bytes, folder: Path) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        run = make_config(**content)
        run.check_shape(16, 3)
        assert run.run_id and run.store_id


def published_sae(data: bytes, folder: Path) -> None:
    for name in ("TopK_exp2x_k2.pt", "JumpReLU_exp2x_t0.5.pt"):
        (folder / name).write_bytes(data)
        load_sae(folder / name)


def activation_file(data: bytes, folder: Path) -> None:
    (folder / "acts.pt").write_bytes(data)
    acts = _load(folder / "acts.pt", 4, "a model")
    acts[:1].float()


def sae_folder(data: bytes, folder: Path) -> None:
    """A configuration and weights, as each of the four tools may have left them."""
    cfg, _, weights = data.partition(SPLIT)
    names = {"own": ("cfg.json", "sae.safetensors"), "lens": ("cfg.json", "sae_weights.safetensors")}
    for kind, (cfg_name, weights_name) in names.items():
        place = folder / kind
        place.mkdir(exist_ok=True)
        (place / cfg_name).write_bytes(cfg)
        (place / weights_name).write_bytes(weights)
        _quietly(load_sae, place)
        _quietly(read_sparsify if kind == "own" else read_saelens, place)


def dictionary_folder(data: bytes, folder: Path) -> None:
    cfg, _, weights = data.partition(SPLIT)
    (folder / "config.json").write_bytes(cfg)
    (folder / "ae.pt").write_bytes(weights)
    read_dictionary(folder)


TARGETS = {
    "grid": grid,
    "config": config,
    "published_sae": published_sae,
    "activation_file": activation_file,
    "sae_folder": sae_folder,
    "dictionary_folder": dictionary_folder,
}


def seeds(target: str, folder: Path) -> list[bytes]:
    """Small valid inputs to start from."""
    torch.manual_seed(0)
    saes = [TopK(4, 8, k=2), BatchTopK(4, 8, k=2, inference_threshold=0.5), JumpReLU(4, 8, threshold=0.5)]
    if target == "grid":
        return [path.read_bytes() for path in Path("params").glob("*.yaml")]
    if target == "config":
        return [json.dumps(make_config(k=4).identity()).encode(), b'{"arch": "JumpReLU", "threshold": 0.5}']
    if target == "activation_file":
        return [_pt(torch.ones(3, 4)), _pt(torch.ones(3, 4, dtype=torch.float16)), _pt({"a": torch.ones(1)})]
    found = []
    for sae in saes:
        if target == "published_sae":
            found.append(export(sae, folder / sae.arch, "published").read_bytes())
        elif target == "dictionary_folder":
            place = export(sae, folder / sae.arch, "dictionary_learning")
            found.append((place / "config.json").read_bytes() + SPLIT + (place / "ae.pt").read_bytes())
        elif target == "sae_folder":
            save_sae(sae, folder / f"own{sae.arch}", "a", {})
            formats = ["saelens", *(["sparsify"] if isinstance(sae, TopK) else [])]
            places = [export(sae, folder / f"{kind}{sae.arch}", kind) for kind in formats]
            for place in [folder / f"own{sae.arch}", *places]:
                (weights,) = place.glob("*.safetensors")
                found.append((place / "cfg.json").read_bytes() + SPLIT + weights.read_bytes())
    return found


def check(target: str, data: bytes, folder: Path) -> bool:
    """Run a target on an input, in an empty folder. Returns whether the input was taken; lets all but
    `SaegridError` through."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        TARGETS[target](data, folder)
    except SaegridError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 3000
        return False
    return True


def _quietly(call, *arguments) -> None:
    try:
        call(*arguments)
    except SaegridError as error:
        assert "\n" not in str(error)


def _pt(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


__all__ = ["TARGETS", "check", "save", "seeds"]
