"""SAELens' synthetic benchmark: this project's SAEs and its peers' on the same rows, by SAELens' own measures and ours.

    python benchmarks/synth_bench.py                       # six minutes on one core

SynthSAEBench-16k (arXiv:2602.14687) asks for 200 million samples and a width of 4,096: hours on a GPU for one SAE. This
is much smaller: its generator makes a world with an eighth of the directions, of the width and of the hierarchy, and
every contender gets the same 200,000 rows once (391 steps), at the same width, K and batch, with two seeds.
Each contender's learning rate is searched as in `benchmarks/peer_quality.py`: with seed 0, by FVU on held-out rows; the
published recipe keeps its own. Thresholds are calibrated to K on held-out rows. All SAEs are exported to SAELens'
format and judged by its `eval_sae_on_synthetic_data` on fresh rows. Needs `make peers`. Writes
`results/ground_truth/synthsaebench.csv`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from ground_truth import Course, compared, judged, places, train
from peer_quality import BATCH, CONTENDERS, LADDER, SCALED, best_of, calibrated, next_rate, only
from safetensors.torch import load_file, save_file

from saegrid.config.recipes import RECIPES
from saegrid.config.run_config import make_config
from saegrid.core.evaluation import evaluate_rows
from saegrid.core.sae import SAE
from saegrid.data.store import Store
from saegrid.experiment.run import prepare_store
from saegrid.formats import export, load_sae
from saegrid.kernels import cpu as kernel
from saegrid.kernels import set_threads
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
PART, TRAIN_ROWS, VAL_ROWS, JUDGED_ROWS, EPOCHS, EXPANSION = 8, 200_000, 10_000, 20_000, 1, 4
SEEDS = 2
RATES = (*LADDER, 100.0, 300.0)
"""Learning rates that may be tried, as multiples of a contender's default: few steps want high ones."""
OURS = {"published": ("TopK", "BatchTopK"), "improved": ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")}
JUDGED = ("explained_variance", "mcc", "uniqueness", "sae_l0", "true_l0", "dead_latents")
CLASSIFIED = ("f1_score", "precision", "recall")


class Contender(NamedTuple):
    """What is trained: whose library, which of this project's recipes (else empty), and the architecture."""

    peer: str
    recipe: str
    arch: str


CONTESTANTS = {
    Contender("saegrid", recipe, arch): RECIPES[recipe]["lr"] for recipe in OURS for arch in OURS[recipe]
} | {Contender(peer, "", arch): default for (peer, arch), default in CONTENDERS.items() if peer != "saegrid"}
"""Default learning rate of each contender; those of the `SCALED` peers are multiplied by (d_sae / 16,384)^-1/2."""
Attempt = tuple[Contender, float, int]
"""A contender, its learning rate / the default, and the seed."""


class Bench:
    """The rows, and what trains and judges on them."""

    def __init__(self, folder: Path, python: Path, k: int):
        self.folder, self.python, self.k = folder, python, k
        if not (folder / "rows.safetensors").exists():
            self.ask("rows", part=PART, train_rows=TRAIN_ROWS, val_rows=VAL_ROWS)
        made = load_file(folder / "rows.safetensors")
        (folder / "rows").mkdir(exist_ok=True)
        for split in ("train", "val"):
            torch.save(made[split], folder / f"rows/instruct_base_layer12_{split}.pt")
        save_file({"x": made["train"].float()}, folder / "x.safetensors")
        told = places(folder, made["train"].shape[1]) | {"activations": str(folder / "rows")}
        self.course = Course(told, made["directions"], made["fires"])
        self.store: Store = prepare_store(make_config(**told, k=k))

    @property
    def d_sae(self) -> int:
        return EXPANSION * self.store.d_in

    def ask(self, command: str, **told: Any) -> None:
        """Run `synth_world.py` in the peers' environment."""
        quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
        words = [str(self.python), str(ROOT / "benchmarks/synth_world.py"), command, str(self.folder), json.dumps(told)]
        subprocess.run(words, env=os.environ | quiet, stdout=subprocess.DEVNULL, check=True)

    def out(self, contender: Contender, rate: float, seed: int) -> Path:
        """Where a peer's SAE is written."""
        return self.folder / "theirs" / f"{contender.peer}-{contender.arch}-{rate}-{seed}"

    def told(self, contender: Contender, rate: float, seed: int) -> dict[str, Any]:
        """The parameters of a training, under names that this project and `peer_train.py` share."""
        lr = learning_rate(contender, rate, self.d_sae)
        return {"arch": contender.arch, "k": self.k, "lr": lr, "seed": seed, "epochs": EPOCHS}

    def trained(self, attempts: list[Attempt]) -> list[SAE]:
        """SAEs, their thresholds calibrated to K. One process trains all of the peers' that are not there yet."""
        shared = {"threads": 1, "batch": BATCH, "d_sae": self.d_sae, "rows": str(self.folder / "x.safetensors")}
        theirs = [one for one in attempts if one[0].peer != "saegrid" and not self.out(*one).exists()]
        if theirs:
            specs = [shared | self.told(*one) | {"peer": one[0].peer, "out": str(self.out(*one))} for one in theirs]
            self.ask("train", specs=specs)
        return [calibrated(self.one(*attempt), self.k, self.store) for attempt in attempts]

    def one(self, contender: Contender, rate: float, seed: int) -> SAE:
        """An SAE as its library trains it."""
        if contender.peer != "saegrid":
            return load_sae(self.out(contender, rate, seed))
        told = self.told(contender, rate, seed)
        return train(self.course, recipe=contender.recipe, batch_size=BATCH, **told)[0]

    def best_rates(self) -> dict[Contender, float]:
        """The learning rate of each contender with the lowest FVU on held-out rows, as multiples of the default."""
        tried: dict[Contender, dict[float, float]] = {contender: {} for contender in CONTESTANTS}
        while wanted := [(c, rate, 0) for c in tried if (rate := following(c, tried[c])) is not None]:
            for (contender, rate, _), sae in zip(wanted, self.trained(wanted), strict=True):
                fvu = evaluate_rows(sae, self.store, 2048, kernel)[0]["fvu_no_sink"]
                tried[contender][rate] = math.inf if math.isnan(fvu) else fvu
                print(*contender, rate, round(fvu, 4), flush=True)
        return {contender: best_of(rates) for contender, rates in tried.items()}

    def judged(self, contender: Contender, rate: float, saes: list[SAE]) -> list[dict[str, Any]]:
        """One row per seed, by our measures; the SAEs are left in `saes/` for SAELens' evaluation."""
        config = make_config(arch="TopK", k=self.k)  # no latents are given: these rows have no sinks
        pairs = [pair["stable_pct"] for pair in compared(saes, [config] * len(saes), self.store).values()]
        stable, records = sum(pairs) / len(pairs) if pairs else math.nan, []
        for seed, sae in enumerate(saes):
            name = f"{'-'.join(filter(None, contender))}-{seed}"
            export(sae, self.folder / "saes" / name, "saelens")
            record = contender._asdict() | {
                "seed": seed,
                "rate": rate,
                "lr": learning_rate(contender, rate, self.d_sae),
                "name": name,
            }
            records.append(record | judged(sae, self.store, self.course) | {"stable_pct": stable})
        return records


def learning_rate(contender: Contender, rate: float, d_sae: int) -> float:
    return CONTESTANTS[contender] * rate * ((d_sae / 2**14) ** -0.5 if contender.peer in SCALED else 1.0)


def following(contender: Contender, tried: dict[float, float]) -> float | None:
    """The next learning rate to try; the published recipe's is given."""
    if contender.recipe == "published":
        return only(1.0, tried)
    return next_rate(tried, len(RATES) + 1, RATES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--folder", type=Path, help="keeps rows and the peers' SAEs, so that a stopped call goes on")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "results/ground_truth")
    options = parser.parse_args()
    set_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options.folder or Path(temporary), options.peers_python, options.k)
        rates, records = bench.best_rates(), []
        attempts = [(contender, rate, seed) for contender, rate in rates.items() for seed in range(options.seeds)]
        saes = dict(zip(attempts, bench.trained(attempts), strict=True))
        for contender, rate in rates.items():
            records += bench.judged(contender, rate, [saes[contender, rate, seed] for seed in range(options.seeds)])
        bench.ask("judge", rows=JUDGED_ROWS)
        theirs = json.loads((bench.folder / "judged.json").read_text())
    for record in records:
        found = theirs[record.pop("name")]
        record |= {f"saelens_{n}": found[n] for n in JUDGED}
        record |= {f"saelens_{n}": found[f"classification/{n}"] for n in CLASSIFIED}
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "synthsaebench.csv", pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))


if __name__ == "__main__":
    main()
