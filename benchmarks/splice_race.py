"""Splice evaluation of ten SAEs: this project's shared, restarted passes against SAELens' `run_evals`, in one race."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from prepare import Shape, trained
from race import race
from safetensors.torch import save_file
from torch import Tensor

from saegrid import kernels
from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.sae import SAE, SAE_CLASSES
from saegrid.core.thresholds import calibrated_threshold
from saegrid.data.language_model import load_lm, model_folder
from saegrid.data.prompts import make_prompts
from saegrid.data.store import Store
from saegrid.formats import export
from saegrid.formats.run_folder import save_sae

KS = (16, 32, 64, 128, 256)
ARCHS = ("TopK", "BatchTopK")
EXPANSION, STEPS = 4, 200
RECIPE = {"lr": 1e-3, "b_pre_init": "mean", "encoder_init": "decoder"}  # gives usable SAEs after so few steps
CONTEXTS, LENGTH = 8, 256
LOSSES = ("clean", "spliced", "zero")
AGREE = 1e-3
"""Nats per token: both evaluators' losses must agree within this."""


def measure(config: RunConfig, store: Store, rows: Tensor, threads: int, python: str, quick: bool) -> dict[str, Any]:
    """The race's record. Without `python` (the peers' interpreter) only this project's own time is measured.

    Args:
        rows: training rows (n, d_in).
        quick: two SAEs and short contexts.
    """
    ks, contexts, length = (KS[:1], 2, 32) if quick else (KS, CONTEXTS, LENGTH)
    tokens = packed(config, contexts, length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saes = [_written(folder, config, store, rows, arch, k) for arch, k in itertools.product(ARCHS, ks)]
        inputs = folder / "inputs.safetensors"
        save_file({"x": tokens[None].contiguous(), "mean": store.mean}, inputs)
        common = {"part": "splice", "inputs": str(inputs), "threads": threads, "warm_steps": len(saes)}
        common |= {"config": config.model_dump(), "model_folder": str(model_folder(config)[0])}
        common |= {"saes": {name: [str(sae / name) for sae in saes] for name in ("saegrid", "saelens")}}
        specs = [common | {"contender": "saegrid", "setting": setting} for setting in ("default", "bf16")]
        specs[1]["warm_steps"] = len(saes) - 1  # only its losses and one time are needed
        if python:
            specs.append(common | {"contender": "sae-lens", "setting": "default"})
        turns = len(saes)
        fp32, *peers = race([specs[0], *specs[2:]], {"sae-lens": python}, turns, 0.0, {"default"})
        (bf16,) = race(specs[1:2], {}, 1, 0.0, {"bf16"})
    record = {"saes": len(saes), "tokens": contexts * length, "contexts": contexts, "d_sae": EXPANSION * store.d_in}
    return record | summary(fp32, bf16, peers, len(saes)) | {"contenders": [fp32, bf16, *peers]}


def summary(fp32: dict, bf16: dict, peers: list[dict], count: int) -> dict[str, Any]:
    """Seconds for all SAEs, shared passes included; their ratio; the largest difference of losses (nats per token)."""
    own = (fp32["baseline_ms"] + count * fp32["step_ms"]) / 1e3
    found = {"saegrid_s": own, "baseline_s": fp32["baseline_ms"] / 1e3}
    if "losses" in bf16:
        found["bf16_delta_apart"] = max(
            abs((a["spliced"] - a["clean"]) - (b["spliced"] - b["clean"]))
            for a, b in zip(fp32["losses"], bf16["losses"], strict=True)
        )
        found["bf16_s"] = (bf16["baseline_ms"] + count * bf16["step_ms"]) / 1e3
    for peer in peers:
        if "losses" in peer:
            theirs = count * peer["step_ms"] / 1e3
            pairs = list(zip(fp32["losses"], peer["losses"], strict=True))
            apart = {name: max(abs(a[name] - b[name]) for a, b in pairs) for name in LOSSES}
            found |= {"peer_s": theirs, "ratio": theirs / own, "apart": apart, "agree": max(apart.values()) <= AGREE}
    return found


def packed(config: RunConfig, contexts: int, length: int) -> Tensor:
    """Concatenated evaluation prompts, cut into contexts of one length: token ids (contexts, length)."""
    prompts = make_prompts(config, load_lm(config).tokenizer)["eval"]
    ids = [token for prompt in prompts for token in prompt.tokens]
    ids = list(itertools.islice(itertools.cycle(ids), contexts * length))
    return torch.tensor(ids).reshape(contexts, length)


def _written(folder: Path, config: RunConfig, store: Store, rows: Tensor, arch: str, k: int) -> Path:
    """Train one SAE for some steps; returns a folder with it in this project's format and in SAELens'."""
    state = trained(rows, Shape(store.d_in, EXPANSION, k, 512), arch, STEPS, **RECIPE)
    sae: SAE = SAE_CLASSES[arch](store.d_in, EXPANSION * store.d_in, k=k)
    for own, weights in zip(sae.params, state.params, strict=True):
        own.copy_(weights)
    if arch == "BatchTopK":
        kernel = kernels.load(kernels.choose("auto", "auto", torch.get_num_threads()).kernel)
        sae.inference_threshold = calibrated_threshold(sae, store, 512, kernel)
    place = folder / f"{arch}-{k}"
    run = make_config(arch=arch, k=k, expansion=EXPANSION)
    save_sae(sae, place / "saegrid", run.name, {"model": config.model, "layer": config.layer})
    export(sae, place / "saelens", "saelens", {"model": config.model, "layer": config.layer})
    return place
