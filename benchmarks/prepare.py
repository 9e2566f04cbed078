"""What all contenders of a race share: rows of activations, weights after some steps of training, JumpReLU's theta."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from ours import LR, RULES
from safetensors.torch import save_file
from torch import Tensor

from saegrid import kernels
from saegrid.config.run_config import make_config
from saegrid.core.sae import initial_sae
from saegrid.data.store import Store
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

TRAIN_BATCH = 512
TIMED_BATCHES = 4
THETA_ROWS = 2048
ROWS = (
    "Training rows of the activation store, shuffled. Where d_in is not the model's own, each row x is x Q with one "
    "fixed Q of orthonormal rows (seed 0): norms, angles and the attention sink stay as they are, the rank too."
)


class Shape(NamedTuple):
    """What a step's cost depends on."""

    d_in: int
    expansion: int
    k: int
    batch: int

    @property
    def d_sae(self) -> int:
        return self.d_in * self.expansion

    def __str__(self) -> str:
        return f"d_in {self.d_in}, {self.expansion}x, K {self.k}, batch {self.batch}"


def real_rows(store: Store) -> Tensor:
    """The store's training rows, shuffled, float32 (n, d_in)."""
    rows = store.rows("train")
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def rows_of_width(rows: Tensor, d_in: int) -> Tensor:
    """Rows (n, d_in) made from rows of another width as `ROWS` says."""
    width = rows.shape[1]
    if width == d_in:
        return rows
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(max(width, d_in), min(width, d_in), generator=generator))
    return rows @ (basis.T if d_in > width else basis)


def trained(rows: Tensor, shape: Shape, arch: str, steps: int, theta: float = 0.0, **recipe: Any) -> TrainState:
    """The state after `steps` steps of this project's training, batches of 512 rows; `recipe` as in `RunConfig`."""
    config = make_config(expansion=shape.expansion, **{"arch": "TopK", "k": shape.k or 1, "lr": LR} | recipe)
    state = TrainState.start(initial_sae(config, shape.d_in, rows.mean(0)).params)
    choice = kernels.choose("auto", "auto", torch.get_num_threads())
    kernel, settings = kernels.load(choice.kernel), StepSettings(config.lr, matmul=choice.matmul)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (TRAIN_BATCH,), generator=generator)]
        kernel.train_step(state, batch, Rule(RULES[arch], shape.k, theta), settings)
    state.workspace.clear()
    return state


def theta_for(params: Params, rows: Tensor, shape: Shape) -> float:
    """The theta with K pre-activations per row above it, over the timed batches (the first 2,048 rows at most)."""
    x, k = rows[: min(THETA_ROWS, TIMED_BATCHES * shape.batch)], shape.k
    pre = torch.addmm(params.b_enc, x - params.b_pre, params.W_enc.T).flatten()
    return max(0.0, pre.kthvalue(len(pre) - k * len(x)).values.item())


def write_inputs(path: Path, state: TrainState, rows: Tensor, batch: int) -> None:
    """A worker's input file: weights, moments, step, and batches x (TIMED_BATCHES, batch, d_in)."""
    count = TIMED_BATCHES * batch
    x = rows.repeat(-(-count // len(rows)), 1)[:count].reshape(TIMED_BATCHES, batch, -1).contiguous()
    tensors = {"x": x, "step": torch.tensor(state.step)}
    for part in ("params", "m", "v"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(state, part)._asdict().items()}
    save_file(tensors, path)
