"""Parity with the real sae-lens, dictionary-learning and eai-sparsify, in their own environment (`make peers`)."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from processes import peers_python
from safetensors.torch import load_file, save_file

from saegrid.core.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from saegrid.formats import export, load_sae

ROOT = Path(__file__).parents[2]
D_IN, D_SAE, K = 128, 2048, 32
N_ROWS, N_SINKS = 1024, 8
X_HAT = 1e-5
"""Largest ‖Δx_hat‖ / ‖x‖ of a row."""
NEAR = 1e-5
"""A latent this near the cut, relative, may fall on either side: its pre-activation is a sum of rounded terms."""
ALL = ("TopK", "BatchTopK", "JumpReLU", "JumpReLUPerLatent", "ReLU", "ReLUOfOtherNorms", "Gated")
EXPORTED = [*(f"{format}-{arch}" for format in ("saelens", "dictionary_learning") for arch in ALL), "sparsify-TopK"]
SAVED = [
    *(f"saelens-topk-b_dec_{b_dec}-rescale_{rescale}" for b_dec in (False, True) for rescale in (False, True)),
    *(f"saelens-{arch}-b_dec_{b_dec}" for arch in ("jumprelu", "standard", "gated") for b_dec in (False, True)),
    *("saelens-batchtopk", "saelens-bfloat16", *(f"saelens-old_{arch}" for arch in ("topk", "standard", "gated"))),
    *(f"dictionary_learning-{name}" for name in ("topk", "batchtopk", "matryoshka", "jumprelu")),
    *(f"dictionary_learning-{name}" for name in ("relu", "relu_normed", "gated")),
    "sparsify-topk",
]


def rows() -> torch.Tensor:
    """Rows as a residual stream has them: a common offset, norms near 145, and attention sinks of norm 25,000."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, D_IN, generator=generator) * 12 + 4 * torch.randn(D_IN, generator=generator)
    x[:N_SINKS] *= 25_000 / x[:N_SINKS].norm(dim=1, keepdim=True)
    return x


def make(arch: str) -> SAE:
    """Random weights, every bias at work, decoder rows of unit norm; thresholds that keep about K latents a row."""
    thresholds = torch.linspace(25, 45, D_SAE)
    sae = {
        "TopK": lambda: TopK(D_IN, D_SAE, k=K),
        "BatchTopK": lambda: BatchTopK(D_IN, D_SAE, k=K, inference_threshold=34.5),
        "JumpReLU": lambda: JumpReLU(D_IN, D_SAE, threshold=34.5),
        "JumpReLUPerLatent": lambda: JumpReLU(D_IN, D_SAE, theta=thresholds),
        "ReLU": lambda: ReLU(D_IN, D_SAE, k=K),
        "ReLUOfOtherNorms": lambda: ReLU(D_IN, D_SAE, k=K),
        "Gated": lambda: Gated(D_IN, D_SAE, k=K, theta=thresholds),
    }[arch]()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sae.named_parameters():
        if name != "theta":
            parameter.data.normal_(std=0.1 if name.startswith("W") else 2.0, generator=generator)
    if arch != "ReLUOfOtherNorms":
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    if isinstance(sae, ReLU):
        sae.b_enc.data -= 34.5
    return sae


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """The folder in which the peers' libraries have read what was exported, and saved SAEs of their own."""
    python = peers_python()
    folder = tmp_path_factory.mktemp("peers")
    save_file({"x": rows()}, folder / "rows.safetensors")
    for name in EXPORTED:
        format, arch = name.split("-")
        export(make(arch), folder / "exported" / name, format, {"model": "some/model", "layer": 12, "max_tokens": 512})
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, Path(__file__).parents[1].joinpath("peers_script.py"), folder],
        **{"env": environment | quiet, "capture_output": True, "text": True, "timeout": 600, "check": False},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def distance_to_cut(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """Distance of each pre-activation from its row's cut, relative to the cut; in float64, shape (N, d_sae).

    A cut of 0, or at a difference of two biases, is no measure: the terms of the sum are one then.
    """
    params = [getattr(sae, name).data.double() for name in ("b_pre", "W_enc", "b_enc")]
    pre = (x.double() - params[0]) @ params[1].T + params[2]
    if isinstance(sae, TopK):
        kept, out = pre.topk(sae.k + 1, dim=1).values[:, -2:].T  # the cut lies between the last kept and the next
        cut = (kept[:, None] + out[:, None]) / 2
    elif len(sae.theta):
        cut = sae.theta.double()
    else:
        cut = torch.tensor(sae.inference_threshold if isinstance(sae, BatchTopK) else sae.threshold).double()
    scale = cut.abs()
    if isinstance(sae, (ReLU, Gated)):
        scale = scale + (x - sae.b_pre).double().norm(dim=1)[:, None] * sae.W_enc.double().norm(dim=1)
    return (pre - cut).abs() / scale


def assert_parity(sae: SAE, theirs: dict[str, torch.Tensor], record) -> None:
    """x_hat of every row within X_HAT of ‖x‖, but where a latent nearer to the cut than NEAR fell on another side."""
    x = rows()
    acts, x_hat = sae.encode(x), sae(x)
    differs = (acts > 0) != (theirs["latent_acts"] > 0)
    near = distance_to_cut(sae, x) <= NEAR
    assert not (differs & ~near).any(), "a latent far from the cut fires on one side alone"
    same = ~differs.any(dim=1)
    assert same.sum() > 0.98 * N_ROWS and same[:N_SINKS].any()
    error = ((x_hat - theirs["x_hat"]).norm(dim=1) / x.norm(dim=1))[same].max().item()
    error_acts = ((acts - theirs["latent_acts"]).norm(dim=1) / acts.norm(dim=1).clamp_min(1))[same].max().item()
    l0 = (acts > 0).sum(1).double().mean().item()
    for key, value in {
        "x_hat": error,
        "acts": error_acts,
        "near": near.sum(),
        "differ": differs.sum(),
        "l0": l0,
    }.items():
        record(key, float(value))
    assert error <= X_HAT and error_acts <= X_HAT
    assert 4 < l0 < D_SAE / 4


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_is_the_same_sae_in_the_peer(peers, name, record_property):
    theirs = load_file(peers / f"theirs/{name}.safetensors")
    assert_parity(make(name.split("-")[1]), theirs, record_property)


@pytest.mark.parametrize("name", SAVED)
def test_what_a_peer_saves_is_the_same_sae_here(peers, name, record_property):
    theirs = load_file(peers / f"theirs/{name}.safetensors")
    assert_parity(load_sae(peers / "saved" / name), theirs, record_property)


def test_every_sae_that_the_peers_save_is_compared(peers):
    assert sorted(path.name for path in (peers / "saved").iterdir()) == sorted(SAVED)
