"""One training step: the reference against the cpu kernel, side by side, on this machine.

    python benchmarks/step.py [threads ...]        # default: 1 and 2

Rows are anisotropic with 0.5% of attention sinks (norm 25,000); every state has had 50 steps; JumpReLU's theta is set
so that L0 is about k. Kernels take turns; medians are in milliseconds. `product` is the encoder's product alone,
`memory` one read and write of the weights and of Adam's moments: no step of this design can be faster than their sum.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from saegrid import kernels
from saegrid.kernels import cpu, reference
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

SHAPES = [(896, 8, 220), (576, 8, 128), (576, 4, 64), (576, 16, 64)]  # d_in, expansion, k
BATCH, WARM_UP, LR = 512, 50, 1e-4
SECONDS = 1.5  # for each line of the table, at least


def main() -> None:
    threads = [int(number) for number in sys.argv[1:]] or [1, 2]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, batch {BATCH}; times in ms")
    print(
        f"{'d_in':>4} {'d_sae':>5} {'k':>3} {'rule':9} {'thr':>3} | {'reference':>9} {'cpu fp32':>8} {'cpu bf16':>8} | "
        f"{'speed-up':>11} | {'product fp32':>12} {'bf16':>5} {'memory':>6} | {'l0':>5}"
    )
    for d_in, expansion, k in SHAPES:
        for kind in ("topk", "batchtopk", "threshold"):
            kernels.set_threads(max(threads))
            state, rule, batches = warm_state(d_in, expansion * d_in, k, kind)
            for count in threads:
                kernels.set_threads(count)
                print(line(state, rule, batches, k, count), flush=True)


def line(state: TrainState, rule: Rule, batches: list[torch.Tensor], k: int, threads: int) -> str:
    """One row of the table."""
    exact, narrow = StepSettings(LR), StepSettings(LR, matmul="bf16")
    own = [copy_of(state) for _ in range(3)]
    x, params = batches[0], state.params
    centred, everything = x - params.b_pre, torch.cat([t.flatten() for t in flat(state)])
    out, x16, w16 = torch.empty(BATCH, len(params.b_enc)), centred.bfloat16(), params.W_enc.bfloat16()
    out16 = out.bfloat16()
    active = []
    times = medians(
        lambda i: reference.train_step(own[0], batches[i % len(batches)], rule, exact),
        lambda i: active.append(cpu.train_step(own[1], batches[i % len(batches)], rule, exact)[1]),
        lambda i: cpu.train_step(own[2], batches[i % len(batches)], rule, narrow),
        lambda i: torch.mm(centred, params.W_enc.T, out=out),
        lambda i: torch.mm(x16, w16.T, out=out16),
        lambda i: everything.mul_(1.0),
    )
    plain, fp32, bf16, product, product16, memory = times
    d_sae, d_in = params.W_enc.shape
    return (
        f"{d_in:4} {d_sae:5} {k:3} {rule.kind:9} {threads:3} | {plain:9.1f} {fp32:8.1f} {bf16:8.1f} | "
        f"{plain / fp32:4.1f}x {plain / bf16:4.1f}x | {product:12.1f} {product16:5.1f} {memory:6.1f} | "
        f"{statistics.mean(active) / BATCH:5.0f}"
    )


def medians(*functions: Callable[[int], object]) -> list[float]:
    """Median time of each function in ms; they take turns, so that the machine's load varies alike for all."""
    times: list[list[float]] = [[] for _ in functions]
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS or turn < 4:
        for function, own in zip(functions, times, strict=True):
            before = time.perf_counter()
            function(turn)
            own.append(1e3 * (time.perf_counter() - before))
        turn += 1
    return [statistics.median(own[1:]) for own in times]


def warm_state(d_in: int, d_sae: int, k: int, kind: str) -> tuple[TrainState, Rule, list[torch.Tensor]]:
    """A state after some steps, its rule, and batches of rows."""
    batches = [rows(d_in, seed) for seed in range(8)]
    state = TrainState.start(start_params(d_in, d_sae))
    rule = rule_for(kind, k, state.params, batches[0])
    for step in range(WARM_UP):
        cpu.train_step(state, batches[step % len(batches)], rule, StepSettings(LR, matmul="bf16"))
    return state, rule_for(kind, k, state.params, batches[0]), batches


def rule_for(kind: str, k: int, params: Params, x: torch.Tensor) -> Rule:
    if kind != "threshold":
        return Rule(kind, k)
    pre = torch.addmm(params.b_enc, x - params.b_pre, params.W_enc.T)
    return Rule(kind, 0, pre.flatten().kthvalue(pre.numel() - k * len(x)).values.item())


def rows(d_in: int, seed: int) -> torch.Tensor:
    """A batch (BATCH, d_in) of rows: median norm 145, a decaying spectrum, one row in 200 a sink."""
    fixed, generator = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + seed)
    mix = torch.randn(d_in, d_in, generator=fixed) * torch.logspace(0, -1.5, d_in)[:, None]
    sink = torch.randn(d_in, generator=fixed)
    x = torch.randn(BATCH, d_in, generator=generator) @ mix
    x *= 145 / x.norm(dim=1).median()
    places = torch.randperm(BATCH, generator=generator)[: max(1, BATCH // 200)]
    x[places] += 25_000 * sink / sink.norm()
    return x


def start_params(d_in: int, d_sae: int) -> Params:
    generator = torch.Generator().manual_seed(0)
    w_enc = (torch.rand(d_sae, d_in, generator=generator) * 2 - 1) / d_in**0.5
    w_dec = torch.randn(d_sae, d_in, generator=generator)
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    return Params(w_enc, torch.zeros(d_sae), w_dec, torch.zeros(d_in), torch.zeros(d_in))


def flat(state: TrainState) -> list[torch.Tensor]:
    return [*state.params, *state.m, *state.v]


def copy_of(state: TrainState) -> TrainState:
    parts = (Params(*(t.clone() for t in part)) for part in (state.params, state.m, state.v))
    return TrainState(*parts, state.step)


if __name__ == "__main__":
    main()
