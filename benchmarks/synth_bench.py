"""SAELens' synthetic benchmark: this project's SAEs and its peers' on the same rows, by SAELens' own measures and ours.

    python benchmarks/synth_bench.py                       # half an hour on one core

SynthSAEBench-16k (arXiv:2602.14687) asks for 200 million samples and a width of 4,096: hours on a GPU for one SAE. Here
its generator makes a world eight times smaller in directions, width and hierarchy, and every contender gets the same
100,000 rows five times, at the same width, K and batch: the best of `RATES` by FVU on held-out rows with the first
seed, then a second seed. Thresholds are calibrated to K on held-out rows (`benchmarks/peer_quality.py`). All SAEs are
exported to SAELens' format and judged by its `eval_sae_on_synthetic_data` on fresh rows. Needs `make peers`. Writes
`results/ground_truth/synthsaebench.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from ground_truth import Course, compared, judged, places, train
from peer_quality import BATCH, CONTENDERS, SCALED, calibrated
from safetensors.torch import load_file, save_file

from saegrid.config.recipes import RECIPES
from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.sae import SAE
from saegrid.data.store import Store
from saegrid.experiment.run import prepare_store
from saegrid.formats import export, load_sae
from saegrid.kernels import set_threads
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
PART, TRAIN_ROWS, VAL_ROWS, JUDGED_ROWS, EPOCHS, EXPANSION = 8, 100_000, 10_000, 20_000, 5, 4
RATES, SEEDS = (1.0, 3.0, 10.0), 2
"""Multiples of each contender's default learning rate, and seeds."""
OWN = {
    ("saegrid", "published", "TopK"): RECIPES["published"]["lr"],
    ("saegrid", "published", "BatchTopK"): RECIPES["published"]["lr"],
    **{("saegrid", "improved", a): RECIPES["improved"]["lr"] for a in ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")},
}
THEIRS = {(peer, "", arch): rate for (peer, arch), rate in CONTENDERS.items() if peer != "saegrid"}
JUDGED = ("explained_variance", "mcc", "uniqueness", "sae_l0", "true_l0", "dead_latents")
CLASSIFIED = ("f1_score", "precision", "recall")


class Bench:
    """The rows, and what trains and judges on them."""

    def __init__(self, folder: Path, python: Path, k: int):
        self.folder, self.python, self.k = folder, python, k
        self.ask("synth_world.py", "rows", str(folder), train_rows=TRAIN_ROWS, val_rows=VAL_ROWS)
        made = load_file(folder / "rows.safetensors")
        (folder / "rows").mkdir()
        for split in ("train", "val"):
            torch.save(made[split], folder / f"rows/instruct_base_layer12_{split}.pt")
        save_file({"x": made["train"].float()}, folder / "x.safetensors")
        told = places(folder, made["train"].shape[1]) | {"activations": str(folder / "rows")}
        self.course = Course(told, made["directions"], made["fires"])
        self.store: Store = prepare_store(make_config(**told, k=k))

    def ask(self, script: str, *arguments: str, **told: Any) -> str:
        """Run a script in the peers' environment."""
        quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [str(self.python), str(ROOT / "benchmarks" / script), *arguments, json.dumps(told | {"part": PART})]
        return subprocess.run(command, env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=True).stdout

    def trained(self, contender: tuple[str, str, str], lr: float, seed: int) -> SAE:
        """One SAE, its thresholds calibrated to K."""
        peer, recipe, arch = contender
        if peer == "saegrid":
            told = {"recipe": recipe, "arch": arch, "lr": lr, "seed": seed, "k": self.k, "batch_size": BATCH}
            sae, _ = train(self.course, **told, epochs=EPOCHS)
        else:
            out = self.folder / "theirs" / f"{peer}-{arch}-{lr}-{seed}"
            told = {"peer": peer, "arch": arch, "lr": lr, "seed": seed, "k": self.k, "batch": BATCH, "out": str(out)}
            told |= {"rows": str(self.folder / "x.safetensors"), "d_sae": EXPANSION * self.store.d_in}
            self.ask("peer_train.py", **told, epochs=EPOCHS, threads=1)
            sae = load_sae(out)
        return calibrated(sae, self.k, self.store)

    def contest(self, contender: tuple[str, str, str], default: float) -> list[dict[str, Any]]:
        """One row per seed at the best learning rate; the SAEs are left in `saes/` for SAELens' evaluation."""
        tried = {rate: self.trained(contender, rate * default, 0) for rate in RATES}
        rows = {rate: judged(sae, self.store, self.course) for rate, sae in tried.items()}
        best = min(rows, key=lambda rate: rows[rate]["fvu_no_sink"])
        saes = [tried[best], *(self.trained(contender, best * default, seed) for seed in range(1, SEEDS))]
        config = RunConfig(k=self.k)  # no latents are given: these rows have no sinks
        (pair,) = compared(saes, [config] * SEEDS, self.store).values()
        records = []
        for seed, sae in enumerate(saes):
            name = f"{'-'.join(filter(None, contender))}-{seed}"
            export(sae, self.folder / "saes" / name, "saelens")
            own = rows[best] if seed == 0 else judged(sae, self.store, self.course)
            record = dict(zip(("peer", "recipe", "arch"), contender, strict=True)) | {"seed": seed, "rate": best}
            records.append(record | {"name": name, **own, "stable_pct": pair["stable_pct"]})
        return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--peers", default="saegrid,sae-lens,dictionary_learning,sparsify")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "results/ground_truth")
    options = parser.parse_args()
    set_threads(1)
    with tempfile.TemporaryDirectory() as name:
        bench, records = Bench(Path(name), options.peers_python, options.k), []
        for contender, default in (OWN | THEIRS).items():
            if contender[0] in options.peers.split(","):
                scale = (EXPANSION * bench.store.d_in / 2**14) ** -0.5 if contender[0] in SCALED else 1.0
                records += bench.contest(contender, default * scale)
                print(pd.DataFrame(records[-SEEDS:]).round(4).to_string(index=False), flush=True)
        bench.ask("synth_world.py", "judge", name, rows=JUDGED_ROWS)
        theirs = json.loads((Path(name) / "judged.json").read_text())
    for record in records:
        found = theirs[record.pop("name")]
        record |= {f"saelens_{n}": found[n] for n in JUDGED}
        record |= {f"saelens_{n}": found[f"classification/{n}"] for n in CLASSIFIED}
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "synthsaebench.csv", pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
