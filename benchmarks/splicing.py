"""Contenders of the splice race: the loss with an SAE spliced in, by this project and by SAELens' `run_evals`.

A step evaluates one SAE of a list on the same packed contexts; the losses come with the contender's last answer and
show that both measure the same. Loading models and SAEs is not timed on either side.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Splice:
    """What both contenders share: a sequence of SAEs, and their losses in nats per token."""

    def __init__(self, spec: dict):
        self.spec, self.losses, self.count = spec, {}, 0
        self.facts: dict = {}

    def step(self, tokens: Tensor) -> None:
        place = self.count % len(self.saes)
        self.losses[place] = self.evaluate(self.saes[place], tokens)
        self.count += 1

    @property
    def found(self) -> dict:
        return {"losses": [self.losses[place] for place in sorted(self.losses)]}


class Ours(Splice):
    """`splice.evaluate` after one `splice.make_references`, whose passes all SAEs share; its time is in `found`."""

    def __call__(self, inputs: dict[str, Tensor]) -> Ours:
        from saegrid import kernels, load_sae
        from saegrid.config.run_config import make_config
        from saegrid.data.language_model import load_lm

        spec = self.spec
        kernels.set_threads(spec["threads"])
        self.kernel = kernels.load(kernels.choose("auto", "auto", spec["threads"]).kernel)
        dtype = {"default": "float32", "bf16": "bfloat16"}[spec["setting"]]
        self.lm = load_lm(make_config(**spec["config"] | {"lm_dtype": dtype}))
        self.saes = [load_sae(folder) for folder in spec["saes"]["saegrid"]]
        self.mean, self.baseline, self.baseline_ms = inputs["mean"], None, []
        self.facts = {"lm_dtype": dtype}
        return self

    def evaluate(self, sae, tokens: Tensor) -> dict[str, float]:
        from saegrid.core.splice import evaluate, mean_losses

        if self.count % len(self.saes) == 0:
            self.baseline = self._timed_baseline(tokens)
        layer = self.spec["config"]["layer"]

        def replace(x: Tensor) -> Tensor:
            return self.kernel.decode(sae.params, sae.codes(x, self.kernel))

        return mean_losses(evaluate(self.lm, self.baseline, layer, replace))

    def _timed_baseline(self, tokens: Tensor):
        from saegrid.core.splice import make_references
        from saegrid.data.prompts import Prompt

        started = time.perf_counter()
        prompts = [Prompt(row.tolist(), template=index) for index, row in enumerate(tokens)]
        baseline = make_references(self.lm, prompts, self.spec["config"]["layer"], self.mean)
        self.baseline_ms.append(1e3 * (time.perf_counter() - started))
        return baseline

    @property
    def found(self) -> dict:
        return super().found | {"baseline_ms": min(self.baseline_ms)}


class RunEvals(Splice):
    """SAELens' `run_evals` with its cross-entropies only, on transformers' language model."""

    def __call__(self, inputs: dict[str, Tensor]) -> RunEvals:
        from sae_lens import SAE
        from sae_lens.load_model import load_model

        hook = f"model.layers.{self.spec['config']['layer']}"
        self.model = load_model("AutoModelForCausalLM", self.spec["model_folder"], device="cpu", hook_names=[hook])
        self.saes = [SAE.load_from_disk(folder) for folder in self.spec["saes"]["saelens"]]
        for sae in self.saes:
            sae.cfg.metadata.hook_name = hook
        return self

    def evaluate(self, sae, tokens: Tensor) -> dict[str, float]:
        from datasets import Dataset
        from sae_lens.evals import EvalConfig, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler
        from sae_lens.training.activations_store import ActivationsStore

        n, length = tokens.shape
        store = ActivationsStore.from_sae(
            self.model,
            sae,
            dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
            context_size=length,
            streaming=False,
            store_batch_size_prompts=n,
        )
        config = EvalConfig(batch_size_prompts=n, n_eval_reconstruction_batches=1, compute_ce_loss=True)
        with torch.no_grad():
            metrics, _ = run_evals(sae, store, self.model, ActivationScaler(), config, exclude_special_tokens=False)
        losses = metrics["model_performance_preservation"]
        names = {"clean": "without_sae", "spliced": "with_sae", "zero": "with_ablation"}
        return {name: losses[f"ce_loss_{theirs}"] for name, theirs in names.items()}


CONTENDERS = {"saegrid": Ours, "sae-lens": RunEvals}
