"""The training loop of all recipes, resumable at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.run_config import RunConfig
from saegrid.core import checkpoint
from saegrid.core.row_statistics import Estimates, estimate
from saegrid.core.sae import SAE, fold_scale, initial_sae
from saegrid.core.thresholds import calibrated_factor, calibrated_threshold, rms_pre_acts, start_of_theta
from saegrid.data.store import Store
from saegrid.errors import ConfigError, DamagedError, SaegridError
from saegrid.kernels import Kernel
from saegrid.kernels.state import Params, StepSettings, TrainState
from saegrid.storage.atomic import write_text

CHECKPOINT = "checkpoint.safetensors"
DECAY = 0.2
"""Last share of the steps, over which a "linear" learning rate falls."""
LARGEST_AIM = 4.0
"""`Progress.aim` is clipped to the range from 1 / this to this."""
CHECKPOINT_SECONDS = 20.0
"""An epoch ends with a checkpoint only if the last one is older than this; the last epoch always does."""
CHECK_STEPS = 100
"""On a GPU, steps between two reads of the loss, which must be finite: each read waits for the device."""


@dataclass
class Progress:
    """State of a training: all that a checkpoint holds."""

    state: TrainState
    best: Params
    epoch: int = 0
    batch: int = 0  # batches of this epoch already taken
    sq_error: float | Tensor = 0.0  # of this epoch so far; on the device until it is read
    rows: int = 0  # of this epoch that steps have used so far
    active: int | Tensor = 0  # active (row, latent) pairs of this epoch so far
    best_val_mse: float = math.inf
    best_epoch: int = -1
    aim: float = 1.0  # ratio of training L0 to held-out L0: ReLU's training aims at aim * K
    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of training, over all resumes
    _since: float = field(default_factory=time.perf_counter)

    def lap(self) -> None:
        """Add the time since the last lap to `seconds`."""
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now


@dataclass(frozen=True)
class _Run:
    """What all epochs of a run share."""

    config: RunConfig
    store: Store
    kernel: Kernel
    matmul: str
    sae: SAE
    found: Estimates
    start: Tensor | None  # initial value of the weights that `freeze` holds
    path: Path  # the checkpoint
    report: Callable[[int], None]

    @property
    def steps(self) -> int:
        return self.config.epochs * math.ceil(self.store.epoch_rows / self.config.batch_size)


def train(
    config: RunConfig,
    store: Store,
    kernel: Kernel,
    run_dir: Path,
    matmul: str = "fp32",
    report: Callable[[int], None] = lambda rows: None,
    device: str = "cpu",
) -> tuple[SAE, Progress]:
    """Train one SAE, resuming from the run's last checkpoint if there is one.

    Each step runs Adam on the mean squared error, with a learning rate per step, and resets decoder rows to unit norm.
    The weights of the epoch with the lowest validation MSE are kept; validation uses the training rule (BatchTopK cuts
    each validation batch). ReLU, whose L0 is free, keeps those of the last epoch.
    BatchTopK's cut, or the factor on trained thetas, is then calibrated on validation rows. With `act_scale`,
    everything, checkpoints included, is in the units of the scaled rows, and the scale is folded into the weights at
    the end; so are Gated's two encoders into one. With sinks apart, no step sees the sinks that are set apart.

    Args:
        report: called with the row count of each batch, and once with the rows done before a resume.
        device: device of the steps and of the returned SAE, "cpu" or "cuda".

    Returns:
        The SAE with the kept weights, and the loop's final state with the learning curve.

    Raises:
        SaegridError: the loss is no longer finite; the message names the step, or on a GPU the range of steps.
        ConfigError: `batch_size` is larger than the number of training rows.
    """
    if config.batch_size > store.epoch_rows:
        raise ConfigError(f"batch_size = {config.batch_size}: at most the {store.epoch_rows} training rows")
    found = estimate(config, store)
    sae = initial_sae(config, store.d_in, found.mean, found.sink)
    sae.threshold /= found.scale
    if config.threshold and config.threshold_unit == "rms":
        rows = next(store.batches("train", config.batch_size))
        sae.threshold = config.threshold * rms_pre_acts(sae.params, rows / found.scale)
    if config.trains_theta or config.presses_l1:
        rows = next(store.batches("train", config.batch_size, config.seed))
        cut = start_of_theta(sae.params, rows / found.scale, config.k)
        sae.theta.fill_(cut)
        if config.presses_l1:
            sae.b_enc.sub_(cut)
    sae.to(device)
    held = sae.W_enc if config.freeze == "encoder" else sae.W_dec
    start = None if config.freeze == "none" else held.data.clone()
    path = run_dir / CHECKPOINT
    progress = _resumed(path, sae, config.run_id, store.data_sha256)
    progress = progress or Progress(TrainState.start(sae.params), _copy(sae.params))
    report(progress.epoch * store.epoch_rows + min(progress.batch * config.batch_size, store.epoch_rows))
    run = _Run(config, store, kernel, matmul, sae, found, start, path, report)
    while progress.epoch < config.epochs:
        _epoch(run, progress)
        _validate(run, progress)
        write_text(run_dir / "metrics.jsonl", "".join(json.dumps(point) + "\n" for point in progress.curve))
        if progress.epoch == config.epochs or time.perf_counter() - progress._since > CHECKPOINT_SECONDS:
            save_checkpoint(path, progress, config.run_id, store.data_sha256)
    for weights, best in zip(sae.params, progress.best, strict=True):
        weights.copy_(best)
    sae.finish()
    fold_scale(sae, found.scale)
    if ARCHITECTURES[sae.arch].batch_cut:
        sae.inference_threshold = calibrated_threshold(sae, store, config.batch_size, kernel)
    elif config.trains_theta:
        sae.theta.mul_(calibrated_factor(sae.params, config.k, store, config.batch_size, kernel))
    progress.lap()
    return sae, progress


def _resumed(path: Path, sae: SAE, run_id: str, data_sha256: str) -> Progress | None:
    """Load the run's checkpoint; report and delete a damaged one, so that the run starts again."""
    try:
        return load_checkpoint(path, sae, run_id, data_sha256)
    except DamagedError as error:
        print(f"{error}; the run starts again", flush=True)
        path.unlink(missing_ok=True)
        return None


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """Learning rate: rises over the first `warmup` share of steps, then follows `lr_schedule` to `lr * lr_final`."""
    floor = config.lr * config.lr_final
    if config.lr_schedule == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * step / steps))
    else:
        share = min(1.0, (steps - step) / (DECAY * steps))
    rise = min(1.0, (step + 1) / (config.warmup * steps)) if config.warmup else 1.0
    return rise * (floor + (config.lr - floor) * share)


def _epoch(run: _Run, progress: Progress) -> None:
    """Train on the remaining rows of the epoch."""
    config, store, sae, found = run.config, run.store, run.sae, run.found
    state, seen = progress.state, progress.state.step
    settings = step_settings(config, store, run.matmul)._replace(start=run.start)
    if found.sink is not None:
        settings = settings._replace(sink=found.sink.to(sae.device))
    rule = sae.training_rule
    if sae.l0_is_free:
        rule = rule._replace(aim=progress.aim)
    batches = store.epoch(
        config.batch_size,
        config.seed,
        progress.epoch,
        start=progress.batch,
        device=sae.device,
        keep=None if found.sink is None else found.to_train_on,
    )
    for x in batches:
        done = progress.batch * config.batch_size
        progress.batch += 1
        run.report(min(config.batch_size, store.epoch_rows - done))
        if not len(x):
            continue
        if found.scale != 1:
            x = x / found.scale
        lr = learning_rate(config, state.step, run.steps)
        loss, active = run.kernel.train_step(state, x, rule, settings._replace(lr=lr))
        progress.sq_error = progress.sq_error + loss * x.numel() * found.scale**2
        progress.rows += len(x)
        progress.active = progress.active + active
        at_checkpoint = state.step % config.checkpoint_steps == 0
        if at_checkpoint or isinstance(loss, float) or state.step - seen >= CHECK_STEPS:
            _read_loss(config, progress, seen)
            seen = state.step
        if at_checkpoint:
            save_checkpoint(run.path, progress, config.run_id, store.data_sha256)
    _read_loss(config, progress, seen)


def step_settings(config: RunConfig, store: Store, matmul: str) -> StepSettings:
    """Settings that all steps of a run share."""
    d_sae = config.expansion * store.d_in
    return StepSettings(
        config.lr,
        config.grad_clip,
        config.project_grad is True,
        "bf16" if matmul == "bf16" else "fp32",
        aux_coef=config.aux_coef,
        aux_k=max(1, store.d_in // 2),
        dead_after=math.ceil(config.dead_window * config.epochs * store.epoch_rows),
        prefixes=tuple(d_sae >> halvings for halvings in reversed(range(config.prefixes))),
        bandwidth=config.bandwidth,
        l0_coef=config.l0_coef,
        l1_coef=config.l1_coef,
        tie=config.encoder_tie,
        theta_tie=config.theta_tie,
        batch_size=config.batch_size,
        freeze=config.freeze,
    )


def _read_loss(config: RunConfig, progress: Progress, seen: int) -> None:
    """Read the device's sums, and check that the loss of all steps after step `seen` is finite."""
    progress.sq_error, progress.active = float(progress.sq_error), int(progress.active)
    if not math.isfinite(progress.sq_error):
        step = progress.state.step
        where = f"at step {step}" if step == seen + 1 else f"at one of the steps {seen + 1} to {step}"
        raise SaegridError(f"lr = {config.lr:g}: the loss is {progress.sq_error} {where}; try a smaller one")


def _validate(run: _Run, progress: Progress) -> None:
    """End an epoch: compute validation MSE with the training rule, extend the learning curve, keep the best weights."""
    config, store, kernel, sae, scale = run.config, run.store, run.kernel, run.sae, run.found.scale
    params, rule = sae.trained_form(progress.state.params)
    if config.trains_theta:
        factor = calibrated_factor(params, config.k, store, config.batch_size, kernel, scale)
        params = params._replace(theta=params.theta * factor)
    sq_error, active = 0.0, 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.device)
    for x in store.batches("val", config.batch_size, device=sae.device):
        x = x / scale if scale != 1 else x
        codes = kernel.encode(params, x, rule)
        sq_error += (kernel.decode(params, codes) - x).double().square().sum().item() * scale**2
        active += len(codes.values)
        fired[codes.latents.long()] = True
    train_l0, val_l0 = int(progress.active) / progress.rows, active / store.n_val
    if sae.l0_is_free and active:
        progress.aim = min(LARGEST_AIM, max(1 / LARGEST_AIM, train_l0 / val_l0))
    val_mse = sq_error / (store.n_val * store.d_in)
    if not math.isfinite(val_mse):
        raise SaegridError(
            f"lr = {config.lr:g}: the validation loss is {val_mse} at step {progress.state.step}; try a smaller one"
        )
    progress.curve.append(
        {
            "epoch": progress.epoch,
            "step": progress.state.step,
            "rows": (progress.epoch + 1) * store.epoch_rows,
            "lr": learning_rate(config, progress.state.step, run.steps),
            "train_mse": float(progress.sq_error) / (progress.rows * store.d_in),
            "val_mse": val_mse,
            "train_l0": train_l0,
            "val_l0": val_l0,
            "val_dead_pct": 100 * (~fired).double().mean().item(),
        }
    )
    if val_mse < progress.best_val_mse or sae.l0_is_free:  # with a free L0, the densest has the lowest error
        progress.best, progress.best_val_mse = _copy(progress.state.params), val_mse
        progress.best_epoch = progress.epoch
    progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.sq_error, progress.rows, progress.active = 0.0, 0, 0


def save_checkpoint(path: Path, progress: Progress, run_id: str, data_sha256: str) -> None:
    """Write all of `progress`. Raises `DiskError`; the previous checkpoint is then unchanged."""
    progress.lap()
    state = progress.state
    parts = {"weights": state.params, "m": state.m, "v": state.v, "best": progress.best}
    tensors = {f"{part}.{name}": t for part, params in parts.items() for name, t in params._asdict().items()}
    tensors["quiet"] = state.quiet
    facts = {"run_id": run_id, "data_sha256": data_sha256, "step": state.step, "l1": float(state.l1)}
    checkpoint.write(path, tensors, facts | {"plain": plain(progress)})


def plain(progress: Progress) -> dict[str, Any]:
    """The fields of `progress` that a checkpoint holds besides tensors."""
    return {name: value for name, value in vars(progress).items() if name not in ("state", "best", "_since")}


def load_checkpoint(path: Path, sae: SAE, run_id: str, data_sha256: str) -> Progress | None:
    """Load a checkpoint: its progress, with its weights copied into the SAE's tensors; None if there is no file.

    Raises:
        DamagedError: the file is damaged, has other shapes, or belongs to another run or other rows.
    """
    if not path.exists():
        return None
    tensors, facts = checkpoint.read(path)
    try:
        if facts["run_id"] != run_id:
            raise DamagedError(f"{path}: damaged checkpoint (of the run {facts['run_id']})")
        if facts["data_sha256"] != data_sha256:
            raise DamagedError(f"{path}: a checkpoint on other rows than the store has now")
        weights, m, v, best = (
            Params(*(_like(tensors, f"{part}.{name}", old) for name, old in sae.params._asdict().items()))
            for part in ("weights", "m", "v", "best")
        )
        quiet = tensors["quiet"].reshape(sae.b_enc.shape).to(sae.device)
        progress = Progress(TrainState(sae.params, m, v, facts["step"], quiet, facts["l1"]), best)
        for name in plain(progress):
            setattr(progress, name, facts["plain"][name])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DamagedError(f"{path}: damaged checkpoint ({error!r})") from None
    for target, saved in zip(sae.params, weights, strict=True):
        target.copy_(saved)
    return progress


def _like(tensors: dict[str, Tensor], name: str, old: Tensor) -> Tensor:
    """A checkpoint's tensor in the shape and on the device of `old`; a copy of `old` if that is empty."""
    return tensors[name].reshape(old.shape).to(old.device) if old.numel() else old.clone()


def _copy(params: Params) -> Params:
    return Params(*(tensor.clone() for tensor in params))
