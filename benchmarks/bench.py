"""The benchmark: this project's training step against its peers, against the floor, and over its sizes.

    python benchmarks/bench.py                          # everything; hours
    python benchmarks/bench.py --quick                  # one shape, one architecture; minutes
    python benchmarks/bench.py --shapes 576x8x128 --batches 512 --keep

Writes benchmarks/results.json after every race, so a stopped run keeps its results. Peers run in their own
environment (`make peers`); without it, only this project's parts and the plain torch loop are measured. Races of
other machines stay in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # races run on CPUs, even if there is a GPU

import grid_time
import yaml
from facts import ARCHS, BATCHES, SHAPES, UNITS, exponent, machine, not_measured, now
from peers import ARCHITECTURES, settings_of
from prepare import ROWS, Shape, real_rows, rows_of_width, theta_for, trained, write_inputs
from quality import compare
from race import contending, race, ratios
from splice_race import measure as measure_splice
from torch import Tensor

from saegrid import kernels
from saegrid.config.run_config import RunConfig, make_config
from saegrid.data.store import Store
from saegrid.experiment.run import prepare_store
from saegrid.kernels.state import TrainState
from saegrid.storage.atomic import write_json

ROOT = Path(__file__).resolve().parents[1]
WARM_STEPS = 2  # of each contender, before it is timed
PARTS = ("steps", "floor", "splice", "grid", "scaling", "quality")
SETTINGS = ("turns", "turn_seconds", "train_steps", "quick")
STORE = {"train_tokens": 40_000, "val_tokens": 10_000}
SCALING_BASE = Shape(d_in=0, expansion=8, k=128, batch=512)
SCALING = {"expansion": (4, 8, 16, 32), "k": (32, 64, 128, 256), "batch": (256, 512, 1024, 2048, 4096)}


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.WARNING)
    kernels.set_threads(options.threads)
    bench = Bench(options)
    if "floor" in options.parts or "steps" in options.parts:
        for d_in, expansion, k in options.shapes:
            bench.shape(d_in, expansion, k)
    if "splice" in options.parts:
        bench.splice()
    if "grid" in options.parts:
        grid = "smoke" if options.quick else "full"
        measured = grid_time.measure(bench, ROOT / f"params/{grid}.yaml", options.quick)
        bench.results["grid"] = bench.here | measured
        bench.write()
    if "scaling" in options.parts:
        bench.scaling()
    if "quality" in options.parts:
        records = compare(bench.config, options.threads, epochs=1 if options.quick else 5)
        bench.results["quality"] = [bench.here | record for record in records]
        bench.write()
    print(f"{options.out}: written")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", help=f"d_in x expansion x K, joined by commas (default: {SHAPES})")
    parser.add_argument("--batches", help="rows of a step, joined by commas (default: 512,4096)")
    parser.add_argument("--archs", help=f"(default: {','.join(ARCHS)})")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: all)")
    parser.add_argument("--peers", default=",".join(ARCHITECTURES), help="which peers (default: all; none: '')")
    parser.add_argument("--peers-python", type=Path, default=ROOT / ".venv-peers/bin/python")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--turns", type=int, default=3, help="turns of each contender in a race")
    parser.add_argument("--turn-seconds", type=float, default=2.0, help="length of a turn; one step at least")
    parser.add_argument("--train-steps", type=int, default=500, help="steps behind the weights")
    parser.add_argument("--quick", action="store_true", help="one shape, batch 512, BatchTopK, two settings of a peer")
    parser.add_argument("--keep", action="store_true", help="keep what the file has of this machine's races, too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results.json")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()
    first = SHAPES.split(",", maxsplit=1)[0]
    shapes = options.shapes or (first if options.quick else SHAPES)
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in shapes.split(",")]
    batches = options.batches or ",".join(map(str, BATCHES[:1] if options.quick else BATCHES))
    options.batches = [int(batch) for batch in batches.split(",")]
    options.archs = (options.archs or ("BatchTopK" if options.quick else ",".join(ARCHS))).split(",")
    options.parts = options.parts.split(",")
    options.peers = [peer for peer in options.peers.split(",") if peer]
    options.threads = options.threads or kernels.choose("auto", "auto", 0).threads
    return options


class Bench:
    """Runs races one after the other and writes their results to one file."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        values = STORE | {name: yaml.safe_load(value) for name, value in options.parameter}
        self.config: RunConfig = make_config(k=64, **values)
        self.store: Store = prepare_store(self.config)
        self.rows = real_rows(self.store)
        self.machine = machine(options.threads)
        self.here = {"machine": self.machine["name"]}
        self.contending: dict[tuple[str, str], list[str]] = {}  # settings of (peer, architecture) that may be fastest
        python = options.peers_python
        self.peers = options.peers if python.exists() else [peer for peer in options.peers if peer == "torch"]
        self.pythons = {peer: str(python) for peer in self.peers if python.exists()}
        self.results = self._start()

    def _start(self) -> dict[str, Any]:
        options, name = self.options, self.machine["name"]
        old = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        machines = {found["name"]: found for found in old.get("machines", [])}
        self.machine["versions"] = machines.pop(name, {}).get("versions", {}) | self.machine["versions"]

        def kept(part: str) -> list[dict]:
            return [record for record in old.get(part, []) if options.keep or record["machine"] != name]

        for record in kept("races"):
            if record["machine"] == name:
                self.contending.setdefault((record["peer"], record["arch"]), contending(record["contenders"][1:]))
        statistics = self.store.manifest["statistics"]["train"]
        if len(self.peers) < len(options.peers):
            print(f"{options.peers_python} is missing, and with it the peers but torch; see `make peers`", flush=True)
        rows = {"made": ROWS, "model": self.config.model, "layer": self.config.layer, "n": len(self.rows)}
        return {
            "started": now(),
            "machines": [*machines.values(), self.machine],
            "units": UNITS,
            "settings": old.get("settings") or {name: getattr(options, name) for name in SETTINGS},
            "rows": rows | {"median_norm": statistics["median_norm"], "max_norm": statistics["max_norm"]},
            "races": kept("races"),
            "floors": kept("floors"),
            "splice": old.get("splice", {}),
            "grid": old.get("grid", {}),
            "scaling": old.get("scaling", {}),
            "quality": old.get("quality", []),
        }

    def shape(self, d_in: int, expansion: int, k: int) -> None:
        """All races of one shape: the floor and each peer, at each batch size, for each architecture."""
        rows, weights = rows_of_width(self.rows, d_in), {}
        for batch, arch in itertools.product(self.options.batches, self.options.archs):
            shape = Shape(d_in, expansion, k, batch)
            trained_as = "TopK" if arch == "TopK" else "BatchTopK"
            if trained_as not in weights:
                weights[trained_as] = trained(rows, shape, trained_as, self.options.train_steps)
            state = weights[trained_as]
            theta = theta_for(state.params, rows, shape) if arch == "JumpReLU" else 0.0
            with self.inputs(state, rows, shape, arch, theta) as common:
                if "floor" in self.options.parts:
                    self.floor(shape, arch, common)
                for peer in self.peers if "steps" in self.options.parts else ():
                    if arch in ARCHITECTURES[peer]:
                        self.against(peer, shape, arch, common)

    def against(self, peer: str, shape: Shape, arch: str, common: dict) -> None:
        """One race with one peer. The first tries all settings; later ones try those close to the fastest."""
        tried = settings_of(peer, arch, bool(self.machine["bf16_instructions"]))
        settings = self.contending.get((peer, arch), tried[: 2 if self.options.quick else None])
        specs = [common | {"contender": "saegrid", "setting": "auto"}]
        specs += [common | {"contender": peer, "setting": setting} for setting in settings]
        records = self.race(specs)
        summary = ratios(records)
        self.contending.setdefault((peer, arch), contending(records[1:]))
        self.put("races", shape, arch, {"peer": peer, **summary, "theta": common["theta"], "contenders": records})
        if "ratio" in summary:
            theirs = f"{peer} {summary['fastest_ms']:8.1f} ms ({summary['fastest_setting']})"
            say(shape, arch, f"{summary['saegrid_ms']:8.1f} ms, {theirs}, ratio {summary['ratio']:.2f}")
        for record in records:
            if "failure" in record:
                say(shape, arch, f"{record['contender']} {record['setting']}: {record['failure']}")

    def floor(self, shape: Shape, arch: str, common: dict) -> None:
        """Race this project's step against the floor, the least that a step must do."""
        names = (("saegrid", "auto"), ("saegrid", "fp32"), ("floor", "product"), ("floor", "memory"))
        records = self.race([common | {"contender": name, "setting": setting} for name, setting in names])
        step, fp32, product, memory = (record.get("step_ms") for record in records)
        summary = {"saegrid_ms": step, "saegrid_fp32_ms": fp32, "product_ms": product, "memory_ms": memory}
        if step and product and memory:
            summary |= {"floor_ms": product + memory, "over_floor": step / (product + memory)}
            summary["bandwidth_gb_s"] = records[3]["bytes"] / memory / 1e6
            floor, over = summary["floor_ms"], summary["over_floor"]
            say(shape, arch, f"{step:8.1f} ms, floor {floor:8.1f} ms, over {over:.2f}")
        self.put("floors", shape, arch, summary | {"contenders": records})

    def splice(self) -> None:
        """Time the splice of ten SAEs, against SAELens' evaluator."""
        options, python = self.options, self.pythons.get("sae-lens", "")
        found = measure_splice(self.config, self.store, self.rows, options.threads, python, options.quick)
        for record in found["contenders"]:
            self.machine["versions"] |= record.pop("versions", {})
        self.results["splice"] = self.here | found | {"date": now()}
        self.write()
        print(
            f"splice: { ({name: found.get(name) for name in ('saegrid_s', 'peer_s', 'ratio', 'apart')}) }", flush=True
        )

    def scaling(self) -> None:
        """Cost of a BatchTopK step over d_sae, K and rows, for this project and the plain torch loop."""
        base = SCALING_BASE._replace(d_in=self.rows.shape[1])
        found: dict[str, Any] = {"base": {**base._asdict(), "d_sae": base.d_sae, "arch": "BatchTopK"}, "points": {}}
        found |= self.here | {"train_steps": self.options.train_steps}
        states: dict[tuple[int, int], Any] = {}
        for axis, values in ({"batch": SCALING["batch"][:2]} if self.options.quick else SCALING).items():
            points = []
            for value in values:
                shape = base._replace(**{axis: value})
                key = shape.expansion, shape.k
                if key not in states:
                    states = {key: trained(self.rows, shape, "BatchTopK", self.options.train_steps)}
                with self.inputs(states[key], self.rows, shape, "BatchTopK", 0.0) as common:
                    names = (("saegrid", "auto"), ("torch", "default"))
                    records = self.race([common | {"contender": name, "setting": s} for name, s in names])
                size = shape.d_sae if axis == "expansion" else value
                points.append({"size": size, **{f"{r['contender']}_ms": r.get("step_ms") for r in records}})
            found["points"][{"expansion": "d_sae", "k": "K", "batch": "rows"}[axis]] = points
        found["exponents"] = {
            axis: {name: exponent(points, f"{name}_ms") for name in ("saegrid", "torch")}
            for axis, points in found["points"].items()
        }
        self.results["scaling"] = found
        self.write()
        print(f"exponents: {found['exponents']}", flush=True)

    @contextlib.contextmanager
    def inputs(self, state: TrainState, rows: Tensor, shape: Shape, arch: str, theta: float) -> Iterator[dict]:
        """The specification that a race's contenders share, with the file that they load."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.safetensors"
            write_inputs(path, state, rows, shape.batch)
            told = {"inputs": str(path), "arch": arch, "k": shape.k, "theta": theta, "batch": shape.batch}
            yield told | {"threads": self.options.threads, "warm_steps": WARM_STEPS}

    def race(self, specs: list[dict]) -> list[dict]:
        options = self.options
        stay = {"auto", "fp32", "reference", "default", "product", "memory"}
        records = race(specs, self.pythons, options.turns, options.turn_seconds, stay)
        for record in records:
            self.machine["versions"] |= record.pop("versions", {})
        return records

    def put(self, part: str, shape: Shape, arch: str, content: dict) -> None:
        """Add a race's record, replacing an older one of the same race."""
        key = {**self.here, **shape._asdict(), "d_sae": shape.d_sae, "arch": arch}
        content = {"train_steps": self.options.train_steps, **content}
        if "peer" in content:
            key["peer"] = content["peer"]
        kept = [old for old in self.results[part] if {name: old.get(name) for name in key} != key]
        self.results[part] = [*kept, {**key, "date": now(), **content}]
        self.write()

    def write(self) -> None:
        left = not_measured(self.results["machines"], self.results["races"])
        write_json(self.options.out, self.results | {"not_measured": left, "finished": now()})


def say(shape: Shape, arch: str, line: str) -> None:
    print(f"{shape} {arch:9}: {line}", flush=True)


if __name__ == "__main__":
    main()
