"""SAEs of this project beside its peers', at matched L0: the same rows, epochs, width and search for a learning rate.

    python benchmarks/peer_quality.py                     # hours on two cores; stopped, it goes on where it was
    python benchmarks/peer_quality.py --ks 64 --rates 1

Every SAE is judged by this project's metrics on the same held-out rows and prompts, attention sinks left out of all of
them: the other libraries have no means against sinks but to leave them out of training, so they get the rows without
sinks, thresholds are calibrated to K on validation rows without sinks, and the splice leaves sinks as they are.
Each contender is trained at its default learning rate and at three times that, and on along `LADDER` until both
neighbours of the best, by FVU on the validation rows, are worse; that one alone is spliced. Writes
`results/peers/runs.csv` and `prompts.csv` behind each contender.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from saegrid import kernels
from saegrid.atomic import write_text
from saegrid.calibration import calibrated_factor, ordinary
from saegrid.config import RunConfig, make_config
from saegrid.evaluation import evaluate_rows, on_prompts, spliced
from saegrid.formats import load_sae
from saegrid.kernels import cpu as kernel
from saegrid.peers import KEYS
from saegrid.run import Run, prepare_store
from saegrid.sae import SAE, JumpReLU, TopK
from saegrid.store import Store

ROOT = Path(__file__).resolve().parents[1]
KS = (16, 32, 64, 128)
LADDER = (0.1, 0.333333, 1.0, 3.0, 10.0, 30.0)
"""Learning rates that may be tried, by a contender's default."""
EXPANSION, TRAIN_TOKENS, VAL_TOKENS, EPOCHS, BATCH = 4, 40_000, 10_000, 5, 512
CONTENDERS = {
    ("saegrid", "BatchTopK"): 1e-3,
    ("saegrid", "JumpReLU"): 1e-3,
    ("saegrid", "Matryoshka"): 1e-3,
    ("sae-lens", "BatchTopK"): 3e-4,
    ("sae-lens", "TopK"): 3e-4,
    ("sae-lens", "Matryoshka"): 3e-4,
    ("dictionary_learning", "BatchTopK"): 2e-4,  # at 16,384 latents, as sparsify's
    ("dictionary_learning", "TopK"): 2e-4,
    ("dictionary_learning", "Matryoshka"): 2e-4,
    ("sparsify", "TopK"): 5e-3,
}
"""Contenders and their own default learning rates, those of two peers to be scaled by (d_sae / 16,384)^-1/2."""
SCALED = ("dictionary_learning", "sparsify")
ON_ROWS = ["l0_no_sink", "fvu_no_sink", "dead_pct_no_sink"]
ON_PROMPTS = ["fvu_eval", "delta_loss", "loss_recovered_mean", "ce_spliced"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ks", default=",".join(map(str, KS)))
    parser.add_argument("--rates", type=int, default=len(LADDER), help="learning rates of each contender, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", default=",".join(dict.fromkeys(peer for peer, _ in CONTENDERS)))
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "results/peers")
    options = parser.parse_args()
    base = make_config(
        k=1, expansion=EXPANSION, train_tokens=TRAIN_TOKENS, val_tokens=VAL_TOKENS, epochs=EPOCHS, batch_size=BATCH
    )
    threads = kernels.choose("auto", "auto", 0).threads
    kernels.set_threads(threads)
    store = prepare_store(base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"x": ordinary(store.rows("train"))}, folder / "rows.safetensors")
        for k in map(int, options.ks.split(",")):
            for (peer, arch), default in CONTENDERS.items():
                contender = {"peer": peer, "arch": arch, "k": k, "seed": options.seed}
                spec = contender | {"threads": threads}
                if peer in options.peers.split(",") and not is_done(options.out, contender, options.rates):
                    scale = (EXPANSION * store.d_in / 2**14) ** -0.5 if peer in SCALED else 1.0
                    train = functools.partial(
                        trained, base=base, store=store, folder=folder, python=options.peers_python
                    )
                    found = tuned(spec, default * scale, options.rates, base, store, train)
                    add(options.out, contender, *found)


def tuned(
    spec: dict, default: float, most: int, base: RunConfig, store: Store, train: Callable[[dict], tuple[SAE, float]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A contender at each learning rate tried, a row each; the best one's losses by prompt, which its row has alone."""
    rows, saes = {}, {}
    while (rate := next_rate({rate: row["fvu_no_sink"] for rate, row in rows.items()})) and len(rows) < most:
        told = spec | {"rate": rate, "lr": rate * default}
        sae, seconds = train(told)
        saes[rate] = calibrated(sae, spec["k"], store)
        found, _, _ = evaluate_rows(saes[rate], store, BATCH, kernel)
        rows[rate] = {**told, "seconds": seconds, **{name: found[name] for name in ON_ROWS}}
    best = min(rows, key=lambda rate: lost(rows[rate]["fvu_no_sink"]))
    sums = spliced(base, store, saes[best], kernel, leave_sinks=True)
    found = on_prompts(sums)
    rows[best] |= {name: found[name] for name in ON_PROMPTS}
    return pd.DataFrame(rows.values()), sums.assign(**{name: rows[best][name] for name in KEYS})


def next_rate(tried: dict[float, float]) -> float | None:
    """The rate of `LADDER` to try next, from the loss of each one tried; None where the best has worse neighbours."""
    if len(tried) < 2:
        return 3.0 if tried else 1.0
    at = LADDER.index(min(tried, key=lambda rate: lost(tried[rate])))
    beside = LADDER[max(0, at - 1) : at + 2]
    return next((rate for rate in beside if rate not in tried), None)


def lost(fvu: float) -> float:
    """A loss to choose by: one that is no number is the worst."""
    return math.inf if math.isnan(fvu) else fvu


def trained(spec: dict, *, base: RunConfig, store: Store, folder: Path, python: Path) -> tuple[SAE, float]:
    """One contender's SAE, and the seconds that its training took."""
    if spec["peer"] == "saegrid":
        names = ("arch", "k", "lr", "seed", "threads")
        shared = base.model_dump(include={"train_tokens", "val_tokens", "expansion", "epochs", "batch_size"})
        told = shared | {name: spec[name] for name in names}
        run = Run(make_config(**told, recipe="improved", runs_dir=str(folder / "runs")))
        sae = run.train()
        run.close()
        return sae, run.times["train_seconds"]
    out = folder / "-".join(str(spec[name]) for name in KEYS)
    told = spec | {"d_sae": EXPANSION * store.d_in, "epochs": EPOCHS, "batch": BATCH, "out": str(out)}
    told |= {"rows": str(folder / "rows.safetensors")}
    quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(ROOT / "benchmarks/peer_train.py"), json.dumps(told)]
    done = subprocess.run(command, env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=True)
    return load_sae(out), json.loads(done.stdout.splitlines()[-1])["seconds"]


class OrdinaryRows:
    """A store's validation rows as calibration sees them, without sinks."""

    def __init__(self, store: Store):
        self.rows = ordinary(store.rows("val"))

    def batches(self, split: str, batch_size: int, device: str) -> Iterator[Tensor]:
        return iter(self.rows.to(device).split(batch_size))


def calibrated(sae: SAE, k: int, store: Store) -> SAE:
    """The SAE, its threshold, where it has one, such that its L0 is `k` on the validation rows without sinks."""
    if not isinstance(sae, TopK):
        sae = with_theta(sae, k)
        sae.theta.mul_(calibrated_factor(sae.params, k, OrdinaryRows(store), BATCH, kernel))
    return sae


def with_theta(sae: SAE, k: int) -> SAE:
    """The SAE as a JumpReLU with a threshold of its own for each latent."""
    cut = sae.threshold if sae.inference_threshold is None else sae.inference_threshold
    theta = sae.theta.data if len(sae.theta) else torch.full((sae.d_sae,), max(cut, 1e-6))
    same = JumpReLU(sae.d_in, sae.d_sae, k=k, theta=theta)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_pre"):
        getattr(same, name).data.copy_(getattr(sae, name))
    return same


def is_done(out: Path, contender: dict[str, Any], most: int) -> bool:
    """Whether a contender's search for a learning rate has ended, with as many rates as may be tried now."""
    runs = saved(out / "runs.csv")
    if runs.empty:
        return False
    tried = runs[is_of(runs, contender)].set_index("rate")["fvu_no_sink"].to_dict()
    return bool(tried) and (len(tried) >= most or next_rate(tried) is None)


def add(out: Path, contender: dict[str, Any], rows: pd.DataFrame, sums: pd.DataFrame) -> None:
    """Put a contender's rows into `runs.csv`, and its best one's losses into `prompts.csv`, in place of older ones."""
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("prompts.csv", sums), ("runs.csv", rows)):  # the latter says what is done
        old = saved(out / name)
        others = [] if old.empty else [old[~is_of(old, contender)]]
        write_text(out / name, pd.concat([*others, table], ignore_index=True).to_csv(index=False, lineterminator="\n"))
    print(rows.drop(columns=["threads", "lr"]).round(4).to_string(index=False), flush=True)


def saved(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def is_of(table: pd.DataFrame, contender: dict[str, Any]) -> pd.Series:
    return (table[[*contender]] == pd.Series(contender)).all(axis=1)


if __name__ == "__main__":
    main()
