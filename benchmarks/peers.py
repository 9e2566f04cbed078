"""The peers' training steps, through the public parts of their released packages.

All start from the same weights and, if they use Adam, from the same moments. A setting is `default`, or flags joined
by `+`: `bf16` (torch's autocast), `compile` (torch.compile), and a peer's own options. A contender has `step(x)`, and
`reconstruct(x)`: x_hat and the number of active pairs, which show that all solve the same problem.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

LR = 1e-4  # small and the same for all: the weights stay close to where 500 steps left them
STEP = 2000  # step number given to dictionary_learning: after its warm-ups, as in most of a training

SETTINGS = {
    "sae-lens": ("default", "bf16", "compile", "bf16+compile"),
    "sparsify": ("default", "adam", "compile", "bf16", "adam+bf16", "bf16+compile"),
    "dictionary_learning": ("default", "bf16", "compile", "bf16+compile"),
    "torch": ("default", "fused", "fused+compile", "bf16", "bf16+fused", "bf16+fused+compile"),
}
ARCHITECTURES = {
    "sae-lens": ("TopK", "BatchTopK", "JumpReLU"),
    "sparsify": ("TopK",),
    "dictionary_learning": ("TopK", "BatchTopK", "JumpReLU"),
    "torch": ("TopK", "BatchTopK", "JumpReLU"),
}


def settings_of(peer: str, arch: str, bf16: bool) -> tuple[str, ...]:
    """Settings to try; the first is the peer's default.

    bf16: whether the processor multiplies bf16. If not, a bf16 step takes seconds (LOG.md) and is not tried.
    """
    sparse = ("sparse",) if (peer, arch) == ("sae-lens", "TopK") else ()
    return tuple(name for name in (*SETTINGS[peer], *sparse) if bf16 or "bf16" not in name.split("+"))


class Weights:
    """The initial state, in a peer's layout; `layout` "io" stores the encoder as (d_in, d_sae)."""

    def __init__(self, inputs: dict[str, Tensor]):
        self.params, self.m, self.v = (
            {name: inputs[f"{part}.{name}"] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_pre")}
            for part in ("params", "m", "v")
        )
        self.step = float(inputs["step"])
        self.d_sae, self.d_in = self.params["W_enc"].shape

    def biases(self, centred: bool) -> tuple[Tensor, Tensor]:
        """(b_enc, b_dec) of an SAE with one decoder bias, which its encoder subtracts from x (`centred`) or not."""
        p = self.params
        shift = p["W_enc"] @ (p["b_dec"] if centred else -p["b_pre"])
        return p["b_enc"] + shift, p["b_dec"] + p["b_pre"]

    def put(self, optimizer: torch.optim.Optimizer | None, matrices: dict[str, nn.Parameter], flipped: str) -> None:
        """Copy both matrices into a peer's parameters and their moments into its Adam; one in `flipped` transposed."""
        fused = optimizer is not None and optimizer.param_groups[0].get("fused")
        for name, parameter in matrices.items():
            turn = (lambda t: t.T) if name == flipped else (lambda t: t)
            with torch.no_grad():
                parameter.copy_(turn(self.params[name]))
            if optimizer is not None:
                optimizer.state[parameter] = {
                    "step": torch.tensor(self.step, device=parameter.device if fused else "cpu"),
                    "exp_avg": torch.empty_like(parameter).copy_(turn(self.m[name])),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(turn(self.v[name])),
                }


class Peer:
    def __init__(self, spec: dict):
        self.spec, self.arch, self.k = spec, spec["arch"], spec["k"]
        self.flags = set(spec["setting"].split("+")) - {"default"}
        self.device = spec.get("device", "cpu")
        self.facts: dict = {}

    @property
    def precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if "bf16" in self.flags else contextlib.nullcontext()


class SaeLens(Peer):
    """`SAETrainer.step` on the library's training SAEs; `compile` and `bf16` are its own options."""

    def __init__(self, spec: dict):
        super().__init__(spec)
        import sae_lens

        self.classes = {
            "TopK": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
            "BatchTopK": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
            "JumpReLU": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig),
        }[self.arch]

    def __call__(self, inputs: dict[str, Tensor]) -> SaeLens:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        weights = Weights(inputs)
        options = {} if self.arch == "JumpReLU" else {"k": self.k}
        if "sparse" in self.flags:
            # its decoder norms' backward fails on sparse activations on a CPU
            options |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        make, configure = self.classes
        self.sae = make(configure(d_in=weights.d_in, d_sae=weights.d_sae, device=self.device, **options))
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=self.spec["batch"],
            lr=LR,
            lr_end=LR,
            device=self.device,
            autocast="bf16" in self.flags,
        )
        self.trainer = SAETrainer(cfg=config, sae=self.sae, data_provider=iter(()))
        matrices = {"W_enc": self.sae.W_enc, "W_dec": self.sae.W_dec}
        weights.put(self.trainer.optimizer, matrices, flipped="W_enc")
        b_enc, b_dec = weights.biases(centred=bool(self.sae.cfg.apply_b_dec_to_input))
        self.sae.b_enc.data.copy_(b_enc)
        self.sae.b_dec.data.copy_(b_dec)
        if self.arch == "JumpReLU":
            self.sae.threshold.data.fill_(self.spec["theta"])
        if "compile" in self.flags:
            self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass)
        return self

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        with self.precision:
            z = self.sae.encode(x)
            return self.sae.decode(z), _active(z)


class Sparsify(Peer):
    """The step inside sparsify's `Trainer.fit`, from the library's parts, without the language model that it runs."""

    def __init__(self, spec: dict):
        super().__init__(spec)
        import sparsify  # noqa: F401

    def __call__(self, inputs: dict[str, Tensor]) -> Sparsify:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        weights = Weights(inputs)
        config = SparseCoderConfig(num_latents=weights.d_sae, k=self.k)
        self.sae = SparseCoder(weights.d_in, config, dtype=torch.float32, device=self.device)
        adam = torch.optim.Adam(self.sae.parameters(), lr=LR) if "adam" in self.flags else None
        weights.put(adam, {"W_enc": self.sae.encoder.weight, "W_dec": self.sae.W_dec}, flipped="")
        b_enc, b_dec = weights.biases(centred=True)
        self.sae.encoder.bias.data.copy_(b_enc)
        self.sae.b_dec.data.copy_(b_dec)
        if adam is None:
            self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=LR), momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = adam
        self.silent_for = torch.zeros(weights.d_sae, dtype=torch.long, device=self.device)
        if "compile" in self.flags:
            self.sae.compile()
        return self

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        with self.precision:
            out = self.sae(x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.silent_for += len(x)
        self.silent_for[fired] = 0

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        with self.precision:
            acts, latents, _ = self.sae.encode(x)
            return self.sae.decode(acts, latents), _active(acts)


class DictionaryLearning(Peer):
    """`update` of the library's trainers. Its own loop has autocast on GPUs only; a user can wrap `update` in it."""

    def __init__(self, spec: dict):
        super().__init__(spec)
        from dictionary_learning.trainers import batch_top_k, jumprelu, top_k

        self.make = {
            "TopK": top_k.TopKTrainer,
            "BatchTopK": batch_top_k.BatchTopKTrainer,
            "JumpReLU": jumprelu.JumpReluTrainer,
        }[self.arch]

    def __call__(self, inputs: dict[str, Tensor]) -> DictionaryLearning:
        weights, jump = Weights(inputs), self.arch == "JumpReLU"
        sparsity = {"target_l0": float(self.k)} if jump else {"k": self.k}
        shape = {"activation_dim": weights.d_in, "dict_size": weights.d_sae}
        self.trainer = self.make(steps=10**6, layer=0, lm_name="none", lr=LR, device=self.device, **shape, **sparsity)
        sae = self.sae = self.trainer.ae
        b_enc, b_dec = weights.biases(centred=not jump)
        if jump:
            matrices, b_enc_of, flipped = {"W_enc": sae.W_enc, "W_dec": sae.W_dec}, sae.b_enc, "W_enc"
            sae.threshold.data.fill_(self.spec["theta"])
        else:
            matrices, b_enc_of, flipped = {"W_enc": sae.encoder.weight}, sae.encoder.bias, "W_dec"
            matrices["W_dec"] = sae.decoder.weight
        weights.put(self.trainer.optimizer, matrices, flipped)
        b_enc_of.data.copy_(b_enc)
        sae.b_dec.data.copy_(b_dec)
        if "compile" in self.flags:
            self.trainer.loss = torch.compile(self.trainer.loss)
        return self

    def step(self, x: Tensor) -> None:
        with self.precision:
            self.trainer.update(STEP, x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        with self.precision:
            z = self.sae.encode(x) if self.arch != "BatchTopK" else self.sae.encode(x, use_threshold=False)
            return self.sae.decode(z), _active(z)


class Plain(Peer):
    """The published class in a plain torch loop: Adam, mean squared error, decoder columns to unit norm."""

    def __init__(self, spec: dict):
        super().__init__(spec)
        sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
        from published import CLASSES

        self.make = CLASSES[self.arch]

    def __call__(self, inputs: dict[str, Tensor]) -> Plain:
        weights = Weights(inputs)
        sparsity = {"threshold": self.spec["theta"]} if self.arch == "JumpReLU" else {"k": self.k}
        sae = self.sae = self.make(weights.d_in, weights.d_sae, **sparsity).to(self.device)
        fused = True if "fused" in self.flags else None
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=fused)
        weights.put(self.optimizer, {"W_enc": sae.encoder.weight, "W_dec": sae.decoder.weight}, flipped="W_dec")
        own = {"b_enc": sae.encoder.bias, "b_dec": sae.decoder.bias, "b_pre": sae.b_pre}
        for name, parameter in own.items():
            parameter.data.copy_(weights.params[name])
        if "compile" in self.flags:
            sae.compile()
        return self

    def step(self, x: Tensor) -> None:
        with self.precision:
            loss = nn.functional.mse_loss(self.sae(x), x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.sae.decoder.weight.div_(self.sae.decoder.weight.norm(dim=0, keepdim=True))

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        with self.precision:
            z = self.sae.encode(x)
            return self.sae.decoder(z) + self.sae.b_pre, _active(z)


def _active(z: Tensor) -> int:
    return int((z.to_dense() > 0).sum())


CONTENDERS: dict[str, Callable[[dict], Peer]] = {
    "sae-lens": SaeLens,
    "sparsify": Sparsify,
    "dictionary_learning": DictionaryLearning,
    "torch": Plain,
}
