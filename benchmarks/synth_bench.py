"""SAELens' synthetic benchmark: this project's SAEs and its peers' on the same rows, by SAELens' own measures and ours.

    python benchmarks/synth_bench.py                       # some minutes on one core

SynthSAEBench-16k (arXiv:2602.14687) asks for 200 million samples and a width of 4,096: hours on a GPU for one SAE. Here
its generator makes a world eight times smaller in directions, width and hierarchy, and every contender gets the same
40,000 rows five times, at the same width, K and batch, with two seeds. Learning rates are those that
`benchmarks/peer_quality.py` found best for as many rows and epochs at its smallest K; the published recipe keeps its
own. Thresholds are calibrated to K on held-out rows. All SAEs are exported to SAELens' format and judged by its
`eval_sae_on_synthetic_data` on fresh rows. Needs `make peers`. Writes `results/ground_truth/synthsaebench.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from ground_truth import Course, compared, judged, places, train
from peer_quality import BATCH, CONTENDERS, KS, SCALED, best_of, calibrated, known, losses
from safetensors.torch import load_file, save_file

from saegrid.config.recipes import RECIPES
from saegrid.config.run_config import make_config
from saegrid.core.sae import SAE
from saegrid.data.store import Store
from saegrid.experiment.run import prepare_store
from saegrid.formats import export, load_sae
from saegrid.kernels import set_threads
from saegrid.storage.atomic import write_text

Contender = tuple[str, str, str]
"""Library, recipe (of this project's) and architecture."""
ROOT = Path(__file__).resolve().parents[1]
PART, TRAIN_ROWS, VAL_ROWS, JUDGED_ROWS, EPOCHS, EXPANSION = 8, 40_000, 10_000, 20_000, 5, 4
SEEDS = 2
OWN = {
    ("saegrid", "published", "TopK"): RECIPES["published"]["lr"],
    ("saegrid", "published", "BatchTopK"): RECIPES["published"]["lr"],
    **{("saegrid", "improved", a): RECIPES["improved"]["lr"] for a in ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")},
}
THEIRS = {(peer, "", arch): rate for (peer, arch), rate in CONTENDERS.items() if peer != "saegrid"}
JUDGED = ("explained_variance", "mcc", "uniqueness", "sae_l0", "true_l0", "dead_latents")
CLASSIFIED = ("f1_score", "precision", "recall")


def done(process: subprocess.Popen) -> None:
    """Wait for a process to end. Raises `SystemExit` if it failed."""
    if process.wait():
        raise SystemExit(f"{' '.join(process.args[1:3])}: ended with {process.returncode}")


class Bench:
    """The rows, and what trains and judges on them."""

    def __init__(self, folder: Path, python: Path, k: int, seeds: int):
        self.folder, self.python, self.k, self.seeds = folder, python, k, seeds
        if not (folder / "rows.safetensors").exists():
            done(self.ask("rows", part=PART, train_rows=TRAIN_ROWS, val_rows=VAL_ROWS))
        made = load_file(folder / "rows.safetensors")
        (folder / "rows").mkdir(exist_ok=True)
        for split in ("train", "val"):
            torch.save(made[split], folder / f"rows/instruct_base_layer12_{split}.pt")
        save_file({"x": made["train"].float()}, folder / "x.safetensors")
        told = places(folder, made["train"].shape[1]) | {"activations": str(folder / "rows")}
        self.course = Course(told, made["directions"], made["fires"])
        self.store: Store = prepare_store(make_config(**told, k=k))

    def ask(self, command: str, **told: Any) -> subprocess.Popen:
        """Start `synth_world.py` in the peers' environment."""
        quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = [str(self.python), str(ROOT / "benchmarks/synth_world.py")]
        words = [*script, command, str(self.folder), json.dumps(told)]
        return subprocess.Popen(words, env=os.environ | quiet, stdout=subprocess.DEVNULL)

    def their_spec(self, contender: Contender, lr: float, seed: int) -> dict[str, Any]:
        """The arguments of `peer_train.py`."""
        peer, _, arch = contender
        shared = {"peer": peer, "arch": arch, "k": self.k, "batch": BATCH, "epochs": EPOCHS, "threads": 1, "lr": lr}
        shared |= {"rows": str(self.folder / "x.safetensors"), "d_sae": EXPANSION * self.store.d_in}
        return shared | {"seed": seed, "out": str(self.theirs(contender, seed))}

    def theirs(self, contender: Contender, seed: int) -> Path:
        return self.folder / "theirs" / f"{contender[0]}-{contender[2]}-{seed}"

    def trained(self, contender: Contender, lr: float, seed: int) -> SAE:
        """One SAE, its thresholds calibrated to K; a peer's was trained before."""
        peer, recipe, arch = contender
        if peer == "saegrid":
            told = {"recipe": recipe, "arch": arch, "lr": lr, "seed": seed, "k": self.k}
            sae, _ = train(self.course, **told, batch_size=BATCH, epochs=EPOCHS)
        else:
            sae = load_sae(self.theirs(contender, seed))
        return calibrated(sae, self.k, self.store)

    def judged(self, contender: Contender, lr: float) -> list[dict[str, Any]]:
        """One row per seed, by our measures; the SAEs are left in `saes/` for SAELens' evaluation."""
        saes = [self.trained(contender, lr, seed) for seed in range(self.seeds)]
        config = make_config(arch="TopK", k=self.k)  # no latents are given: these rows have no sinks
        pairs = [pair["stable_pct"] for pair in compared(saes, [config] * len(saes), self.store).values()]
        stable, records = sum(pairs) / len(pairs) if pairs else math.nan, []
        for seed, sae in enumerate(saes):
            name = f"{'-'.join(filter(None, contender))}-{seed}"
            export(sae, self.folder / "saes" / name, "saelens")
            record = dict(zip(("peer", "recipe", "arch"), contender, strict=True)) | {"seed": seed, "lr": lr}
            record |= {"name": name, **judged(sae, self.store, self.course)}
            records.append(record | {"stable_pct": stable})
        return records


def learning_rate(contender: Contender, default: float, d_sae: int, peers: Path = ROOT / "results/peers") -> float:
    """The default times what `results/peers` found best at its smallest K; the published recipe's as it is."""
    peer, recipe, arch = contender
    if recipe == "published":
        return default
    like = {"peer": peer, "arch": "BatchTopK" if (peer, arch) == ("saegrid", "TopK") else arch, "k": min(KS), "seed": 0}
    scale = (d_sae / 2**14) ** -0.5 if peer in SCALED else 1.0
    return default * scale * best_of(losses(known(peers, like)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, help="keeps rows and SAEs, so that a stopped call goes on")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "results/ground_truth")
    options = parser.parse_args()
    set_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        bench, records = Bench(options.folder or Path(temporary), options.peers_python, options.k, options.seeds), []
        d_sae = EXPANSION * bench.store.d_in
        rates = {one: learning_rate(one, default, d_sae) for one, default in (OWN | THEIRS).items()}
        runs = itertools.product(range(options.seeds), THEIRS)
        specs = [bench.their_spec(contender, rates[contender], seed) for seed, contender in runs]
        training = bench.ask("train", specs=[spec for spec in specs if not Path(spec["out"]).exists()])
        for contender, lr in rates.items():
            if contender in THEIRS:
                done(training)
            records += bench.judged(contender, lr)
            print(pd.DataFrame(records[-options.seeds :]).round(4).to_string(index=False), flush=True)
        done(bench.ask("judge", rows=JUDGED_ROWS))
        theirs = json.loads((bench.folder / "judged.json").read_text())
    for record in records:
        found = theirs[record.pop("name")]
        record |= {f"saelens_{n}": found[n] for n in JUDGED}
        record |= {f"saelens_{n}": found[f"classification/{n}"] for n in CLASSIFIED}
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "synthsaebench.csv", pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
