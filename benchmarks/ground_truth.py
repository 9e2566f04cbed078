"""SAEs on rows whose directions are known: what training finds, per recipe, architecture and number of rows.

    python benchmarks/ground_truth.py                      # a quarter of an hour on one core; goes on if stopped
    python benchmarks/ground_truth.py --rows 40000 --seeds 1
    python benchmarks/ground_truth.py --only-rows FOLDER   # the rows alone, for a grid file's `activations`

The rows are sums of known directions, with what a language model's residual stream is known for: few directions fire
often and most rarely (Zipf), directions of one topic fire together, a child fires only with its parent, all rows share
an offset, and one row in 200 is an attention sink. They are written as published activation files, beside a small
untrained language model of the same width, so that a grid file can name them and its report takes them like any other
rows. Writes `results/ground_truth/runs.csv`, one row per run, after
each setting. Existing rows count as done: if training has changed, delete them first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import standin
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from saegrid.config.run_config import RunConfig, make_config
from saegrid.core.evaluation import evaluate_rows
from saegrid.core.metrics import sink_norm
from saegrid.core.sae import SAE
from saegrid.core.stability import activity, coherence, matched
from saegrid.data.store import Store
from saegrid.experiment.run import Run
from saegrid.experiment.stability import given, ordinary_rows
from saegrid.kernels import Kernel, reference
from saegrid.kernels import cpu as kernel
from saegrid.storage.atomic import write_text

ROOT = Path(__file__).resolve().parents[1]
D_IN, DIRECTIONS, TOPICS = 112, 448, 16
L0 = 12.0
"""Mean number of directions in a row."""
ZIPF_SHIFT, MOST_OFTEN = 5, 0.5
"""The direction of rank i fires with a probability in proportion to 1 / (i + shift), at most this often."""
TOGETHER = 0.5
"""Correlation of a direction's latent Gaussian with its topic's."""
CHILDREN = 3
"""Every third direction of the rarer half has a parent."""
SPREAD, NOISE, OFFSET = 0.3, 0.1, 1.5
"""Standard deviation of log magnitudes; norms of noise and common offset, where a direction's magnitude is 1."""
SINK_EVERY, SINK_RATIO, UNIT = 200, 170.0, 18.0
"""One row in `SINK_EVERY` is a sink, with `SINK_RATIO` times an ordinary norm. All rows are multiplied by `UNIT`."""
ROWS = {40_000: (10, 3), 160_000: (3, 2)}
"""Numbers of training rows, each with its epochs and the number of seeds of each setting on them."""
LONG = 18
"""Epochs of the long runs of the published recipe on the most rows: 5,616 steps, as many as in the published sweep."""
VAL_ROWS, EXPANSION = 10_000, 4
ARCHS = {"published": ("TopK", "BatchTopK", "Matryoshka"), "improved": ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")}
KS = (3, 6, 9, 12, 18, 24, 48)
"""K of the runs that show decoder coherence over K (improved, BatchTopK, most rows, one seed)."""
SETTING = ["recipe", "arch", "freeze", "rows", "epochs", "k"]


class World(NamedTuple):
    """What the rows are made of."""

    directions: Tensor  # (n, d_in) of norm 1, the one that fires most often first
    probability: Tensor  # (n,): how often each fires
    parent: Tensor  # (n,) int64: the direction without which it does not fire; -1: none
    topic: Tensor  # (n,) int64
    offset: Tensor  # (d_in,)
    sink: Tensor  # (d_in,) of norm 1


def make_world(d_in: int = D_IN, n: int = DIRECTIONS, l0: float = L0, seed: int = 0) -> World:
    """A world with `n` directions in `d_in` dimensions, of which `l0` are in a row on average."""
    generator = torch.Generator().manual_seed(seed)
    directions, offset, sink = (normalize(torch.randn(count, d_in, generator=generator), dim=1) for count in (n, 1, 1))
    weight = 1 / (torch.arange(1, n + 1).double() + ZIPF_SHIFT)
    probability = (l0 * weight / weight.sum()).clamp_max(MOST_OFTEN)
    parent = torch.full((n,), -1)
    children = torch.arange(n // 2, n, CHILDREN)
    parent[children] = torch.randint(n // 4, (len(children),), generator=generator)
    topic = torch.randint(TOPICS, (n,), generator=generator)
    return World(directions, probability, parent, topic, OFFSET * offset[0], sink[0])


def firing(world: World, rows: int, generator: torch.Generator) -> Tensor:
    """Active directions of each row, (rows, n) bool. Topics correlate them (Gaussian copula); children come last."""
    n = len(world.directions)
    own, topics = torch.randn(rows, n, generator=generator), torch.randn(rows, TOPICS, generator=generator)
    level = TOGETHER**0.5 * topics[:, world.topic] + (1 - TOGETHER) ** 0.5 * own
    child = world.parent >= 0
    chance = world.probability.clone()
    chance[child] /= world.probability[world.parent[child]]  # given that the parent fires
    fires = level > torch.special.ndtri(1 - chance)
    fires[:, child] &= fires[:, world.parent[child]]
    return fires


def sample(world: World, rows: int, generator: torch.Generator, chunk: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of rows (N, d_in), each with the directions active in each row, (N, n) bool."""
    d_in, left = world.directions.shape[1], rows
    while left > 0:
        fires = firing(world, min(chunk, left), generator)
        magnitudes = (SPREAD * torch.randn(fires.shape, generator=generator)).exp() * fires
        x = magnitudes @ world.directions + world.offset
        x += NOISE * torch.randn(len(x), d_in, generator=generator) / d_in**0.5
        is_sink = torch.rand(len(x), generator=generator) < 1 / SINK_EVERY
        x[is_sink] += SINK_RATIO * x.norm(dim=1).median() * world.sink
        yield UNIT * x, fires
        left -= chunk


def write_rows(folder: Path, world: World, train_rows: int, val_rows: int, layer: int = 12) -> Tensor:
    """Write published activation files. Returns which direction is in which validation row, (val_rows, n) bool."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("val", val_rows), ("train", train_rows)):  # more training rows begin with the same ones
        chunks = [(x.half(), fires if split == "val" else None) for x, fires in sample(world, count, generator)]
        torch.save(torch.cat([x for x, _ in chunks]), folder / f"instruct_base_layer{layer}_{split}.pt")
        if split == "val":
            truth = torch.cat([fires for _, fires in chunks])
    return truth


class Course(NamedTuple):
    """What all runs on the same training rows share."""

    places: dict[str, str]  # parameters of a run
    directions: Tensor  # (n, d_in)
    truth: Tensor  # (n_val, n) bool: which direction is in which validation row


def places(folder: Path, d_in: int) -> dict[str, str]:
    """Parameters that name a language model and a dataset, made here: a run needs them, though nothing is spliced."""
    size = standin.Size(1_000, 1_000, d_in, 14, 304, 2_000, 500, heads=2)
    for name, make in (("model", standin.model), ("dataset", standin.dataset)):
        if not (folder / name).exists():
            (folder / name).mkdir(parents=True)
            make(folder / name, size)
    named = {"model": "model", "dataset": "dataset", "store_dir": "stores", "runs_dir": "runs"}
    return {name: str(folder / part) for name, part in named.items()}


def prepare(folder: Path, rows: int, world: World) -> Course:
    """The rows, with what else a run needs."""
    told = places(folder, world.directions.shape[1]) | {"activations": str(folder / f"rows-{rows}")}
    return Course(told, world.directions, write_rows(Path(told["activations"]), world, rows, VAL_ROWS))


def plan(rows: dict[int, tuple[int, int]]) -> list[tuple[dict[str, Any], int]]:
    """(setting, seeds) of all runs: recipes and architectures with their controls, the sweep over K, long runs."""
    found = []
    for (n, (epochs, seeds)), (recipe, archs) in itertools.product(rows.items(), ARCHS.items()):
        shared = {"recipe": recipe, "rows": n, "epochs": epochs, "k": round(L0)}
        found += [(shared | {"arch": arch, "freeze": "none"}, seeds) for arch in archs]
        found += [(shared | {"arch": "BatchTopK", "freeze": "decoder"}, seeds)]
    most = {"rows": max(rows), "epochs": rows[max(rows)][0]}
    sweep = most | {"recipe": "improved", "arch": "BatchTopK", "freeze": "none"}
    found += [(sweep | {"k": k}, 1) for k in KS if k != round(L0)]
    long = {"recipe": "published", "rows": max(rows), "epochs": LONG, "freeze": "none", "k": round(L0)}
    return [*found, *((long | {"arch": arch}, 2) for arch in ("TopK", "BatchTopK"))]


def train(course: Course, **told: Any) -> tuple[SAE, Run]:
    """One run's SAE."""
    run = Run(make_config(**course.places, expansion=EXPANSION, threads=1, **told))
    sae = run.train()
    run.close()
    return sae, run


def measured(setting: dict[str, Any], seeds: int, course: Course) -> pd.DataFrame:
    """Train a setting with its seeds: one row of measures per run; stability is the mean over its pairs of seeds."""
    runs, saes, records = [], [], []
    known = {name: value for name, value in setting.items() if name != "rows"}
    for seed in range(seeds):
        started = time.perf_counter()
        sae, run = train(course, **known, seed=seed)
        runs, saes = [*runs, run], [*saes, sae]
        records.append({**setting, "seed": seed, **judged(sae, run.store, course)})
        records[-1]["seconds"] = round(time.perf_counter() - started, 1)
    pairs = compared(saes, [run.config for run in runs], runs[0].store)
    for seed, record in enumerate(records):
        for name in ("stable_pct", "matched_cosine"):
            some = [value[name] for pair, value in pairs.items() if seed in pair]
            record[name] = sum(some) / len(some) if some else float("nan")
    return pd.DataFrame(records)


def judged(sae: SAE, store: Store, course: Course) -> dict[str, float]:
    """Measures of one SAE, on the validation rows that are not sinks."""
    found, latents, _ = evaluate_rows(sae, store, 2048, kernel)
    x = store.rows("val")
    keep = x.norm(dim=1) <= sink_norm([x])
    parts = zip(x[keep].split(2048), course.truth[keep].split(2048), strict=True)
    told = {name: found[name] for name in ("l0_no_sink", "fvu_no_sink", "dead_pct_no_sink")}
    told |= {"true_l0": course.truth[keep].sum(1).double().mean().item()}
    told |= {"decoder_coherence": coherence(sae, torch.tensor(latents["fired"].to_numpy() > 0))}
    return told | recovered(sae, course.directions, parts, kernel)._asdict()


class Recovery(NamedTuple):
    """How well an SAE finds known directions (arXiv:2602.14687). All latents count, dead ones too."""

    mcc: float  # mean |cosine| of decoder rows and directions, matched one to one
    f1: float  # mean over latents: F1 of its firing as a detector of the direction closest to its decoder row
    uniqueness: float  # number of directions that are closest to a latent / number of latents


def recovered(
    sae: SAE, directions: Tensor, rows: Iterable[tuple[Tensor, Tensor]], kernel: Kernel = reference
) -> Recovery:
    """Compare an SAE with the directions (n, d_in) that its rows are made of; their sign does not matter.

    Args:
        rows: batches (N, d_in), each with which direction is in which row, (N, n) bool.
    """
    cosines = (normalize(sae.W_dec.data.float(), dim=1) @ normalize(directions.float(), dim=1).T).abs()
    closest = cosines.argmax(1)  # (d_sae,)
    hits, fired, present = torch.zeros(3, sae.d_sae, dtype=torch.float64)
    for x, is_in in rows:
        fires, there = reference.dense(sae.codes(x, kernel), sae.d_sae) > 0, is_in[:, closest]
        hits += (fires & there).sum(0)
        fired += fires.sum(0)
        present += there.sum(0)
    f1 = 2 * hits / (fired + present).clamp_min(1)  # 0 for a dead latent
    matches = linear_sum_assignment(cosines.numpy(), maximize=True)
    mcc = cosines.numpy()[matches].mean(dtype=float)
    return Recovery(float(mcc), f1.mean().item(), len(torch.unique(closest)) / sae.d_sae)


def compared(saes: list[SAE], configs: list[RunConfig], store: Store) -> dict[tuple[int, int], dict[str, float]]:
    """Stability of each pair of seeds."""
    acts = [activity(sae, ordinary_rows(store), kernel) for sae in saes]
    pairs = itertools.combinations(range(len(saes)), 2)
    return {(i, j): matched(saes[i], saes[j], acts[i], acts[j], given(configs[i], saes[i]))._asdict() for i, j in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seeds", type=int, help="instead of the planned number")
    parser.add_argument("--only-rows", type=Path, metavar="FOLDER")
    parser.add_argument("--d-in", type=int, default=D_IN, help="width, with --only-rows: that of the grid's model")
    parser.add_argument("--out", type=Path, default=ROOT / "results/ground_truth")
    options = parser.parse_args()
    rows = {n: ROWS.get(n, (10, 2)) for n in sorted(map(int, options.rows.split(",")))}
    rows = {n: (epochs, options.seeds or seeds) for n, (epochs, seeds) in rows.items()}
    if options.only_rows:
        write_rows(options.only_rows, make_world(options.d_in, 4 * options.d_in), max(rows), VAL_ROWS)
        return
    path = options.out / "runs.csv"
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=SETTING)
    with tempfile.TemporaryDirectory() as name:
        courses: dict[int, Course] = {}
        for setting, seeds in plan(rows):
            if (done[SETTING] == pd.Series(setting)[SETTING]).all(axis=1).sum() >= seeds:
                continue
            if setting["rows"] not in courses:
                courses = {setting["rows"]: prepare(Path(name), setting["rows"], make_world())}
            found = measured(setting, seeds, courses[setting["rows"]])
            done = found if done.empty else pd.concat([done, found], ignore_index=True)
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(path, done.to_csv(index=False, lineterminator="\n"))
            print(found.round(4).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
