"""One grid point from parameters to metrics: what `notebooks/train.ipynb` calls, step by step."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

import saegrid
from saegrid import kernels
from saegrid.config.architectures import ARCHITECTURES
from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.evaluation import evaluate_rows, on_prompts, spliced
from saegrid.core.sae import SAE
from saegrid.core.splice import load_references, make_references, save_references
from saegrid.core.thresholds import rms_pre_acts
from saegrid.core.train import CHECKPOINT, train
from saegrid.data.collect import check_prompts, collect, open_store, store_folder
from saegrid.data.language_model import check_tokens, lm_shape, load_lm
from saegrid.data.prompts import make_prompts
from saegrid.data.published_activations import published_files
from saegrid.data.sources import check_made_from, check_sources, pinned
from saegrid.data.store import Store
from saegrid.errors import DamagedError, SaegridError, StoreError
from saegrid.experiment.finished_run import METRICS, NOTEBOOK, SET_ASIDE, check_run, load_config, load_run
from saegrid.experiment.preflight import check
from saegrid.formats.run_folder import load_folder, save_sae
from saegrid.storage.atomic import sweep, write_bytes, write_text
from saegrid.storage.checksums import read_sealed, sum_of, write_sealed, write_sums
from saegrid.storage.locks import waiting_lock
from saegrid.storage.processes import die_with_papermill

CODE = ("config", "core", "data", "experiment", "kernels")
"""Folders whose sources can change a run's result: their hash is in the run's code version."""


def prepare_store(config: RunConfig, also: Iterable[RunConfig] = ()) -> Store:
    """The activation store of a run, with the splice's reference passes: made if missing, else opened and checked.

    `also`: runs whose stores may be made in the same pass of the model (`collect`).
    """
    config.check_shape(*lm_shape(config))
    folder = collect(config, also=also)
    with waiting_lock(folder / ".baseline.lock"):
        sweep(folder)
        store = open_store(config)
        _check_varied(config, store)
        if not _has_references(store):
            same = pinned(config, store.manifest)
            lm = load_lm(same)
            prompts = make_prompts(same, lm.tokenizer)
            check_tokens(config, lm, (prompt.tokens for prompt in prompts["eval"]))
            check_prompts(store, prompts)
            references = make_references(lm, prompts["eval"], config.layer, store.mean, config.site)
            save_references(references, folder, store.data_sha256)
    return store


def _check_varied(config: RunConfig, store: Store) -> None:
    """Raises `StoreError` if all rows are equal: without variance to explain, a metric would be 0 / 0."""
    for split, facts in store.manifest["statistics"].items():
        if not facts["sq_norm_centred"] > 1e-12 * facts["max_norm"] ** 2:
            name = "activations" if config.activations else f"{split}_tokens"
            rows = f"the {facts['rows']} {split} rows are all the same: there is nothing to train on or to measure"
            raise StoreError(f"{name} = {getattr(config, name)!r}: {rows}")


def _has_references(store: Store) -> bool:
    """Whether the store has intact reference passes; damaged ones are reported, and made again."""
    try:
        return load_references(store.folder, store.data_sha256) is not None
    except StoreError as error:
        print(f"{error}; it is made again", flush=True)
        return False


class Run:
    """A run and its folder `runs/<run_id>`, under an exclusive lock.

    A finished run is loaded; an interrupted one resumes from its last checkpoint with its original kernel, precision
    and thread count.

    Raises:
        ConfigError: the kernel does not run on this machine, or the run does not fit into memory.
        DiskError: its folder can't be written to.
    """

    def __init__(self, config: RunConfig):
        die_with_papermill()
        self.folder = Path(config.runs_dir) / config.run_id
        check(config)
        if config.activations and not (store_folder(config) / "manifest.json").exists():
            published_files(config)
        self._lock = contextlib.ExitStack()  # held until the process ends, or `close`
        self._lock.enter_context(waiting_lock(self.folder / ".lock"))
        sweep(self.folder)
        sum_of(self.folder / NOTEBOOK).unlink(missing_ok=True)  # papermill may be writing it
        self.run_id = config.run_id
        was_aside = (self.folder / SET_ASIDE).exists()
        self.finished = self._is_whole()
        self.config = self._resolved(config)
        self.times: dict[str, float] = {}
        self.finished = self.finished and self._is_of_its_store(was_aside)
        self.sae: SAE = None  # type: ignore[assignment]  # until `train`
        self.best_epoch = -1

    def close(self) -> None:
        """End the run: delete its checkpoint and release its lock."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self._lock.close()

    def _is_whole(self) -> bool:
        """Whether the run has finished and its files are intact; a damaged run is reported and made again."""
        path, aside = self.folder / "metrics.json", self.folder / SET_ASIDE
        if aside.exists() and not path.exists():
            aside.rename(path)
            path.touch()  # the workflow compares file times
        if not path.exists():
            return False
        try:
            check_run(self.folder, self.run_id)
        except SaegridError as error:
            print(f"{error.fact}; the run is made again", flush=True)
            path.unlink()
            return False
        return True

    def _is_of_its_store(self, was_aside: bool) -> bool:
        """Whether a complete run was made from its store as it is now; if not, it is reported and made again.

        A missing store is made only if the run had been set aside, because the new store may differ.

        Raises `StoreError` if the store's sources have changed.
        """
        folder = self.store.folder if was_aside else store_folder(self.config)
        try:
            check_sources(self.config, folder, read_sealed(folder / "manifest.json"))
        except DamagedError:  # no store, or one that is repaired before use
            return True
        try:
            check_made_from(self.folder, folder)
        except StoreError as error:
            print(f"{error}; the run is made again", flush=True)
            (self.folder / "metrics.json").unlink()
            return False
        return True

    @cached_property
    def kernel(self):
        kernels.set_threads(self.config.threads)
        return kernels.load(self.config.kernel)

    @property
    def device(self) -> str:
        """Device of the run's tensors, "cpu" or "cuda"."""
        return "cpu" if self.config.kernel == "cpu" else kernels.choose_device(self.config.device)

    @cached_property
    def store(self) -> Store:
        kernels.set_threads(self.config.threads)
        started = time.perf_counter()
        store = prepare_store(self.config)
        self.times["collect_seconds"] = time.perf_counter() - started
        return store

    @property
    def curve(self) -> pd.DataFrame:
        """The learning curve: one row per epoch."""
        return pd.read_json(self.folder / "metrics.jsonl", lines=True)

    @property
    def metrics(self) -> pd.Series:
        """The run's row of the tidy table."""
        return pd.Series(load_run(self.folder, self.run_id))

    @property
    def latents(self) -> pd.DataFrame:
        """Firing per latent on the validation rows: latent, fired, mean_act, max_act."""
        return pd.read_csv(self.folder / "latents.csv")

    @property
    def positions(self) -> pd.DataFrame:
        """Squared error per token position: position, n_rows, sq_error, sq_norm_centred."""
        return pd.read_csv(self.folder / "positions.csv")

    def train(self) -> SAE:
        """Train, or load what a finished run saved."""
        if self.finished:
            self.sae = load_folder(self.folder).to(self.device)
            return self.sae
        rows = self.config.epochs * self.store.epoch_rows  # a missing store is collected here, and timed separately
        with tqdm(total=rows, unit="row", unit_scale=True, desc=self.config.name, mininterval=1.0) as bar:
            self.sae, progress = train(
                self.config, self.store, self.kernel, self.folder, self.config.matmul, bar.update, self.device
            )
        self.best_epoch = progress.best_epoch
        self.times["train_seconds"] = progress.seconds
        self.times["train_rows_per_second"] = rows / progress.seconds
        return self.sae

    def evaluate(self) -> pd.Series:
        """Reconstruction and splice metrics; saves the SAE and, last, `metrics.json`."""
        if self.finished:
            return self.metrics
        started = time.perf_counter()
        rows, latents, positions = evaluate_rows(self.sae, self.store, self.config.batch_size, self.kernel)
        sums = spliced(self.config, self.store, self.sae, self.kernel)
        self.sae.cpu()
        cfg = {**self.config.identity(), "run_id": self.run_id, "code_version": code_version()}
        cfg = {name: value for name, value in cfg.items() if name not in ("arch", "k", "threshold")}
        # how the training rows were made, for other tools; None: unknown
        cfg |= {name: self.store.manifest.get("data", {}).get(name) for name in ("context_size", "prepend_bos")}
        weights = save_sae(self.sae, self.folder, self.config.name, cfg)
        for name, frame in (("latents", latents), ("positions", positions), ("prompts", sums)):
            write_text(self.folder / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        self.times["eval_seconds"] = time.perf_counter() - started
        self._write_times()
        row = self._row(rows | on_prompts(sums), sums, weights)
        self._commit(row)
        return self.metrics

    def _commit(self, row: dict) -> None:
        """Write `SHA256SUMS` of all files of the result and, last, `metrics.json`."""
        for name in (*METRICS, "kl"):
            if row[name] is None:
                raise SaegridError(f"{self.run_id}: {name} is not a finite number, so the run has no result to publish")
        content = (json.dumps(row, indent=2, allow_nan=False) + "\n").encode()
        names = ["cfg.json", "sae.safetensors", f"{self.config.name}.pt", "config.json", "metrics.jsonl"]
        names += [f"{table}.csv" for table in ("latents", "positions", "prompts")]
        write_sums(self.folder, names, {"metrics.json": content})
        write_bytes(self.folder / "metrics.json", content)
        self.finished = True

    def _row(self, measured: dict, sums: pd.DataFrame, weights: str) -> dict:
        config, sae, curve = self.config, self.sae, self.curve
        best = curve[curve["epoch"] == self.best_epoch].iloc[0]
        sparsity = {"k": config.k or None, "threshold": config.threshold or None}
        row = {"run_id": self.run_id, "name": config.name, **config.identity(), **sparsity}
        row |= {"d_in": sae.d_in, "d_sae": sae.d_sae, "n_train_rows": self.store.epoch_rows}
        row |= {"n_val_rows": self.store.n_val, "n_eval_prompts": len(sums), "n_eval_tokens": int(sums.n_tokens.sum())}
        row |= {"steps": int(curve["step"].max()), "best_epoch": self.best_epoch}
        row |= {"inference_threshold": sae.inference_threshold, "theta_over_rms": None}
        if ARCHITECTURES[sae.arch].cut(config.k > 0) in ("threshold", "theta"):
            batch = next(self.store.batches("val", config.batch_size))
            theta = sae.theta.mean().item() if len(sae.theta) else sae.threshold
            row |= {"inference_threshold": theta, "theta_over_rms": theta / rms_pre_acts(sae.params, batch)}
        row |= {"val_mse_batch": float(best["val_mse"])} | measured
        row |= {"store_id": config.store_id, "data_sha256": self.store.data_sha256}
        row |= {"model_sha256": self.store.model_sha256, "weights_sha256": weights}
        row |= {"code_version": code_version(), "torch_version": torch.__version__}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }

    def _write_times(self) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        times = {name: round(value, 3) for name, value in self.times.items()}
        facts = {"finished": now, "threads": self.config.threads, "cpu": processor()}
        if self.device == "cuda":
            facts["gpu"] = torch.cuda.get_device_name()
        write_sealed(self.folder / "timing.json", {"run_id": self.run_id} | times | facts)

    def _resolved(self, config: RunConfig) -> RunConfig:
        """The config with kernel, precision, threads and device as chosen at the run's first start."""
        path = self.folder / "config.json"
        places = {"runs_dir": config.runs_dir, "store_dir": config.store_dir}
        try:
            if path.exists():
                return load_config(self.folder, self.run_id, **places)
        except SaegridError as error:
            print(f"{error}; the run starts again", flush=True)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)  # its kernel and precision are unknown
        choice = kernels.choose(config.kernel, config.matmul, config.threads, config.device)
        resolved = make_config(**config.model_dump() | choice._asdict())
        write_sealed(path, {"run_id": self.run_id} | resolved.identity())
        return resolved


def code_version() -> str:
    """Version of the package, with a hash of the sources that can change a result."""
    digest = hashlib.sha256()
    root = Path(str(package_files(saegrid)))
    for name in CODE:
        for source in sorted((root / name).rglob("*.py")):
            digest.update(source.read_bytes())
    return f"{saegrid.__version__}+{digest.hexdigest()[:12]}"


def processor() -> str:
    """Name of the processor, for the timing record."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
