"""One grid point from parameters to metrics: what `notebooks/train.ipynb` calls, step by step."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import platform
import time
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import saegrid
from saegrid import kernels
from saegrid.activations import collect, open_store
from saegrid.atomic import replacing, write_json
from saegrid.config import RunConfig, make_config
from saegrid.errors import SaegridError
from saegrid.fetch import waiting_lock
from saegrid.files import load_folder, save_sae
from saegrid.lm import lm_shape, load_lm
from saegrid.metrics import SINK_RATIO, Reconstruction, median_norm, splice_metrics
from saegrid.prompts import make_prompts
from saegrid.sae import SAE, JumpReLU
from saegrid.splice import evaluate, load_baseline, make_baseline, mean_losses, save_baseline
from saegrid.store import Store
from saegrid.train import rms_pre_acts, train

CODE = (
    *(
        "activations.py",
        "embedded.py",
        "estimates.py",
        "fetch.py",
        "files.py",
        "lm.py",
        "metrics.py",
        "prompts.py",
        "published.py",
    ),
    *("recipes.py", "run.py", "sae.py", "splice.py", "store.py", "train.py", "transfer.py", "kernels"),
)
"""Sources whose change can change a run's result: their hash is the run's code version."""


def prepare_store(config: RunConfig) -> Store:
    """The activation store of a run, with the splice's baseline: made where missing, else opened and checked."""
    config.check_shape(*lm_shape(config))
    folder = collect(config)
    with waiting_lock(folder / ".baseline.lock"):
        if load_baseline(folder) is None:
            store = open_store(config)
            lm = load_lm(config)
            prompts = make_prompts(config, lm.tokenizer)["eval"]
            save_baseline(make_baseline(lm, prompts, config.layer, store.mean), folder)
    return open_store(config)


class Run:
    """A run and its folder `runs/<run_id>`, held under an exclusive lock.

    A finished run is loaded, an interrupted one goes on from its last checkpoint with the kernel, precision and
    thread count that it began with.

    Raises:
        ConfigError: the kernel does not run here.
    """

    def __init__(self, config: RunConfig):
        self.folder = Path(config.runs_dir) / config.run_id
        self._lock = contextlib.ExitStack()  # held until the process ends, or `close`
        self._lock.enter_context(waiting_lock(self.folder / ".lock"))
        self.run_id = config.run_id
        self.config = self._resolved(config)
        self.times: dict[str, float] = {}
        self.sae: SAE | None = None
        self.best_epoch = -1

    def close(self) -> None:
        """The run is done: drop its checkpoint and let another process have it."""
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        self._lock.close()

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    @cached_property
    def kernel(self):
        kernels.set_threads(self.config.threads)
        return kernels.load(self.config.kernel)

    @property
    def device(self) -> str:
        """Where the run's tensors lie, "cpu" or "cuda"."""
        return kernels.device(self.config.kernel)

    @cached_property
    def store(self) -> Store:
        kernels.set_threads(self.config.threads)
        started = time.perf_counter()
        store = prepare_store(self.config)
        self.times["collect_seconds"] = time.perf_counter() - started
        return store

    @property
    def curve(self) -> pd.DataFrame:
        """The learning curve: a row per epoch."""
        return pd.read_json(self.folder / "metrics.jsonl", lines=True)

    @property
    def metrics(self) -> pd.Series:
        """The run's row of the tidy table."""
        return pd.Series(json.loads((self.folder / "metrics.json").read_text(encoding="utf-8")))

    @property
    def latents(self) -> pd.DataFrame:
        """Firing of each latent on the validation rows: latent, fired, mean_act, max_act."""
        return pd.read_csv(self.folder / "latents.csv")

    @property
    def positions(self) -> pd.DataFrame:
        """Squared error by token position: position, n_rows, sq_error, sq_norm_centred."""
        return pd.read_csv(self.folder / "positions.csv")

    def train(self) -> SAE:
        """Train, or load what a finished run saved."""
        if self.finished:
            self.sae = load_folder(self.folder).to(self.device)
            return self.sae
        rows = self.config.epochs * self.store.n_train  # a missing store is collected here, and timed apart
        started = time.perf_counter()
        with tqdm(total=rows, unit="row", unit_scale=True, desc=self.config.name, mininterval=1.0) as bar:
            self.sae, progress = train(
                self.config, self.store, self.kernel, self.folder, self.config.matmul, bar.update, self.device
            )
        self.best_epoch = progress.best_epoch
        self.times["train_seconds"] = time.perf_counter() - started
        self.times["train_rows_per_second"] = rows / self.times["train_seconds"]
        return self.sae

    def evaluate(self) -> pd.Series:
        """Reconstruction and splice metrics; saves the SAE and, last, `metrics.json`."""
        if self.finished:
            return self.metrics
        started = time.perf_counter()
        rows, latents, positions = evaluate_rows(self.sae, self.store, self.config.batch_size, self.kernel)
        sums, l0_eval = self._splice()
        self.sae.cpu()
        cfg = {**self.config.identity(), "run_id": self.run_id, "code_version": code_version()}
        cfg = {name: value for name, value in cfg.items() if name not in ("arch", "k", "threshold")}
        weights = save_sae(self.sae, self.folder, self.config.name, cfg)
        for name, frame in (("latents", latents), ("positions", positions), ("prompts", sums)):
            with replacing(self.folder / f"{name}.csv") as path:
                frame.to_csv(path, index=False)
        self.times["eval_seconds"] = time.perf_counter() - started
        self._write_times()
        row = self._row(rows | {"l0_eval": l0_eval} | splice_metrics(**mean_losses(sums)), sums, weights)
        write_json(self.folder / "metrics.json", row)
        return self.metrics

    def _splice(self) -> tuple[pd.DataFrame, float]:
        baseline = load_baseline(self.store.folder)
        lm = load_lm(self.config)
        active = rows = 0

        def replace(x: Tensor) -> Tensor:
            nonlocal active, rows
            codes = self.sae.codes(x.to(self.sae.device), self.kernel)
            active, rows = active + len(codes.values), rows + len(x)
            return self.kernel.decode(self.sae.params, codes)

        return evaluate(lm, baseline, self.config.layer, replace), active / rows

    def _row(self, measured: dict, sums: pd.DataFrame, weights: str) -> dict:
        config, sae, curve = self.config, self.sae, self.curve
        best = curve[curve["epoch"] == self.best_epoch].iloc[0]
        sparsity = {"k": config.k or None, "threshold": config.threshold or None}
        row = {"run_id": self.run_id, "name": config.name, **config.identity(), **sparsity}
        row |= {"d_in": sae.d_in, "d_sae": sae.d_sae, "n_train_rows": self.store.n_train}
        row |= {"n_val_rows": self.store.n_val, "n_eval_prompts": len(sums), "n_eval_tokens": int(sums.n_tokens.sum())}
        row |= {"steps": int(curve["step"].max()), "best_epoch": self.best_epoch}
        row |= {"inference_threshold": sae.inference_threshold, "theta_over_rms": None}
        if isinstance(sae, JumpReLU):
            batch = next(self.store.batches("val", config.batch_size))
            row |= {"inference_threshold": sae.threshold}
            row |= {"theta_over_rms": sae.threshold / rms_pre_acts(sae.params, batch)}
        row |= {"val_mse_batch": float(best["val_mse"])} | measured
        row |= {"store_id": config.store_id, "data_sha256": self.store.data_sha256}
        row |= {"model_sha256": self.store.model_sha256, "weights_sha256": weights}
        row |= {"code_version": code_version(), "torch_version": torch.__version__}
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}

    def _write_times(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        times = {name: round(value, 3) for name, value in self.times.items()}
        facts = {"finished": now, "threads": self.config.threads, "cpu": processor()}
        if self.device == "cuda":
            facts["gpu"] = torch.cuda.get_device_name()
        write_json(self.folder / "timing.json", times | facts)

    def _resolved(self, config: RunConfig) -> RunConfig:
        """The config with kernel, precision and threads chosen: those of the first start, where there was one."""
        path = self.folder / "config.json"
        places = {"runs_dir": config.runs_dir, "store_dir": config.store_dir}
        if path.exists():
            try:
                return make_config(**json.loads(path.read_text(encoding="utf-8")) | places)
            except (TypeError, json.JSONDecodeError) as error:
                raise SaegridError(f"{path}: damaged; delete the folder to start the run again ({error})") from None
        choice = kernels.choose(config.kernel, config.matmul, config.threads, config.not_on_cuda)
        resolved = make_config(**config.model_dump() | choice._asdict())
        write_json(path, resolved.identity())
        return resolved


def evaluate_rows(sae: SAE, store: Store, batch_size: int, kernel) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """Metrics of the validation rows; firing of each latent; squared error by token position."""
    sink_norm = SINK_RATIO * median_norm(store.batches("val", batch_size, device=sae.device))
    sums = Reconstruction(sae.d_sae, sink_norm)
    errors = []
    for x in store.batches("val", batch_size, device=sae.device):
        codes = sae.codes(x, kernel)
        errors.append(sums.add(x, kernel.decode(sae.params, codes), codes))
    mean_act = (sums.act_sum / sums.fired.clamp_min(1)).numpy()
    latents = pd.DataFrame({"latent": range(sae.d_sae), "fired": sums.fired, "mean_act": mean_act})
    latents["max_act"] = sums.act_max
    mean = sums.every.mean
    batches = store.batches("val", batch_size, device=sae.device)
    centred = torch.cat([(x.double() - mean).square().sum(1) for x in batches])
    rows = pd.DataFrame({"position": store.meta("val")["positions"], "sq_error": torch.cat(errors).cpu()})
    rows["sq_norm_centred"] = centred.cpu()
    positions = rows.groupby("position").agg(
        n_rows=("sq_error", "size"), sq_error=("sq_error", "mean"), sq_norm_centred=("sq_norm_centred", "mean")
    )
    return sums.result(), latents, positions.reset_index()


def code_version() -> str:
    """Version of the package, with a hash of the sources that can change a result."""
    digest = hashlib.sha256()
    root = package_files(saegrid)
    for name in CODE:
        part = root / name
        for source in sorted(part.glob("*.py")) if part.is_dir() else [part]:
            digest.update(source.read_bytes())
    return f"{saegrid.__version__}+{digest.hexdigest()[:12]}"


def processor() -> str:
    """Name of the processor, for the record of times."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
