"""What a GPU makes of the `dense` kernel: `make gpu`, under ten minutes, written to gpu.json.

Needs a GPU, Python, torch 2.11 or newer and this checkout; the other libraries, and the packages of a whole run, take
part if they are installed. Without a GPU the same script runs on the CPU with small sizes (`--device cpu`).

    facts      device, versions, measured bandwidth and bf16 product: together the floor of a step
    rules      every rule and recipe against the reference on the CPU, and steps that never wait for the device
    steps      milliseconds per step against the plain loop and the other libraries
    quality    validation error after a short training: the device in bf16 against the reference in fp32
    runs       whole runs of a tiny language model, on the device and on the CPU

Each part, and each contender of `steps`, runs in a process of its own, so that one failure does not take the others
along. On a GPU all contenders are compiled first, several at a time; then each is timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "lib"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from saegrid.kernels import dense, reference  # noqa: E402
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState  # noqa: E402

MARK = "RESULT "
PROCESSES = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Processes at a time, as long as nothing is timed."""
PATIENCE = 240.0
"""Seconds that one process may take."""
IMPROVED = StepSettings(1e-3, 1.0, True, aux_coef=1 / 32, dead_after=1_000_000, tie=3.0, l0_coef=0.1, bandwidth=0.3,
                        theta_tie=10.0)  # fmt: skip
RECIPES = {
    "published": {arch: Rule(kind, 220) for arch, kind in (("BatchTopK", "batchtopk"), ("TopK", "topk"))},
    "improved": {
        "BatchTopK": Rule("batchtopk", 64),
        "Matryoshka": Rule("batchtopk", 64),
        "JumpReLU": Rule("jumprelu", 64),
        "ReLU": Rule("relu", 64),
        "Gated": Rule("gated", 64),
    },
}
SHAPES = ((896, 8, 220, 4096), (896, 8, 220, 512), (896, 16, 64, 4096), (2048, 16, 64, 4096), (4096, 16, 64, 4096))
"""d_in, expansion, K, batch size."""
SMALL = ((64, 4, 8, 128), (64, 4, 8, 64))
TINY_RUN = {"k": 3, "expansion": 4, "layer": 1, "epochs": 4, "batch_size": 128, "train_tokens": 1200,
            "val_tokens": 300, "eval_prompts": 4, "max_tokens": 24}  # fmt: skip
PRODUCTS = 5
"""Matrix products of a step: pre-activations, x_hat, and the gradients of z, W_dec and W_enc."""


# --- facts ---


def facts(device: str) -> dict[str, Any]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.platform()}
    if device == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        found |= {"cuda": torch.version.cuda or torch.version.hip}
    else:
        found |= {"device": f"CPU, {torch.get_num_threads()} threads"}
    n, side = (2**29, 8192) if device == "cuda" else (2**24, 1024)
    copied = per_call(partial(torch.empty(n, device=device).copy_, torch.ones(n, device=device)), device)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    multiplied = per_call(lambda: a @ b, device)
    return found | {"bytes_per_s": 8 * n / copied["s"], "bf16_flop_per_s": 2 * side**3 / multiplied["s"]}


def floor_ms(known: dict[str, Any], d_in: int, expansion: int, batch: int) -> float:
    """Time of a step's products, then of one read and one write of weights and moments."""
    d_sae = expansion * d_in
    products = PRODUCTS * 2 * batch * d_in * d_sae / known["bf16_flop_per_s"]
    return 1e3 * (products + 2 * 3 * 2 * 4 * d_in * d_sae / known["bytes_per_s"])


def per_call(call: Callable[[], Any], device: str, seconds: float = 0.6) -> dict[str, float]:
    """Median, minimum and maximum seconds per call over blocks of calls, after a warm-up."""

    def block(n: int) -> float:
        settle(device)
        started = time.perf_counter()
        for _ in range(n):
            call()
        settle(device)
        return (time.perf_counter() - started) / n

    block(3)
    n = max(1, int(seconds / 6 / max(block(3), 1e-6)))
    times = [block(n) for _ in range(6)]
    return {"s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- rules ---


def rules(device: str) -> dict[str, Any]:
    """Relative distance of the weights from the reference's after eight steps; must be below 1e-4."""
    from kernel_cases import CASES, apart, begin, make_rows, on

    worst = {}
    for name, (rule, settings) in CASES.items():
        mine, theirs = begin(rule, settings, device), begin(rule, settings)
        on_it, on_cpu = on(device, rule, settings), on("cpu", rule, settings)
        for step, n in enumerate([200, 200, 37, 200, 64, 200]):
            dense.train_step(mine, make_rows(n, step).to(device), rule, on_it)
            reference.train_step(theirs, make_rows(n, step), rule, on_cpu)
        batches = [make_rows(n, n).to(device) for n in (200, 64)]
        with never_waiting(device):
            for x in batches:
                dense.train_step(mine, x, rule, on_it)
        for x in batches:
            reference.train_step(theirs, x.cpu(), rule, on_cpu)
        worst[name] = max(apart(a.cpu(), b) for a, b in zip(mine.params, theirs.params, strict=True))
    return {"apart": worst, "largest": max(worst.values()), "passed": max(worst.values()) < 1e-4}


@contextlib.contextmanager
def never_waiting(device: str):
    """An error if the host waits for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# --- steps ---


def steps(device: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds per step of one contender at one shape, after a line of input."""
    d_in, _, _, batch = spec["shape"]
    x = [row_like(batch, d_in, seed).to(device) for seed in range(4)]
    started = time.perf_counter()

    def warm() -> Callable[[Tensor], Any]:
        step = (ours if spec["who"] == "saegrid" else theirs)(device, spec)
        for _ in range(3):
            step(x[0])
        settle(device)
        return step

    if device == "cuda":
        warm()  # compiles, then gives its memory back to the others
        torch.cuda.empty_cache()
    compile_s = time.perf_counter() - started
    print("ready", flush=True)
    sys.stdin.readline()
    step, turn = warm(), iter(range(10**9))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = per_call(lambda: step(x[next(turn) % 4]), device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    if spec["who"] == "saegrid" and device == "cuda" and dense.compiles is bool(spec.get("eager")):
        raise RuntimeError("torch.compile failed")
    times = {f"{name}ms": 1e3 * found[f"{name}s"] for name in ("", "min_", "max_")}
    return times | {"peak_bytes": peak, "compile_s": round(compile_s, 1)}


def row_like(n: int, d_in: int, seed: int) -> Tensor:
    """Rows with a mean square of 1 and a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, d_in + 1).pow(-0.5)
    rows = torch.randn(n, d_in, generator=generator) * (scales / scales.square().mean().sqrt())
    return rows @ torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(0)))[0]


def start_params(d_in: int, d_sae: int, device: str, rule: Rule) -> Params:
    generator = torch.Generator().manual_seed(1)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator))
    params = Params(w_dec.clone(), torch.zeros(d_sae), w_dec, torch.zeros(d_in), torch.zeros(d_in))
    if rule.kind in ("jumprelu", "gated"):
        params = params._replace(theta=torch.full((d_sae,), 2.0 if rule.kind == "jumprelu" else 0.0))
    if rule.kind == "gated":
        params = params._replace(gain=torch.zeros(d_sae))
    if rule.kind in ("relu", "gated"):
        params = params._replace(b_enc=torch.full((d_sae,), -2.0))
    return Params(*(p.to(device) for p in params))


def ours(device: str, spec: dict[str, Any]) -> Callable[[Tensor], Any]:
    d_in, expansion, k, batch = spec["shape"]
    rule = RECIPES[spec["recipe"]][spec["arch"]]._replace(k=k)
    settings = StepSettings(1e-4) if spec["recipe"] == "published" else IMPROVED
    d_sae = expansion * d_in
    settings = settings._replace(matmul="bf16", batch_size=batch, aux_k=d_in // 2)
    if rule.kind in ("relu", "gated"):
        settings = settings._replace(l1_coef=1.0)
    if spec["arch"] == "Matryoshka":
        settings = settings._replace(prefixes=tuple(d_sae >> halvings for halvings in reversed(range(5))))
    dense.DIGIT = spec.get("digit", dense.DIGIT)
    state = TrainState.start(start_params(d_in, d_sae, device, rule))
    return lambda x: dense.train_step(state, x, rule, settings)


def theirs(device: str, spec: dict[str, Any]) -> Callable[[Tensor], Any]:
    from peers import CONTENDERS

    d_in, expansion, k, batch = spec["shape"]
    params = start_params(d_in, expansion * d_in, device, Rule("topk", k))
    inputs = {f"{part}.{name}": p.cpu() if part == "params" else torch.zeros_like(p).cpu()
              for part in ("params", "m", "v") for name, p in params._asdict().items()}  # fmt: skip
    told = {"arch": spec["arch"], "k": k, "setting": spec["setting"], "batch": batch, "theta": 0.0, "device": device}
    return CONTENDERS[spec["who"]](told)(inputs | {"step": 1000}).step


def contenders(shapes: tuple, device: str) -> list[dict[str, Any]]:
    """What is timed, most important first."""
    setting = "bf16+fused+compile" if device == "cuda" else "default"
    main, found = shapes[0], []
    for shape in shapes[:2]:
        found.append({"who": "saegrid", "recipe": "published", "arch": "BatchTopK", "shape": shape})
        found.append({"who": "torch", "setting": setting, "arch": "BatchTopK", "shape": shape})
    for arch in RECIPES["improved"]:
        found.append(
            {"who": "saegrid", "recipe": "improved", "arch": arch, "shape": (*main[:2], main[2] // 2, main[3])}
        )
    found.append({"who": "saegrid", "recipe": "published", "arch": "TopK", "shape": main})
    for shape in shapes[:2]:
        found.append({"who": "saegrid", "recipe": "published", "arch": "BatchTopK", "shape": shape, "eager": True})
    for who in ("sae-lens", "dictionary_learning", "sparsify"):
        if installed(who.replace("-", "_")):
            arch = "TopK" if who == "sparsify" else "BatchTopK"
            found.append({"who": who, "setting": "default", "arch": arch, "shape": main})
    if device == "cuda":
        for digit in (1, 2):
            found.append({"who": "saegrid", "recipe": "published", "arch": "BatchTopK", "shape": main, "digit": digit})
    for shape in shapes[2:]:
        found.append({"who": "saegrid", "recipe": "published", "arch": "BatchTopK", "shape": shape})
    return found


def installed(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


# --- quality ---


def quality(device: str) -> dict[str, Any]:
    """Validation MSE after a short training on the same rows: `reference` in fp32 on the CPU, `dense` in both."""
    d_in, d_sae, n_train, epochs = (128, 1024, 32_768, 3) if device == "cuda" else (32, 128, 2048, 2)
    rows, held_out = row_like(n_train, d_in, 5), row_like(2048, d_in, 6)
    found: dict[str, Any] = {}
    for arch, rule in RECIPES["improved"].items():
        rule = rule._replace(k=16)
        settings = IMPROVED._replace(batch_size=512, aux_k=d_in // 2, l1_coef=1.0 * (rule.kind in ("relu", "gated")))
        if arch == "Matryoshka":
            settings = settings._replace(prefixes=(d_sae // 4, d_sae // 2, d_sae))
        ends = {}
        for name, kernel, where, matmul in (
            ("reference fp32", reference, "cpu", "fp32"),
            ("dense fp32", dense, device, "fp32"),
            ("dense bf16", dense, device, "bf16"),
        ):
            state = TrainState.start(start_params(d_in, d_sae, where, rule))
            for epoch in range(epochs):
                order = torch.randperm(n_train, generator=torch.Generator().manual_seed(epoch))
                for chosen in order.split(512):
                    kernel.train_step(state, rows[chosen].to(where), rule, settings._replace(matmul=matmul))
            params = Params(*(p.cpu() for p in state.params))
            codes = reference.encode(params, held_out, rule if rule.kind != "relu" else Rule("threshold"))
            ends[name] = (reference.decode(params, codes) - held_out).square().mean().item()
        found[arch] = ends | {"ratio": ends["dense bf16"] / ends["reference fp32"]}
    return found | {"passed": all(abs(ends["ratio"] - 1) < 0.01 for ends in found.values())}


# --- runs ---


def runs(device: str) -> dict[str, Any]:
    """Metrics of whole runs, from a tiny language model to the splice, on the device and on the CPU."""
    from tiny import save_dataset, save_model

    from saegrid.config.run_config import make_config
    from saegrid.experiment.run import Run

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, dataset = save_model(Path(folder) / "model"), save_dataset(Path(folder) / "data", train=200)
        for arch, recipe in (("BatchTopK", "published"), ("Matryoshka", "improved"), ("JumpReLU", "improved")):
            ends = {}
            for kernel, where in (("cpu", "cpu"), ("dense", device)):
                places = {"runs_dir": f"{folder}/{kernel}", "store_dir": f"{folder}/stores-{kernel}"}
                own = {"arch": arch, "recipe": recipe, "kernel": kernel, "device": where}
                run = Run(make_config(**own, **places, **TINY_RUN, model=model, dataset=dataset,
                                      prefixes=2 * (arch == "Matryoshka")))  # fmt: skip
                run.train()
                row = run.evaluate()
                ends[kernel] = {name: row[name] for name in ("val_mse", "l0", "ce_clean", "ce_spliced")}
            found[f"{arch} {recipe}"] = ends
    close = [abs(ends["dense"]["val_mse"] / ends["cpu"]["val_mse"] - 1) < 0.05 for ends in found.values()]
    return found | {"passed": all(close)}


# --- all parts ---


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {"facts": facts, "rules": rules, "quality": quality, "runs": runs}


def begun(device: str, part: str, spec: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """A process that makes one part; one of `steps` waits for a line of input before it is timed."""
    command = [sys.executable, __file__, "--device", device, "--part", part]
    command += ["--spec", json.dumps(spec)] if spec else []
    uncompiled = part == "rules" or (spec is not None and spec.get("eager", False))  # compiling all rules takes minutes
    threads = str(max(1, (os.cpu_count() or 1) // PROCESSES))  # else every process takes all cores, and all starve
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads}
    if uncompiled:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - belongs to the process
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )
    process.log = log  # type: ignore[attr-defined]
    return process


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The result of a process, or {"error": last line}."""
    try:
        out, _ = process.communicate("go\n", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": f"took more than {PATIENCE:.0f} s"}
    for line in out.splitlines():
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    process.log.seek(0)  # type: ignore[attr-defined]
    told = process.log.read()  # type: ignore[attr-defined]
    sys.stderr.write(told[:4000] + "\n...\n" + told[-2000:])
    return {"error": (told.strip().splitlines() or ["no output"])[-1][:300]}


def prepared(device: str, spec: dict[str, Any]) -> subprocess.Popen[str]:
    """A process of `steps` that has compiled and waits."""
    process = begun(device, "steps", spec)
    assert process.stdout
    timer = threading.Timer(PATIENCE, process.kill)
    timer.start()
    process.stdout.readline()
    timer.cancel()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="no further contender is timed after this")
    parser.add_argument("--out", type=Path, help="default: benchmarks/gpu.json on a GPU, none on a CPU")
    parser.add_argument("--part", choices=(*PARTS, "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.part:
        with torch.no_grad() if told.part != "steps" else contextlib.nullcontext():
            own = partial(steps, spec=told.spec) if told.spec else PARTS[told.part]
            found = own(told.device)
        print(MARK + json.dumps(found), flush=True)
        os._exit(0)  # CUDA graphs and compile workers need no orderly end
    sys.exit(measure(told.device, 60 * told.minutes, told.out))


def measure(device: str, seconds: float, out: Path | None) -> int:
    """Run all parts; print them as they come, and write them after each. Returns 1 if any part failed."""
    started = time.perf_counter()
    found: dict[str, Any] = {"date": datetime.date.today().isoformat()}
    out = out or (ROOT / "benchmarks" / "gpu.json" if device == "cuda" else None)

    def keep(name: str, value: Any) -> None:
        found[name] = value
        if name != "steps":
            print(f"[{time.perf_counter() - started:.0f} s] {name}: {json.dumps(value)}", flush=True)
        if out:
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    keep("facts", ended(begun(device, "facts")))
    listed = contenders(SHAPES if device == "cuda" else SMALL, device)
    with ThreadPoolExecutor(PROCESSES) as pool:  # nothing is timed while anything else runs
        parts = {
            name: pool.submit(lambda name=name: ended(begun(device, name))) for name in ("runs", "rules", "quality")
        }
        ready = [pool.submit(prepared, device, spec) for spec in listed] if device == "cuda" else []
    for name, future in parts.items():
        keep(name, future.result())
    rows: list[dict[str, Any]] = []
    for spec in listed:
        process = ready[len(rows)].result() if ready else begun(device, "steps", spec)
        if time.perf_counter() - started > seconds:
            keep("left_out", listed[len(rows) :])
            break
        row = spec | ended(process)
        if "ms" in row and "error" not in found["facts"]:
            row["floor_ms"] = floor_ms(found["facts"], *spec["shape"][:2], spec["shape"][3])
        rows.append(row)
        print(f"[{time.perf_counter() - started:.0f} s] {json.dumps(row)}", flush=True)
        keep("steps", rows)
    for future in ready[len(rows) :]:
        future.result().kill()
    keep("minutes", (time.perf_counter() - started) / 60)
    failed = [
        name
        for name, value in found.items()
        if isinstance(value, dict) and ("error" in value or value.get("passed") is False)
    ]
    failed += [f"{row['who']} {row['arch']} {row['shape']}" for row in rows if "error" in row]
    print("failed: " + (", ".join(failed) or "nothing"))
    return int(bool(failed))


if __name__ == "__main__":
    main()
