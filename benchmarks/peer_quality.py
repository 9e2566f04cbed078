"""SAEs of this project beside its peers', at matched L0: the same rows, epochs, width and search for a learning rate.

    python benchmarks/peer_quality.py                     # hours on two cores; stopped, it goes on where it was
    python benchmarks/peer_quality.py --ks 64 --rates 1
    python benchmarks/peer_quality.py --ks 64 --layer 24 --archs Matryoshka

This project's metrics judge every SAE on the same held-out rows and prompts, without attention sinks: no contender
trains on sinks (this project's recipe drops them, the other libraries get rows without them), thresholds are calibrated
to K on validation rows without sinks, and the splice does not replace sinks.
Each contender is trained at its default learning rate, at three times that, and on along `LADDER` until both neighbours
of the best, by FVU on the validation rows, are worse; then once between the best and its better neighbour. The best of
all is spliced, then trained and spliced with two more seeds, and the latents of each pair of seeds are matched
(`stable_pct`, `matched_cosine`: means over a seed's pairs). Writes `results/peers/runs.csv` and `prompts.csv` after
each contender. Existing rows count as done: if training has changed, delete its rows first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from saegrid import kernels
from saegrid.analysis.peers import KEYS
from saegrid.config.recipes import RECIPES
from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.evaluation import evaluate_rows, on_prompts, spliced
from saegrid.core.sae import SAE, JumpReLU, TopK
from saegrid.core.stability import activity, matched
from saegrid.core.thresholds import calibrated_factor, ordinary
from saegrid.data.store import Store
from saegrid.experiment.run import Run, prepare_store
from saegrid.experiment.stability import given
from saegrid.formats import export, load_sae
from saegrid.kernels import cpu as kernel
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
KS = (16, 32, 64, 128)
LADDER = (0.033333, 0.1, 0.333333, 1.0, 3.0, 10.0, 30.0)
"""Learning rates that may be tried, as multiples of a contender's default, in addition to those between two of them."""
EXPANSION, TRAIN_TOKENS, VAL_TOKENS, EPOCHS, BATCH = 4, 40_000, 10_000, 5, 512
CONTENDERS = {
    ("saegrid", "BatchTopK"): RECIPES["improved"]["lr"],
    ("saegrid", "JumpReLU"): RECIPES["improved"]["lr"],
    ("saegrid", "Matryoshka"): RECIPES["improved"]["lr"],
    ("sae-lens", "BatchTopK"): 3e-4,
    ("sae-lens", "TopK"): 3e-4,
    ("sae-lens", "Matryoshka"): 3e-4,
    ("dictionary_learning", "BatchTopK"): 2e-4,  # at 16,384 latents, as sparsify's
    ("dictionary_learning", "TopK"): 2e-4,
    ("dictionary_learning", "Matryoshka"): 2e-4,
    ("sparsify", "TopK"): 5e-3,
}
"""Default learning rate of each contender; those of the `SCALED` peers are multiplied by (d_sae / 16,384)^-1/2."""
SCALED = ("dictionary_learning", "sparsify")
ON_ROWS = ["l0_no_sink", "fvu_no_sink", "dead_pct_no_sink"]
ON_PROMPTS = ["fvu_eval", "kl", "delta_loss", "ce_spliced"]
BETWEEN_SEEDS = ["stable_pct", "matched_cosine"]


class Course(NamedTuple):
    """What all contenders share."""

    base: RunConfig
    store: Store
    folder: Path  # with the training rows, for the other libraries
    python: Path  # of the environment with these libraries
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ks", default=",".join(map(str, KS)))
    parser.add_argument("--rates", type=int, default=len(LADDER) + 1, help="learning rates of each contender, at most")
    parser.add_argument("--seeds", type=int, default=3, help="of each contender: 0 chooses the rate that all take")
    parser.add_argument("--peers", default=",".join(dict.fromkeys(peer for peer, _ in CONTENDERS)))
    parser.add_argument("--archs", default=",".join(dict.fromkeys(arch for _, arch in CONTENDERS)))
    parser.add_argument("--layer", type=int, default=RunConfig.model_fields["layer"].default)
    parser.add_argument("--dataset", default=RunConfig.model_fields["dataset"].default)
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--out", type=Path, default=ROOT / "results/peers")
    options = parser.parse_args()
    base = make_config(
        k=1, expansion=EXPANSION, train_tokens=TRAIN_TOKENS, val_tokens=VAL_TOKENS, epochs=EPOCHS, batch_size=BATCH,
        layer=options.layer, dataset=options.dataset,
    )  # fmt: skip
    threads = kernels.choose("auto", "auto", 0).threads
    kernels.set_threads(threads)
    store = prepare_store(base)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"x": ordinary(store.rows("train"))}, folder / "rows.safetensors")
        course = Course(base, store, folder, options.peers_python, threads)
        for k in map(int, options.ks.split(",")):
            for (peer, arch), default in CONTENDERS.items():
                if peer in options.peers.split(",") and arch in options.archs.split(","):
                    scale = (EXPANSION * store.d_in / 2**14) ** -0.5 if peer in SCALED else 1.0
                    where = {"layer": options.layer, "dataset": options.dataset}
                    compete(where | {"peer": peer, "arch": arch, "k": k}, default * scale, options, course)


def compete(contender: dict[str, Any], default: float, options: argparse.Namespace, course: Course) -> None:
    """Make a contender's runs that `options.out` lacks: the learning-rate search, and more seeds at the best rate."""
    for seed in range(options.seeds):
        one = contender | {"seed": seed}
        rows = known(options.out, one)
        if seed == 0:
            following = functools.partial(next_rate, most=options.rates)
        else:
            rate = best_of(losses(known(options.out, contender | {"seed": 0})))
            rows = {tried: row for tried, row in rows.items() if tried == rate}
            following = functools.partial(only, rate)
        if following(losses(rows)) is not None:
            add(options.out, one, *measured(one, default, rows, following, options.out, course))
    replicated(options.out, contender, course)


def measured(
    contender: dict[str, Any],
    default: float,
    rows: dict[float, dict],
    following: Callable[[dict[float, float]], float | None],
    out: Path,
    course: Course,
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """A contender's rows, one per learning rate tried, and the per-prompt losses of the best, which others do not have.

    Args:
        rows: rows of the rates tried before. If the best is one of them and has its losses, these are kept (None).
        following: gives the next rate to try, from the loss of each rate tried; None: no more.
    """
    rows, saes = dict(rows), {}

    def try_rate(rate: float) -> None:
        told = contender | {"threads": course.threads, "rate": rate, "lr": rate * default}
        sae, seconds = trained(told, course)
        saes[rate] = calibrated(sae, contender["k"], course.store)
        found, _, _ = evaluate_rows(saes[rate], course.store, BATCH, kernel)
        rows[rate] = {**told, "seconds": seconds, **{name: found[name] for name in ON_ROWS}}

    while rate := following(losses(rows)):
        try_rate(rate)
    best = best_of(losses(rows))
    if "kl" in rows[best]:
        return pd.DataFrame(rows.values()), None
    if best not in saes:
        try_rate(best)
    export(saes[best], kept(out, rows[best]), "saelens")
    sums = spliced(course.base, course.store, saes[best], kernel, leave_sinks=True)
    found = on_prompts(sums)
    rows = {rate: {name: row[name] for name in row if name not in ON_PROMPTS} for rate, row in rows.items()}
    rows[best] |= {name: found[name] for name in ON_PROMPTS}
    return pd.DataFrame(rows.values()), sums.assign(**{name: rows[best][name] for name in KEYS})


def kept(out: Path, row: dict[str, Any]) -> Path:
    """Folder of a contender's SAE with one seed at its best rate, to match its latents with another seed's."""
    return ROOT / "runs" / out.name / folder_name(row)


def folder_name(row: dict[str, Any]) -> str:
    return "-".join(re.sub(r"[^\w.]", "_", str(row[name])) for name in KEYS)


def replicated(out: Path, contender: dict[str, Any], course: Course) -> None:
    """Match the latents of each pair of a contender's seeds, and write the means over a seed's pairs to `runs.csv`."""
    runs = saved(out / "runs.csv")
    if runs.empty:
        return
    runs = runs.assign(**{name: runs.get(name, math.nan) for name in BETWEEN_SEEDS})
    rows = {n: row for n, row in runs[is_of(runs, contender)].iterrows() if kept(out, row).exists()}
    if len(rows) < 2 or runs.loc[[*rows], BETWEEN_SEEDS].notna().all(axis=None):
        return
    rows_of, saes = OrdinaryRows(course.store), {n: load_sae(kept(out, row)) for n, row in rows.items()}
    acts = {n: activity(sae, rows_of.batches("val", BATCH, "cpu"), kernel) for n, sae in saes.items()}
    own = make_config(arch=contender["arch"], k=contender["k"], recipe="improved")  # a peer's SAE has no given latents
    pairs = {
        (i, j): matched(saes[i], saes[j], acts[i], acts[j], given(own, saes[i]))
        for i, j in itertools.combinations(rows, 2)
    }
    for n in rows:
        for name in BETWEEN_SEEDS:
            values = [getattr(found, name) for pair, found in pairs.items() if n in pair]
            runs.loc[n, name] = sum(values) / len(values)
    write_text(out / "runs.csv", runs.to_csv(index=False, lineterminator="\n"))


def losses(rows: dict[float, dict]) -> dict[float, float]:
    """The loss by which learning rates are chosen; NaN is the worst."""
    return {rate: math.inf if math.isnan(row["fvu_no_sink"]) else row["fvu_no_sink"] for rate, row in rows.items()}


def best_of(tried: dict[float, float]) -> float:
    """The learning rate with the lowest loss; of several, the lowest rate."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def next_rate(
    tried: dict[float, float], most: int = len(LADDER) + 1, ladder: tuple[float, ...] = LADDER
) -> float | None:
    """The next learning rate, from the loss of each rate tried; None after one between two others, or after `most`."""
    if len(tried) >= most or not set(tried) <= set(ladder):
        return None
    if len(tried) < 2:
        return 3.0 if tried else 1.0
    best = best_of(tried)
    at = ladder.index(best)
    beside = [rate for rate in ladder[max(0, at - 1) : at + 2] if rate != best]
    between = round(math.sqrt(best * min(beside, key=lambda rate: tried.get(rate, 0.0))), 6)
    return next((rate for rate in beside if rate not in tried), between)


def only(rate: float, tried: dict[float, float]) -> float | None:
    """`rate`, unless it has been tried."""
    return None if rate in tried else rate


def trained(spec: dict, course: Course) -> tuple[SAE, float]:
    """One contender's SAE, and the seconds that its training took."""
    if spec["peer"] == "saegrid":
        names = ("arch", "k", "lr", "seed", "threads")
        shared = {"train_tokens", "val_tokens", "expansion", "epochs", "batch_size", "layer", "dataset"}
        shared = course.base.model_dump(include=shared)
        told = shared | {name: spec[name] for name in names}
        run = Run(make_config(**told, recipe="improved", runs_dir=str(course.folder / "runs")))
        sae = run.train()
        run.close()
        return sae, run.times["train_seconds"]
    out = course.folder / folder_name(spec)
    told = spec | {"d_sae": EXPANSION * course.store.d_in, "epochs": EPOCHS, "batch": BATCH, "out": str(out)}
    told |= {"rows": str(course.folder / "rows.safetensors")}
    quiet = {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(course.python), str(ROOT / "benchmarks/peer_train.py"), json.dumps(told)]
    done = subprocess.run(command, env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=True)
    return load_sae(out), json.loads(done.stdout.splitlines()[-1])["seconds"]


class OrdinaryRows:
    """A store's validation rows without sinks, with the interface that calibration needs."""

    def __init__(self, store: Store):
        self.rows = ordinary(store.rows("val"))

    def batches(self, split: str, batch_size: int, device: str) -> Iterator[Tensor]:
        return iter(self.rows.to(device).split(batch_size))


def calibrated(sae: SAE, k: int, store: Store) -> SAE:
    """The SAE, its threshold (if any) calibrated to an L0 of `k` on the validation rows without sinks."""
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


def known(out: Path, contender: dict[str, Any]) -> dict[float, dict]:
    """A contender's rows of `runs.csv`, keyed by learning rate, without missing measures."""
    runs = saved(out / "runs.csv")
    rows = [] if runs.empty else runs[is_of(runs, contender)].to_dict("records")
    return {
        row["rate"]: {name: row[name] for name in row if name == "fvu_no_sink" or pd.notna(row[name])} for row in rows
    }


def add(out: Path, contender: dict[str, Any], rows: pd.DataFrame, sums: pd.DataFrame | None) -> None:
    """Write a contender's rows to `runs.csv` and its best one's losses to `prompts.csv`, replacing older ones."""
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("prompts.csv", sums), ("runs.csv", rows)):  # runs.csv last: it marks what is done
        if table is None:
            continue
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
