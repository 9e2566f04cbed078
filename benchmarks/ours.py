"""This project's contenders: its training step, and the floor, a lower bound on its time."""

from __future__ import annotations

import torch
from torch import Tensor

from saegrid import kernels
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

LR = 1e-4
RULES = {"TopK": "topk", "BatchTopK": "batchtopk", "JumpReLU": "threshold"}


def state_of(inputs: dict[str, Tensor]) -> TrainState:
    """The training state in a worker's input file."""
    parts = (Params(*(inputs[f"{part}.{name}"] for name in Params._fields)) for part in ("params", "m", "v"))
    return TrainState(*parts, int(inputs["step"]))


class Ours:
    """The training step as a run takes it: kernel and precision chosen for this machine ("auto"), or given."""

    def __init__(self, spec: dict, inputs: dict[str, Tensor]):
        setting = spec["setting"]
        kernel = "reference" if setting == "reference" else "auto"
        choice = kernels.choose(kernel, "fp32" if setting == "fp32" else "auto", spec["threads"])
        kernels.set_threads(choice.threads)
        self.kernel, self.settings = kernels.load(choice.kernel), StepSettings(LR, matmul=choice.matmul)
        self.state, self.rule = state_of(inputs), Rule(RULES[spec["arch"]], spec["k"], spec["theta"])
        self.facts = {"kernel": choice.kernel, "matmul": choice.matmul}

    def step(self, x: Tensor) -> None:
        self.kernel.train_step(self.state, x, self.rule, self.settings)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        codes = self.kernel.encode(self.state.params, x, self.rule)
        return self.kernel.decode(self.state.params, codes), len(codes.values)


class Product:
    """The encoder's matrix product alone, in the precision of the step."""

    def __init__(self, spec: dict, inputs: dict[str, Tensor]):
        matmul = kernels.choose("auto", "auto", spec["threads"]).matmul
        self.dtype = torch.bfloat16 if matmul == "bf16" else torch.float32
        self.weights = inputs["params.W_enc"].to(self.dtype).T
        self.out, self.x = torch.empty(0), {}
        self.facts = {"matmul": matmul}

    def step(self, x: Tensor) -> None:
        if len(self.out) != len(x):
            self.out = torch.empty(len(x), self.weights.shape[1], dtype=self.dtype)
            self.x = x.to(self.dtype)
        torch.mm(self.x, self.weights, out=self.out)


class Memory:
    """One read and one write of the parameters and of Adam's moments, at this machine's bandwidth."""

    def __init__(self, spec: dict, inputs: dict[str, Tensor]):
        state = [tensor.flatten() for name, tensor in inputs.items() if name != "step"]
        self.everything = torch.cat(state)
        self.facts = {"bytes": 2 * self.everything.numel() * self.everything.element_size()}

    def step(self, x: Tensor) -> None:
        self.everything.mul_(1.0)


def ours(spec: dict):
    return lambda inputs: Ours(spec, inputs)


def floor(spec: dict):
    return lambda inputs: {"product": Product, "memory": Memory}[spec["setting"]](spec, inputs)


CONTENDERS = {"saegrid": ours, "floor": floor}
