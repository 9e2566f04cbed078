"""The architectures: one class each, its docstring the equation.

All share one encoder and decoder (`kernels.reference` has the formulas) and differ in what their code keeps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saegrid.config.run_config import RunConfig
from saegrid.kernels import Kernel, reference
from saegrid.kernels.reference import keep_apart
from saegrid.kernels.state import Codes, Params, Rule


class SAE(nn.Module):
    """A sparse autoencoder with tied centre `b_pre`: pre = (x - b_pre) W_encᵀ + b_enc, x_hat = z W_dec + b_dec + b_pre.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: latents a row (TopK) or a row on average (all others, but a JumpReLU whose threshold was given).
        threshold: JumpReLU's theta, in the activations' unit, where all latents have one.
        inference_threshold: scalar cut that BatchTopK uses once calibrated; None: it cuts per batch.
        theta: JumpReLU's and Gated's thetas (d_sae,), at least 0, where each latent has its own.
    """

    l0_is_free = False
    """Whether nothing after training brings L0 to `k`: training then aims at it, and the last epoch counts."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int = 0,
        threshold: float = 0.0,
        inference_threshold: float | None = None,
        theta: Tensor | None = None,
    ):
        super().__init__()
        self.d_in, self.d_sae, self.k, self.threshold = d_in, d_sae, k, threshold
        self.inference_threshold = inference_threshold
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in), requires_grad=False)
        self.b_enc = nn.Parameter(torch.zeros(d_sae), requires_grad=False)
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d_in), requires_grad=False)
        self.b_pre = nn.Parameter(torch.zeros(d_in), requires_grad=False)
        self.theta = nn.Parameter(torch.zeros(0) if theta is None else theta, requires_grad=False)
        self.gain = nn.Parameter(torch.zeros(0), requires_grad=False)  # Gated's, while it is trained

    @property
    def arch(self) -> str:
        return type(self).__name__

    @property
    def device(self) -> str:
        """Where the weights lie: "cpu" or "cuda"."""
        return self.b_pre.device.type

    @property
    def params(self) -> Params:
        """The weights themselves (no copies), as the kernels take them."""
        return Params(*(getattr(self, name).data for name in Params._fields))

    @property
    def training_rule(self) -> Rule:
        """What a code keeps during training."""
        raise NotImplementedError

    @property
    def rule(self) -> Rule:
        """What a code keeps in use: the same as in training, unless a class says otherwise."""
        return self.training_rule

    def trained_form(self, params: Params) -> tuple[Params, Rule]:
        """Weights and rule that encode validation rows during training, for weights in their form for training."""
        return params, self.training_rule

    def finish(self) -> None:
        """Turn the SAE from its form for training into that for use, in place."""

    def codes(self, x: Tensor, kernel: Kernel = reference) -> Codes:
        """Sparse codes of the rows x (N, d_in)."""
        return kernel.encode(self.params, x, self.rule)

    def encode(self, x: Tensor) -> Tensor:
        """latent_acts (..., d_sae) of x (..., d_in). BatchTopK without a threshold cuts over all leading rows."""
        codes = self.codes(x.reshape(-1, self.d_in).float())
        return reference.dense(codes, self.d_sae).reshape(*x.shape[:-1], self.d_sae)

    def decode(self, latent_acts: Tensor) -> Tensor:
        """x_hat (..., d_in) of latent_acts (..., d_sae)."""
        return latent_acts @ self.W_dec + self.b_dec + self.b_pre

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction x_hat, of x's shape."""
        return self.decode(self.encode(x))


class TopK(SAE):
    """z = ReLU of the k largest pre-activations of each row, 0 elsewhere (arXiv:2406.04093)."""

    @property
    def training_rule(self) -> Rule:
        return Rule("topk", k=self.k)


class BatchTopK(SAE):
    """z = ReLU of the int(N k) largest pre-activations of a batch of N rows, 0 elsewhere (arXiv:2412.06410).

    In use, a scalar threshold calibrated on held-out rows gives each row the same code in any batch.
    """

    @property
    def training_rule(self) -> Rule:
        return Rule("batchtopk", k=self.k)

    @property
    def rule(self) -> Rule:
        if self.inference_threshold is None:
            return self.training_rule
        return Rule("threshold", threshold=self.inference_threshold)


class Matryoshka(BatchTopK):
    """BatchTopK whose first m latents are a dictionary too, for each prefix m in training (arXiv:2503.17547).

    In use it is a BatchTopK; its latents stand in the order of what they are worth.
    """


class JumpReLU(SAE):
    """z = pre where pre > theta, 0 elsewhere (arXiv:2407.14435).

    One theta for all latents stays as it is given (the published runs). With one a latent, training moves them, by
    straight-through gradients, to where k latents a row are active on average.
    """

    @property
    def training_rule(self) -> Rule:
        return Rule("jumprelu", k=self.k) if len(self.theta) else Rule("threshold", threshold=self.threshold)


class ReLU(JumpReLU):
    """z = ReLU(pre), under an L1 penalty whose weight is moved so that about k latents a held-out row are active.

    The baseline, a JumpReLU with a theta of 0. In training, the loss has l1 / d_in times the mean over rows of Σ z
    besides, for decoder rows of unit norm (arXiv:2309.08600).
    """

    l0_is_free = True

    @property
    def training_rule(self) -> Rule:
        return Rule("relu", k=self.k)

    @property
    def rule(self) -> Rule:
        return Rule("threshold")


class Gated(JumpReLU):
    """z = ReLU(exp(gain) pre + theta) where pre > 0, 0 elsewhere: gate and magnitude of one encoder (arXiv:2404.16014).

    L1 presses on the gates alone, so that it shrinks no magnitude; its weight is moved so that k latents a row are
    active. `finish` folds the two into one: in use it is a JumpReLU with one theta a latent.
    """

    @property
    def training_rule(self) -> Rule:
        return Rule("gated", k=self.k)

    @property
    def rule(self) -> Rule:
        return self.training_rule if len(self.gain) else Rule("jumprelu", k=self.k)

    def trained_form(self, params: Params) -> tuple[Params, Rule]:
        return reference.folded_gate(params), Rule("jumprelu")

    def finish(self) -> None:
        folded = reference.folded_gate(self.params)
        for name, tensor in folded._asdict().items():
            getattr(self, name).data = tensor.clone()


SAE_CLASSES: dict[str, type[SAE]] = {cls.__name__: cls for cls in (TopK, BatchTopK, JumpReLU, Matryoshka, ReLU, Gated)}
"""The class of each architecture in `saegrid.config.architectures`."""


def initial_sae(config: RunConfig, d_in: int, mean: Tensor, sink: Tensor | None = None) -> SAE:
    """The SAE at the start of training, from the run's seed.

    Encoder and decoder start as torch's `nn.Linear` does (Kaiming uniform, a = √5: U(±1/√fan_in), biases too), the
    decoder's rows then set to unit norm. `encoder_init="decoder"` starts the encoder at the decoder, biases at 0.

    Args:
        mean: where `b_pre` starts (d_in,), unless `b_pre_init` is "zero".
        sink: direction of the attention sinks (d_in,), of norm 1, where two latents are to have it for themselves.
    """
    d_sae = config.expansion * d_in
    theta = torch.zeros(d_sae) if config.trains_theta else None
    sae = SAE_CLASSES[config.arch](d_in, d_sae, k=config.k, threshold=config.threshold, theta=theta)
    if config.arch == "Gated":
        sae.gain.data = torch.zeros(d_sae)
    generator = torch.Generator().manual_seed(config.seed)
    for tensor, fan_in in (
        (sae.W_enc, d_in),
        (sae.b_enc, d_in),
        (sae.W_dec, d_sae),
        (sae.b_dec, d_sae),
    ):
        bound = 1 / math.sqrt(fan_in)
        tensor.data.uniform_(-bound, bound, generator=generator)
    sae.W_dec.data.div_(sae.W_dec.norm(dim=1, keepdim=True))
    if config.encoder_init == "decoder":
        sae.W_enc.data.copy_(sae.W_dec)
        sae.b_enc.data.zero_()
        sae.b_dec.data.zero_()
    if sink is not None:
        sae.b_enc.data[:2] = 0.0
        keep_apart(sae.params, sink)
    if config.b_pre_init != "zero":
        sae.b_pre.data.copy_(mean)
    return sae


def fold_scale(sae: SAE, scale: float) -> None:
    """Turn an SAE of rows x / scale into the same of rows x, in place: what carries the rows' unit is multiplied."""
    for tensor in (sae.b_enc, sae.b_dec, sae.b_pre, sae.theta):
        tensor.data.mul_(scale)
    sae.threshold *= scale
