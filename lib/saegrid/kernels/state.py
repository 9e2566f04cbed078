"""Inputs and outputs of all kernels: weights, codes, the rule that selects a code, and what a training step needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

UNDER_L1 = ("relu", "gated")
"""Rules trained under an L1 penalty."""
L1_RATE = 0.1
"""Maximum change of the logarithm of L1's weight per step (measured: LOG.md)."""
THETA_RATE = 10.0
"""Theta's learning rate / the others': at theirs, theta does not follow the pre-activations (measured: LOG.md)."""

NONE = torch.empty(0)


class Params(NamedTuple):
    """Weights (or their gradients, or Adam's moments), float32, contiguous."""

    W_enc: Tensor  # (d_sae, d_in)
    b_enc: Tensor  # (d_sae,)
    W_dec: Tensor  # (d_sae, d_in), rows of unit norm
    b_dec: Tensor  # (d_in,)
    b_pre: Tensor  # (d_in,)
    theta: Tensor = NONE  # (d_sae,): one threshold per latent (JumpReLU with k, Gated); else (0,)
    gain: Tensor = NONE  # (d_sae,): log(W_mag / W_enc) of Gated in training; else (0,)


class Rule(NamedTuple):
    """Which pre-activations a code keeps.

    topk: the k largest of each row. batchtopk: the int(N * k) largest of the whole batch (arXiv:2412.06410, and
    the published class). threshold: all above `threshold` (JumpReLU; BatchTopK once calibrated). jumprelu: all above
    their latent's theta, trained so that k per row are (arXiv:2407.14435). relu: all, under an L1 penalty whose weight
    is adapted until k per row are active. gated: all with an open gate, under the same penalty (`magnitudes`).
    """

    kind: Literal["topk", "batchtopk", "threshold", "jumprelu", "relu", "gated"]
    k: int = 0
    threshold: float = 0.0
    aim: float = 1.0  # relu: L1 is adapted until aim * k per row are active


class Codes(NamedTuple):
    """Sparse latent activations, row by row (CSR): row n holds entries offsets[n] to offsets[n + 1]."""

    offsets: Tensor  # (N + 1,) int64
    latents: Tensor  # (nnz,) int32, ascending within a row
    values: Tensor  # (nnz,) float32, above 0


class StepSettings(NamedTuple):
    """What a training step needs besides weights and rows."""

    lr: float
    grad_clip: float = 0.0  # maximum global gradient norm; 0: none
    project_grad: bool = False  # drop the part of W_dec's gradient along each decoder row
    matmul: Literal["fp32", "bf16"] = "fp32"  # precision of the encoder's product
    aux_coef: float = 0.0  # weight of AuxK's loss; 0: none
    aux_k: int = 0  # maximum number of dead latents per row that AuxK uses
    dead_after: int = 0  # a latent that has not fired for this many rows is dead
    sink: Tensor | None = None  # (d_in,) of norm 1: direction of latents 0 (+) and 1 (-); other encoder rows have none
    prefixes: tuple[int, ...] = ()  # sizes of Matryoshka's dictionaries, each the first latents; the last is d_sae
    bandwidth: float = 0.0  # width of the band around theta whose pairs give theta's gradient
    l0_coef: float = 0.0  # weight of (L0 / k - 1)², for the rule jumprelu
    l1_coef: float = 0.0  # initial weight of L1, for the rules relu and gated
    tie: float = 0.0  # W_enc moves by min(1, lr * tie) of its distance to W_dec
    theta_tie: float = 0.0  # theta moves by min(1, its rate * theta_tie) of its distance to the mean
    batch_size: int = 0  # maximum rows of a step; the dense kernel pads to it
    freeze: Literal["none", "decoder", "encoder", "soft"] = "none"  # weights that stay at their initial values
    start: Tensor | None = None  # (d_sae, d_in): initial W_dec, or W_enc with freeze "encoder"; None with "none"

    @property
    def tie_share(self) -> float:
        """Share of its distance to W_dec that W_enc moves per step."""
        return min(1.0, self.lr * self.tie)

    @property
    def theta_share(self) -> float:
        """Share of its distance to the mean that theta moves per step."""
        return min(1.0, self.lr * THETA_RATE * self.theta_tie)

    @property
    def frozen(self) -> str:
        """The weights that have no gradient: W_dec, W_enc, or none of them (empty)."""
        return {"decoder": "W_dec", "encoder": "W_enc"}.get(self.freeze, "")


@dataclass
class TrainState:
    """Weights and Adam's moments, changed in place by `train_step`."""

    params: Params
    m: Params
    v: Params
    step: int = 0
    quiet: Tensor = NONE  # (d_sae,) int64: rows since a latent fired; counted only for AuxK
    l1: float = 1.0  # L1's weight / its initial value
    workspace: dict[str, Any] = field(default_factory=dict, repr=False)  # a kernel's own buffers; never saved

    def __post_init__(self) -> None:
        if self.quiet is NONE:
            self.quiet = torch.zeros_like(self.params.b_enc, dtype=torch.int64)

    @classmethod
    def start(cls, params: Params) -> TrainState:
        return cls(params, Params(*map(torch.zeros_like, params)), Params(*map(torch.zeros_like, params)))

    def l1_push(self, x: Tensor, rule: Rule, settings: StepSettings) -> float:
        """L1's slope at an active pair: the loss adds l1_coef * l1 / d_in times a row's mean sum of latents."""
        return self.l1 * settings.l1_coef / x.numel() if rule.kind in UNDER_L1 else 0.0

    def move_l1(self, active: int, n_rows: int, rule: Rule) -> None:
        """Raise L1's weight if more than aim * k latents per row were active, lower it if fewer."""
        if rule.kind in UNDER_L1:
            moved = self.l1 * math.exp(L1_RATE * max(-1.0, min(1.0, active / n_rows / (rule.aim * rule.k) - 1)))
            self.l1 = max(1e-6, min(1e6, moved))
