"""The table of architectures: what config, training, formats, cards and plots need to know of each. Free of torch.

The classes in `saegrid/core/sae.py` state the equations, `saegrid/kernels/reference.py` the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Arch = Literal["TopK", "BatchTopK", "JumpReLU", "Matryoshka", "ReLU", "Gated"]
Cut = Literal["k", "inference_threshold", "threshold", "theta"]
"""What decides at inference whether a pre-activation is kept: its rank in the row, one calibrated threshold, one given
threshold, or one theta per latent. A saved SAE stores the value under this name."""

KEEPS: dict[Cut, str] = {
    "k": "top = pre.topk({k})\nz = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())",
    **dict.fromkeys(("inference_threshold", "threshold", "theta"), "z = pre * (pre > {theta})"),
}
"""Code that makes a code z of pre-activations `pre` (N, d_sae), for each way to decide."""


@dataclass(frozen=True)
class Architecture:
    """One architecture."""

    name: Arch
    kept: str
    """What a code keeps of the pre-activations, in words, for the model card."""
    color: str
    """Colour in all figures: 3:1 contrast on white and on near-black, distinguishable with any colour vision."""
    marker: str
    """matplotlib marker in all figures."""
    takes_threshold: bool = False
    """Whether a fixed `threshold` may replace `k`."""
    batch_cut: bool = False
    """Whether training keeps the largest pre-activations of a whole batch; inference then uses a calibrated cut."""
    thetas: Literal["never", "with k", "always"] = "never"
    """When each latent has its own trained theta."""
    l1: bool = False
    """Whether an L1 penalty brings L0 to `k`."""
    prefixes: int = 0
    """Default number of nested dictionaries; 0: none."""

    def has_thetas(self, has_k: bool) -> bool:
        """Whether an SAE has one theta per latent; `has_k`: a k was given."""
        return self.thetas == "always" or (self.thetas == "with k" and has_k)

    def has_tied_thetas(self, has_k: bool) -> bool:
        """Whether training decays thetas towards their mean (`theta_tie`). An L1 penalty makes that unnecessary."""
        return self.has_thetas(has_k) and not self.l1

    def cut(self, has_k: bool) -> Cut:
        """What decides at inference whether a pre-activation is kept."""
        if self.batch_cut:
            return "inference_threshold"
        if self.has_thetas(has_k):
            return "theta"
        return "threshold" if self.takes_threshold or self.l1 else "k"


ARCHITECTURES: dict[str, Architecture] = {
    arch.name: arch
    for arch in (
        Architecture(
            "BatchTopK",
            "in training, z = ReLU of the int(N k) largest pre-activations of a batch of N rows, 0 elsewhere; in use, "
            "z = pre where pre is above a threshold calibrated on held-out rows: each row has one code in any batch.",
            color="#d55e00",
            marker="o",
            batch_cut=True,
        ),
        Architecture(
            "TopK",
            "z = ReLU of the k largest pre-activations of each row, 0 elsewhere.",
            color="#3a86c8",
            marker="s",
        ),
        Architecture(
            "JumpReLU",
            "z = pre where pre > θ, 0 elsewhere; one fixed θ for all latents, or, in runs with a K, one per latent, "
            "trained so that K latents per row are active on average.",
            color="#009e73",
            marker="^",
            takes_threshold=True,
            thetas="with k",
        ),
        Architecture(
            "Matryoshka",
            "as BatchTopK, trained so that its first half, quarter, … of latents reconstruct on their own.",
            color="#b5609a",
            marker="D",
            batch_cut=True,
            prefixes=5,
        ),
        Architecture(
            "ReLU",
            "z = ReLU(pre), trained under an L1 penalty whose weight was moved so that K latents per row are active.",
            color="#7b7f87",
            marker="v",
            l1=True,
        ),
        Architecture(
            "Gated",
            "z = pre where pre > θ, 0 elsewhere, one θ per latent: a Gated SAE (arXiv:2404.16014), its gate and "
            "magnitude folded into one encoder, trained under an L1 penalty so that K latents per row are active on "
            "average.",
            color="#9a7d00",
            marker="P",
            thetas="always",
            l1=True,
        ),
    )
}
