"""One class per architecture; its docstring gives the equation.

All share one encoder and decoder (`kernels.reference` has the formulas) and differ in what the code keeps.
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
    """A sparse autoencoder with one centre `b_pre`: pre = (x - b_pre) W_encᵀ + b_enc, x_hat = z W_dec + b_dec + b_pre.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        k: latents per row (TopK), or per row on average (all others, except a JumpReLU with a given `threshold`).
        threshold: JumpReLU's theta, in the activations' unit, if all latents share one.
        inference_threshold: BatchTopK's calibrated scalar cut; None: it cuts per batch.
        theta: JumpReLU's or Gated's thetas (d_sae,), at least 0, if each latent has its own.
    """

    l0_is_free = False
    """True: no step after training sets L0 to `k`, so training aims at `k`, and the last epoch's weights are kept."""

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
        self.gain = nn.Parameter(torch.zeros(0), requires_grad=False)  # only Gated has it, in training

    @property
    def arch(self) -> str:
        return type(self).__name__

    @property
    def device(self) -> str:
        """Device of the weights: "cpu" or "cuda"."""
        return self.b_pre.device.type

    @property
    def params(self) -> Params:
        """The weights themselves (no copies), as the kernels take them."""
        return Params(*(getattr(self, name).data for name in Params._fields))

    @property
    def training_rule(self) -> Rule:
        """Which pre-activations a code keeps during training."""
        raise NotImplementedError

    @property
    def rule(self) -> Rule:
        """Which pre-activations a code keeps at inference: as in training, unless a class overrides it."""
        return self.training_rule

    def trained_form(self, params: Params) -> tuple[Params, Rule]:
        """Weights and rule that encode validation rows during training; `params` are in their training form."""
        return params, self.training_rule

    def finish(self) -> None:
        """Turn the SAE from its training form into its inference form, in place."""

    def codes(self, x: Tensor, kernel: Kernel = reference) -> Codes:
        """Sparse codes of the rows x (N, d_in)."""
        return kernel.encode(self.params, x, self.rule)

    def encode(self, x: Tensor) -> Tensor:
        """latent_acts (..., d_sae) of x (..., d_in). BatchTopK without a calibrated cut cuts over all rows."""
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

    At inference, a scalar cut calibrated on held-out rows gives each row the same code in any batch.
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
    """BatchTopK trained so that, for each prefix m, its first m latents are a dictionary too (arXiv:2503.17547).

    At inference it is a BatchTopK with its latents in order of importance.
    """


class JumpReLU(SAE):
    """z = pre where pre > theta, 0 elsewhere (arXiv:2407.14435).

    A single theta for all latents stays as given (the published sweep). One theta per latent is trained, by
    straight-through gradients, until k latents per row are active on average.
    """

    @property
    def training_rule(self) -> Rule:
        return Rule("jumprelu", k=self.k) if len(self.theta) else Rule("threshold", threshold=self.threshold)


class ReLU(JumpReLU):
    """z = ReLU(pre), with an L1 penalty whose weight is adapted until about k latents per held-out row are active.

    A JumpReLU with a theta of 0. Its training loss adds l1 / d_in times the mean over rows of Σ z, for
    decoder rows of unit norm (arXiv:2309.08600).
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

    The L1 penalty acts on the gates alone, so it shrinks no magnitude; its weight is adapted until k latents per row
    are active. `finish` folds gate and magnitude into one: at inference it is a JumpReLU with one theta per latent.
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

    Encoder and decoder are initialised as torch's `nn.Linear` (Kaiming uniform, a = √5: U(±1/√fan_in), biases too);
    decoder rows are then set to unit norm. `encoder_init="decoder"` copies the decoder to the encoder, with biases 0.

    Args:
        mean: initial `b_pre` (d_in,), unless `b_pre_init` is "zero".
        sink: direction of the attention sinks (d_in,), of norm 1, if two latents are reserved for it.
    """
    d_sae = config.expansion * d_in
    theta = torch.zeros(d_sae) if config.trains_theta else None
    sae = SAE_CLASSES[config.arch](d_in, d_sae, k=config.k, threshold=config.threshold, theta=theta)
    if config.arch == "Gated":
        sae.gain.data = torch.zeros(d_sae)
    generator = torch.Generator().manual_seed(config.seed)
    for tensor, fan_in in ((sae.W_enc, d_in), (sae.b_enc, d_in), (sae.W_dec, d_sae), (sae.b_dec, d_sae)):
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
    """Turn an SAE for rows x / scale into one for rows x, in place: multiply biases and thresholds by `scale`."""
    for tensor in (sae.b_enc, sae.b_dec, sae.b_pre, sae.theta):
        tensor.data.mul_(scale)
    sae.threshold *= scale
