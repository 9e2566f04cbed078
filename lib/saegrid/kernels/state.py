"""What all kernels take and give: weights, codes, the rule that keeps a code, and what a training step needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

UNDER_L1 = ("relu", "gated")
"""Kinds of rules under an L1 penalty."""
L1_RATE = 0.1
"""By how much the logarithm of L1's weight moves in a step, at most (measured: LOG.md)."""


NONE = torch.empty(0)


class Params(NamedTuple):
    """Weights (or their gradients, or Adam's moments), float32, contiguous."""

    W_enc: Tensor  # (d_sae, d_in)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in), rows of unit norm
    b_dec: Tensor  # (d_in,)
    b_pre: Tensor  # (d_in,)
    theta: Tensor = NONE  # (d_sae,): JumpReLU's thresholds where each latent has one, Gated's too; (0,) elsewhere
    gain: Tensor = NONE  # (d_sae,): Gated in training, logarithm of magnitude over gate; (0,) elsewhere


class Rule(NamedTuple):
    """Which pre-activations a code keeps.

    topk: the k largest of each row. batchtopk: the int(N * k) largest of the whole batch (arXiv:2412.06410, and
    the published class). threshold: all above `threshold` (JumpReLU; BatchTopK once calibrated). jumprelu: all above
    their latent's theta, which training moves so that k a row are (arXiv:2407.14435). relu: all; L1 presses on them,
    its weight moved so that k a row are active. gated: all whose gate is, under the same pressure (`magnitudes`).
    """

    kind: Literal["topk", "batchtopk", "threshold", "jumprelu", "relu", "gated"]
    k: int = 0
    threshold: float = 0.0
    aim: float = 1.0  # relu: L1 presses until aim * k a row are active


class Codes(NamedTuple):
    """Sparse latent activations, row by row (CSR): row n holds entries offsets[n] to offsets[n + 1]."""

    offsets: Tensor  # (N + 1,) int64
    latents: Tensor  # (nnz,) int32, ascending within a row
    values: Tensor  # (nnz,) float32, above 0


class StepSettings(NamedTuple):
    """What a training step needs besides weights and rows."""

    lr: float
    grad_clip: float = 0.0  # largest global gradient norm; 0: none
    project_grad: bool = False  # drop the part of W_dec's gradient along each decoder row
    matmul: Literal["fp32", "bf16"] = "fp32"  # precision of the encoder's product
    aux_coef: float = 0.0  # weight of AuxK's loss; 0: none
    aux_k: int = 0  # dead latents a row that AuxK uses, at most
    dead_after: int = 0  # a latent that has not fired for so many rows is dead
    sink: Tensor | None = None  # (d_in,) of norm 1: that of latents 0 and 1, up and down; no other encoder row has any
    prefixes: tuple[int, ...] = ()  # Matryoshka's dictionaries, each the first so many latents; the last is d_sae
    bandwidth: float = 0.0  # width of the band around theta whose pairs tell theta's gradient
    l0_coef: float = 0.0  # weight of (L0 / k - 1)², for the rule jumprelu
    l1_coef: float = 0.0  # weight of L1 at the start, for the rules relu and gated
    tie: float = 0.0  # W_enc moves by lr * tie of its distance to W_dec, at most by all of it
    theta_tie: float = 0.0  # theta moves by its learning rate * theta_tie of its distance to their mean, at most by all

    @property
    def tie_share(self) -> float:
        """Share of its distance to W_dec by which W_enc moves in a step."""
        return min(1.0, self.lr * self.tie)


@dataclass
class TrainState:
    """Weights and Adam's moments, changed in place by `train_step`."""

    params: Params
    m: Params
    v: Params
    step: int = 0
    quiet: Tensor | None = None  # (d_sae,) int64: rows since a latent fired; counted only for AuxK
    l1: float = 1.0  # L1's weight by what it was at the start
    workspace: dict[str, Any] = field(default_factory=dict, repr=False)  # a kernel's own buffers; never saved

    def __post_init__(self) -> None:
        if self.quiet is None:
            self.quiet = torch.zeros_like(self.params.b_enc, dtype=torch.int64)

    @classmethod
    def start(cls, params: Params) -> TrainState:
        return cls(params, Params(*map(torch.zeros_like, params)), Params(*map(torch.zeros_like, params)))

    def l1_push(self, x: Tensor, rule: Rule, settings: StepSettings) -> float:
        """L1's slope at an active pair: the loss has l1_coef * l1 / d_in times the mean sum of a row's latents."""
        return self.l1 * settings.l1_coef / x.numel() if rule.kind in UNDER_L1 else 0.0

    def move_l1(self, active: int, n_rows: int, rule: Rule) -> None:
        """More weight to L1 where more than k latents a row were active, less where fewer were."""
        if rule.kind in UNDER_L1:
            moved = self.l1 * math.exp(L1_RATE * max(-1.0, min(1.0, active / n_rows / (rule.aim * rule.k) - 1)))
            self.l1 = max(1e-6, min(1e6, moved))
