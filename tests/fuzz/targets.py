"""Every parser and loader of this project, each as a function of bytes: only `SaegridError` may come out.

`fuzz.py` drives them by coverage, `tests/formats/test_resilience_input.py` by hypothesis and by what was found.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save

from saegrid.config.grid import load_grid, papermill_arguments
from saegrid.core import checkpoint
from saegrid.core.sae import BatchTopK, Gated, JumpReLU, ReLU, TopK
from saegrid.core.splice import load_references
from saegrid.core.train import load_checkpoint
from saegrid.data.manifest import FORMAT
from saegrid.data.published_activations import _load
from saegrid.data.store import META, Store
from saegrid.errors import SaegridError
from saegrid.experiment import finished_run
from saegrid.experiment.finished_run import RUN_FILES
from saegrid.formats import export, load_sae
from saegrid.formats.dictionary_learning import read_dictionary
from saegrid.formats.run_folder import save_sae
from saegrid.formats.saelens import read_saelens
from saegrid.formats.sparsify import read_sparsify
from saegrid.storage.checksums import SUMS, write_sealed, write_sums

SPLIT = b"\n--\n"
"""Between the parts of an input that stands for several files."""


def grid(data: bytes, folder: Path) -> None:
    path = folder / "grid.yaml"
    path.write_bytes(data)
    for run in load_grid(path).runs()[:10]:
        papermill_arguments(run)


def store(data: bytes, folder: Path) -> None:
    """A manifest, a shard and a baseline: as they come, and with seals and hashes that fit them."""
    manifest, shard, baseline = [*data.split(SPLIT, 2), b"", b""][:3]
    for name in ("train-00000", "val-00000"):
        (folder / f"{name}.safetensors").write_bytes(shard)
    mean = save({"mean": torch.ones(4)})
    (folder / "mean.safetensors").write_bytes(mean)
    (folder / "baseline.safetensors").write_bytes(shard)
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "baseline.json").write_bytes(baseline)
    _quietly(load_references, folder, "0")
    _quietly(Store, folder)
    facts = {"bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}
    mean_facts = {"bytes": len(mean), "sha256": hashlib.sha256(mean).hexdigest()}
    if content := _object(manifest):
        for entry in _dicts(content):
            if "file" in entry:
                entry |= facts if "rows" in entry else mean_facts
        _quietly(write_sealed, folder / "manifest.json", content)
        _quietly(lambda: [list(Store(folder).batches(split, 2, 0, buffer_shards=1)) for split in ("train", "val")])
    if content := _object(baseline):
        _quietly(write_sealed, folder / "baseline.json", content | {"data_sha256": "0", "x_sha256": facts["sha256"]})
        _quietly(load_references, folder, "0")


def run_files(data: bytes, folder: Path) -> None:
    """A run's metrics, tables, curve, times, configuration and checkpoint, with hashes that fit them."""
    kind, content = data[:1], data[1:]
    names = {b"m": "metrics.json", b"l": "metrics.jsonl", b"t": "timing.json", b"s": SUMS, b"c": "latents.csv"}
    run_dir = folder / "run"
    run_dir.mkdir()
    for name in ["metrics.json", *RUN_FILES]:
        (run_dir / name).write_bytes(b"{}")
    name = names.get(kind, "prompts.csv")
    (run_dir / name).write_bytes(content)
    if name != SUMS:
        write_sums(run_dir, ["metrics.json", *RUN_FILES])
    if name == "timing.json" and (times := _object(content)):
        _quietly(write_sealed, run_dir / name, times)
    if kind == b"p":
        path = folder / "checkpoint.safetensors"
        facts, _, tensors = content.partition(SPLIT)
        path.write_bytes(tensors)
        _quietly(load_checkpoint, path, TopK(2, 2, k=1), "r", "")
        if stated := _object(facts):
            _quietly(checkpoint.write, path, _checkpoint_tensors(), stated)
            _quietly(load_checkpoint, path, TopK(2, 2, k=1), "r", "")
    loaders = {b"l": finished_run.load_curves, b"t": finished_run.load_timing, b"c": finished_run.load_latents}
    if kind in b"ltcx":
        _quietly(loaders.get(kind, finished_run.load_prompts), pd.DataFrame([RUN]), folder)
    if kind in b"ms":
        finished_run.load_run(run_dir, "run")


def published_sae(data: bytes, folder: Path) -> None:
    for name in ("TopK_exp2x_k2.pt", "JumpReLU_exp2x_t0.5.pt"):
        (folder / name).write_bytes(data)
        load_sae(folder / name)


def activation_file(data: bytes, folder: Path) -> None:
    (folder / "acts.pt").write_bytes(data)
    acts = _load(folder / "acts.pt", 4, "a model")
    acts[:1].float()


def sae_folder(data: bytes, folder: Path) -> None:
    """A configuration and weights, as each of the four tools may have left them."""
    cfg, _, weights = data.partition(SPLIT)
    names = {"own": ("cfg.json", "sae.safetensors"), "lens": ("cfg.json", "sae_weights.safetensors")}
    for kind, (cfg_name, weights_name) in names.items():
        place = folder / kind
        place.mkdir(exist_ok=True)
        (place / cfg_name).write_bytes(cfg)
        (place / weights_name).write_bytes(weights)
        _quietly(load_sae, place)
        _quietly(read_sparsify if kind == "own" else read_saelens, place)


def dictionary_folder(data: bytes, folder: Path) -> None:
    cfg, _, weights = data.partition(SPLIT)
    (folder / "config.json").write_bytes(cfg)
    (folder / "ae.pt").write_bytes(weights)
    read_dictionary(folder)


RUN = {"run_id": "run", "name": "n", "arch": "TopK", "expansion": 1, "k": 1, "threshold": 0, "recipe": "published"}
RUN |= {"seed": 0, "n_val_rows": 5}
TARGETS = {
    "grid": grid,
    "store": store,
    "run_files": run_files,
    "published_sae": published_sae,
    "activation_file": activation_file,
    "sae_folder": sae_folder,
    "dictionary_folder": dictionary_folder,
}


def seeds(target: str, folder: Path) -> list[bytes]:
    """Small valid inputs to start from."""
    torch.manual_seed(0)
    saes = [TopK(4, 8, k=2), BatchTopK(4, 8, k=2, inference_threshold=0.5), JumpReLU(4, 8, threshold=0.5)]
    saes += [ReLU(4, 8, k=2), Gated(4, 8, k=2, theta=torch.ones(8))]
    if target == "grid":
        return [path.read_bytes() for path in Path("params").glob("*.yaml")]
    if target == "store":
        return [_store_seed()]
    if target == "run_files":
        return _run_seeds(folder)
    if target == "activation_file":
        return [_pt(torch.ones(3, 4)), _pt(torch.ones(3, 4, dtype=torch.float16)), _pt({"a": torch.ones(1)})]
    found = []
    for sae in saes:
        if target == "published_sae":
            found.append(export(sae, folder / sae.arch, "published").read_bytes())
        elif target == "dictionary_folder":
            place = export(sae, folder / sae.arch, "dictionary_learning")
            found.append((place / "config.json").read_bytes() + SPLIT + (place / "ae.pt").read_bytes())
        elif target == "sae_folder":
            save_sae(sae, folder / f"own{sae.arch}", "a", {})
            formats = ["saelens", *(["sparsify"] if isinstance(sae, TopK) else [])]
            places = [export(sae, folder / f"{kind}{sae.arch}", kind) for kind in formats]
            for place in [folder / f"own{sae.arch}", *places]:
                (weights,) = place.glob("*.safetensors")
                found.append((place / "cfg.json").read_bytes() + SPLIT + weights.read_bytes())
    return found


def check(target: str, data: bytes, folder: Path) -> bool:
    """Run a target on an input, in an empty folder. Returns whether the input was taken; lets all but
    `SaegridError` through."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        TARGETS[target](data, folder)
    except SaegridError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 3000
        return False
    return True


def _store_seed() -> bytes:
    rows = {"acts": torch.ones(3, 4), **{name: torch.zeros(3, dtype=torch.int32) for name in META}}
    entry = {"file": "train-00000.safetensors", "rows": 3, "bytes": 1, "sha256": "0" * 64}
    mean = {"file": "mean.safetensors", "bytes": 1, "sha256": "0" * 64}
    manifest = {"format": FORMAT, "d_in": 4, "act_dtype": "float32", "mean": mean, "data_sha256": "0"}
    manifest |= {"shards": {"train": [entry], "val": [entry | {"file": "val-00000.safetensors"}]}}
    manifest |= {"model": {"sha256": None}, "parameters": {}, "sources": {}}
    facts = {"rows": 3, "sq_norm_centred": 1.5, "max_norm": 2.5}
    manifest |= {"statistics": {"train": facts, "val": facts}}
    prompts = [{"tokens": [1, 2, 3], "template": 0, "prefix": 0}]
    baseline = json.dumps({"prompts": prompts, "sums": {"prompt": [0], "n_tokens": [2]}}).encode()
    return SPLIT.join([json.dumps(manifest).encode(), save(rows), baseline])


def _run_seeds(folder: Path) -> list[bytes]:
    row = {name: 1.0 for name in finished_run.TIDY} | dict.fromkeys(finished_run.HASHES, "ab" * 32) | {"run_id": "run"}
    found = [b"m" + json.dumps(row).encode(), b'l{"epoch": 0, "val_mse": 1.5}\n{"epoch": 1, "val_mse": 0.5}\n']
    found += [b't{"run_id": "run", "train_seconds": 1.5}', b"s" + b"ab" * 32 + b"  metrics.json\n"]
    found += [b"clatent,fired,mean_act,max_act\n0,1,2.0,3.0\n", b"xprompt,template,n_tokens\n0,0,12\n"]
    folder.mkdir(parents=True)
    facts = {"run_id": "r", "step": 3, "l1": 1.0, "plain": {"epoch": 1, "curve": []}}
    checkpoint.write(folder / "c", _checkpoint_tensors(), facts)
    return [*found, b"p" + json.dumps(facts).encode() + SPLIT + (folder / "c").read_bytes()]


def _checkpoint_tensors() -> dict[str, torch.Tensor]:
    params = TopK(2, 2, k=1).params._asdict()
    parts = ("weights", "m", "v", "best")
    return {f"{part}.{name}": tensor.clone() for part in parts for name, tensor in params.items()}


def _object(data: bytes) -> dict:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _dicts(content) -> list[dict]:
    """All objects within a JSON value."""
    if isinstance(content, list):
        return [inner for part in content for inner in _dicts(part)]
    if isinstance(content, dict):
        return [content, *(inner for part in content.values() for inner in _dicts(part))]
    return []


def _quietly(call, *arguments) -> None:
    try:
        call(*arguments)
    except SaegridError as error:
        assert "\n" not in str(error)


def _pt(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
