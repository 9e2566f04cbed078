"""Check a run before anything is loaded: its shape, its data, its memory. Does not import torch."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path

from saegrid.config.run_config import RunConfig
from saegrid.data.language_model import config_folder, lm_shape
from saegrid.data.manifest import BUFFER_SHARDS, SHARD_ROWS
from saegrid.data.prompts import check_dataset
from saegrid.errors import ConfigError
from saegrid.kernels import choose_device
from saegrid.storage.hub_access import hub_errors, local_folder

BASE = 700e6
"""Bytes of Python with torch, transformers, numba and pandas, and of a language model's forward pass."""
STATES = 5
"""Copies of the weights in training: the weights, Adam's two moments, the best epoch's weights, the gradients."""
ROW_VALUES = 3
"""Values per batch row and latent: pre-activations, and the buffers to select among them."""


def check(config: RunConfig) -> None:
    """Check a run against its model's shape, its rows, its dataset and the free memory. Raises `ConfigError`."""
    d_in, n_layers = lm_shape(config)
    config.check_shape(d_in, n_layers)
    config.check_training()
    check_dataset(config)
    check_chat(config)
    check_fits(config, d_in)


def check_chat(config: RunConfig) -> None:
    """Check that a model on this machine has a chat template if the run needs one. Raises `ConfigError`."""
    folder = None if config.model.startswith("embedded:") else local_folder("model", config.model)
    if config.text != "chat" or not folder or (folder / "chat_template.jinja").exists():
        return
    with contextlib.suppress(OSError):
        if '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8"):
            return
    raise ConfigError(f"text = 'chat': the tokenizer of {config.model} has no chat template")


def check_fits(config: RunConfig, d_in: int) -> None:
    """Check that a run and its language model fit into the free memory. Raises `ConfigError` with both numbers."""
    free = available()
    on_cpu = config.kernel in ("cpu", "reference") or choose_device(config.device) == "cpu"
    if not on_cpu or free is None:
        return
    weights = model_bytes(config)
    if BASE + weights > free:
        raise ConfigError(
            f"model = {config.model!r}: its weights take {weights / 1e9:.1f} GB of memory as {config.lm_dtype} "
            f"(lm_dtype), and {free / 1e9:.1f} GB are free"
        )
    needs = needed(config, d_in) + (weights if config.rows == "streamed" else 0)
    if needs > free:
        raise ConfigError(
            f"expansion = {config.expansion}, batch_size = {config.batch_size}: the run needs about "
            f"{needs / 1e9:.1f} GB of memory (d_sae = {config.expansion * d_in}), and {free / 1e9:.1f} GB are free"
        )


def model_bytes(config: RunConfig) -> int:
    """Bytes of the language model's weights in `lm_dtype`, from the headers of its safetensors files.

    Those of a Hub model are asked for before they are fetched. 0 if there are none; the embedded model is in `BASE`.
    """
    from huggingface_hub import errors, get_safetensors_metadata
    from safetensors import SafetensorError, safe_open

    if config.model.startswith("embedded:"):
        return 0
    folder, names = config_folder(config), {"model.safetensors"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        names = set(index["weight_map"].values())
    values, files = 0, [folder / name for name in names if (folder / name).is_file()]
    for path in files:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
            values += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if not files and not local_folder("model", config.model):
        unknown = (ConfigError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError)
        with contextlib.suppress(*unknown), hub_errors("model", config.model, config.model_revision):
            found = get_safetensors_metadata(config.model, revision=config.model_revision or None)
            values = sum(found.parameter_count.values())
    return values * {"float32": 4, "bfloat16": 2}[config.lm_dtype]


def needed(config: RunConfig, d_in: int) -> int:
    """Peak bytes of training, for any number of rows, without the language model's weights."""
    d_sae = config.expansion * d_in
    weights = 4 * (2 * d_sae * d_in + d_sae + 2 * d_in)
    stored = {"float16": 2, "float32": 4}[config.act_dtype]
    rows = (
        min(config.stored_tokens, BUFFER_SHARDS * SHARD_ROWS) if not config.activations else BUFFER_SHARDS * SHARD_ROWS
    )
    if config.rows == "streamed":
        rows = max(rows, 2 * min(config.shuffle_rows, config.train_tokens))  # being trained on, and being made
    buffer = (rows + 3 * SHARD_ROWS) * d_in * stored
    batch = 4 * config.batch_size * (ROW_VALUES * d_sae + 8 * d_in)
    return int(BASE + STATES * weights + buffer + batch)


def available() -> int | None:
    """Bytes that this process may still take: the machine's or its control group's free memory; None: unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        facts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found.append(limit - used + int(facts["inactive_file"]))  # reclaimable cache
    if not found and hasattr(os, "sysconf"):
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
