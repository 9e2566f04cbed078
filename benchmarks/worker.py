"""One contender in its own process: loads inputs, then takes training steps on request.

Started by `race.py` with a JSON specification as its argument; runs under any Python that has torch and the contender's
packages. It answers each line on stdin with one JSON line: `turn SECONDS` with the times of the steps that it took in
about so many seconds, `end` with its peak memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "numpy", "numba", "sae-lens", "eai-sparsify", "dictionary-learning")
MIB = 2**20


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries print: their output goes to stderr
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        spec = json.loads(sys.argv[1])
        contender, batches, facts = prepare(spec)
        answer(facts)
        serve(contender, batches, answer)
    except Exception as error:
        traceback.print_exc()
        answer({"failure": f"{type(error).__name__}: {error}".split("\n")[0][:160]})


def prepare(spec: dict) -> tuple:
    """The contender after its first steps, the batches, and facts about it."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(spec["threads"])
    if spec.get("part") == "splice":
        import splicing as module
    elif spec["contender"] in ("saegrid", "floor"):
        import ours as module
    else:
        import peers as module
    make = module.CONTENDERS[spec["contender"]](spec)  # imports its packages
    imported = memory("VmRSS")
    inputs = {name: tensor.clone() for name, tensor in load_file(spec["inputs"]).items()}
    batches = inputs.pop("x")
    contender = make(inputs)
    del inputs
    facts = {"imported_rss_mib": imported, "versions": versions(), **contender.facts}
    if hasattr(contender, "reconstruct"):
        with torch.no_grad():
            x_hat, active = contender.reconstruct(batches[0])
        facts["mse"] = (x_hat.float() - batches[0]).double().square().mean().item()
        facts["l0"] = active / len(batches[0])
        del x_hat
    reset_peak()
    for turn in range(spec["warm_steps"]):
        contender.step(batches[turn % len(batches)])
    return contender, batches, facts


def serve(contender, batches, answer: Callable[[dict], None]) -> None:
    count = 0
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "end":
            answer({"peak_rss_mib": memory("VmHWM"), **getattr(contender, "found", {})})
            return
        times, until = [], time.perf_counter() + float(arguments[0])
        while not times or time.perf_counter() < until:
            started = time.perf_counter()
            contender.step(batches[count % len(batches)])
            times.append(1e3 * (time.perf_counter() - started))
            count += 1
        answer({"times_ms": times[1:] or times})  # the first step finds its data not in the caches


def memory(name: str) -> float | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in MiB; None if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith(name)), None)


def reset_peak() -> None:
    """Reset the peak memory, so that only the steps count."""
    with contextlib.suppress(OSError):  # the peak then counts loading too
        Path("/proc/self/clear_refs").write_text("5")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
