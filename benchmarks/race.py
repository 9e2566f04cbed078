"""A race: contenders in separate processes take turns, so that the machine's load varies alike for all."""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 900.0  # seconds that a worker may be silent: torch.compile takes minutes on few cores
CLOSE = 1.2  # settings this much slower than the fastest one in the first turn leave the race


class Contender:
    """A worker process. `failure` holds any error of it."""

    def __init__(self, spec: dict[str, Any], python: str):
        self.spec, self.name = spec, (spec["contender"], spec["setting"])
        self.failure = ""
        self.facts: dict[str, Any] = {}
        self.times: list[float] = []
        threads = str(spec["threads"])
        environment = os.environ | {
            "OMP_WAIT_POLICY": "passive",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        environment |= {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in `end`
        self.process = subprocess.Popen(
            [python, str(WORKER), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
        )
        self.facts = self._answer()

    def turn(self, seconds: float) -> float:
        """Run steps for about `seconds` (at least one); returns their median in ms, infinite after a failure."""
        times = self._ask(f"turn {seconds}").get("times_ms")
        if not times:
            return float("inf")
        self.times += times
        return statistics.median(times)

    def end(self) -> dict[str, Any]:
        """End the process and return the contender's record."""
        if not self.failure:
            self.facts |= self._ask("end")
        self.process.stdin.close()
        if self.failure:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        record = {"contender": self.name[0], "setting": self.name[1]}
        if self.failure:
            return record | {"failure": self.failure}
        times = sorted(self.times)
        spread = {"low": times[len(times) // 4], "high": times[-1 - len(times) // 4]}
        record |= {"step_ms": statistics.median(times), **{f"step_ms_{name}": t for name, t in spread.items()}}
        return record | {"steps": len(times), **self.facts}

    def _ask(self, command: str) -> dict[str, Any]:
        if self.failure:
            return {}
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            print(command, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if line:
            content = json.loads(line)
            self.failure = content.pop("failure", "")
            return content
        self.failure = f"no answer within {PATIENCE:g} s" if not ready else self._last_words()
        return {}

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        reason = "killed, most likely for memory" if code == -9 else f"ended with code {code}"
        return f"{reason}: {lines[-1][:200]}" if lines else reason


def race(specs: list[dict], pythons: dict[str, str], turns: int, seconds: float, stay: set[str]) -> list[dict]:
    """Records of all contenders, in the order of `specs`.

    All take a first turn. Settings that failed leave the race, as do those clearly slower than their contender's
    fastest and not named in `stay`; the others take `turns` turns in all.

    Args:
        pythons: interpreter of each contender; this one for those not named.
        seconds: length of a turn; a longer step is a turn by itself.
    """
    running = [Contender(spec, pythons.get(spec["contender"], sys.executable)) for spec in specs]
    first = {contender: contender.turn(seconds) for contender in running}
    best = {name: min(first[c] for c in running if c.name[0] == name) for name, _ in (c.name for c in running)}
    records = {}
    for contender in running:
        slow = first[contender] > CLOSE * best[contender.name[0]] and contender.name[1] not in stay
        if contender.failure or slow:
            records[contender] = contender.end()
    going = [contender for contender in running if contender not in records]
    for _ in range(1, turns):
        for contender in going:
            contender.turn(seconds)
    records |= {contender: contender.end() for contender in going}
    return [records[contender] for contender in running]


def ratios(records: list[dict]) -> dict[str, Any]:
    """Ratios of the peer's default and fastest setting to this project's step; records[0] is this project's."""
    measured = [record for record in records[1:] if "step_ms" in record]
    if "step_ms" not in records[0] or not measured:
        return {}
    ours, fastest = records[0]["step_ms"], min(measured, key=lambda record: record["step_ms"])
    summary = {"saegrid_ms": ours, "fastest_setting": fastest["setting"], "fastest_ms": fastest["step_ms"]}
    summary["ratio"] = fastest["step_ms"] / ours
    if "step_ms" in records[1]:
        summary |= {"default_ms": records[1]["step_ms"], "ratio_default": records[1]["step_ms"] / ours}
    return summary


def contending(records: list[dict]) -> list[str]:
    """A peer's settings for later races: its default, and those close to its fastest."""
    times = {record["setting"]: record["step_ms"] for record in records if "step_ms" in record}
    fastest = min(times.values(), default=0.0)
    return list(dict.fromkeys(["default", *(name for name, ms in times.items() if ms <= CLOSE * fastest)]))
