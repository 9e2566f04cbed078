"""The `cuda` kernel: what needs no GPU (Triton's interpreter, and compiling for an H100), and what does."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from kernel_cases import apart, make_params, make_rows, start
from tiny import save_dataset, save_model

from saegrid import kernels
from saegrid.config.run_config import make_config
from saegrid.data.store import received, sent
from saegrid.errors import ConfigError
from saegrid.experiment.run import Run
from saegrid.kernels import reference
from saegrid.kernels.state import Params, Rule, StepSettings, TrainState

triton = pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 only")
GPU = kernels._missing_for_cuda() == "" and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU: CUDA graphs, streams and bf16 products run there")
RULES = [Rule("topk", 9), Rule("batchtopk", 9), Rule("threshold", 0, 150.0), Rule("threshold", 0, 0.1)]


# --- without a GPU ---


def test_in_the_interpreter():
    """A process of its own: whether Triton interprets is settled once, when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_cuda.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in [name for name in environment if name.startswith("PYTEST")]:
        del environment[name]  # this process's own test, and its worker's name
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d\d passed", done.stdout) and "skipped" not in done.stdout


class H100:
    """As much of a Triton driver as it takes to compile for a GPU that is not here."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_every_launch_of_a_step_compiles_for_an_h100(monkeypatch):
    """To machine code by NVIDIA's own assembler, with the arguments that a step passes; nothing is run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from saegrid.kernels import cuda

    compiled, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    d_in, d_sae = 96, 768
    shapes = ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,), (d_in,))
    state = TrainState(*(Params(*map(torch.zeros, shapes)) for _ in range(3)))
    monkeypatch.setattr(driver, "_active", H100())
    for rule, settings in (
        (Rule("topk", 9), StepSettings(1e-3, matmul="bf16")),
        (Rule("batchtopk", 9), StepSettings(1e-3)),
        (Rule("threshold", 0, 0.1), StepSettings(1e-3, 1.0, True, "bf16")),
    ):
        cuda.train_step(state, torch.zeros(64, d_in), rule, settings)
    expected = {"cut_rows", "batch_digits", "count_rows", "place_rows", "list_rows", "list_latents", "recompute"}
    assert set(compiled) == expected | {"decode_rows", "step_latents", "step_vectors", "product_if_dense"}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line():
    for ask in (kernels.load, lambda name: kernels.choose(name, "auto", 0)):
        with pytest.raises(ConfigError, match=r"^kernel = 'cuda': torch \S+ finds no NVIDIA GPU here; use 'cpu'"):
            ask("cuda")
    assert kernels.choose("auto", "fp32", 1).kernel == "cpu"
    assert kernels.device("cpu") == kernels.device("reference") == "cpu"


@pytest.mark.parametrize(("share", "threads"), [("1", 1), ("", None), ("100000", None), ("2,3", None)])
def test_threads_are_the_share_that_snakemake_gives(monkeypatch, share, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    assert kernels.choose("reference", "fp32", 0).threads == (threads or len(os.sched_getaffinity(0)))


# --- on a GPU ---


def on_gpu(params: Params) -> Params:
    return Params(*(p.cuda() for p in params))


@needs_gpu
@pytest.mark.parametrize(("clip", "project"), [(0.0, False), (1.0, True)])
@pytest.mark.parametrize("rule", RULES)
def test_steps_on_a_gpu_are_the_reference(rule, clip, project):
    """Eager, captured and replayed steps, a smaller batch between them."""
    from saegrid.kernels import cuda

    settings = StepSettings(1e-2, clip, project)
    expected, actual = start(make_params()), start(on_gpu(make_params()))
    for step, n in enumerate([200, 200, 37, 200, 37, 200]):
        x = make_rows(n, step, sinks=1)
        loss, active = reference.train_step(expected, x, rule, settings)
        actual_loss, actual_active = cuda.train_step(actual, x.cuda(), rule, settings)
        assert actual_loss.item() == pytest.approx(loss, rel=1e-4)
        assert abs(actual_active.item() - active) <= 1 + 2e-3 * active
    assert all(isinstance(g, torch.cuda.CUDAGraph) for g in actual.workspace["cuda"].graphs.values())
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert apart(mine.cpu(), theirs) < 1e-4


@needs_gpu
@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_never_waits_and_repeats_its_bytes(rule, matmul):
    from saegrid.kernels import cuda

    settings, states = StepSettings(1e-3, 1.0, matmul=matmul), [start(on_gpu(make_params())) for _ in range(2)]
    batches = [make_rows(n, n, sinks=1).cuda() for n in (128, 128, 50, 128, 50)]
    losses = [[cuda.train_step(state, x, rule, settings)[0] for x in batches] for state in states]  # captured by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state, some in zip(states, losses, strict=True):
            cuda._step(state, 50, rule, settings, state.workspace["cuda"])  # launch by launch
            some += [cuda.train_step(state, x, rule, settings)[0] for x in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*(torch.stack(some) for some in losses))
    for one, two in zip(states[0].params, states[1].params, strict=True):
        assert torch.equal(one, two)


@needs_gpu
@pytest.mark.parametrize("rule", RULES)
def test_bf16_selects_but_does_not_set_values_on_a_gpu(rule):
    from saegrid.kernels import cuda

    params, x = make_params(5), make_rows(256, 5)
    exact = reference.dense(reference.encode(params, x, rule), len(params.b_enc))
    codes = cuda.encode(on_gpu(params), x.cuda(), rule, "bf16")
    z = reference.dense(codes, len(params.b_enc)).cpu()
    both = (z > 0) & (exact > 0)
    assert both.sum() >= 0.97 * (exact > 0).sum()
    assert ((z - exact).abs() <= 1e-5 * x.norm(dim=1, keepdim=True))[both].all()


@needs_gpu
def test_batches_arrive_on_the_gpu_as_they_are_stored():
    batches = [make_rows(64, seed).half() for seed in range(9)]
    arrived = list(received(sent(iter(batches), "cuda")))
    for mine, theirs in zip(arrived, batches, strict=True):
        assert mine.is_cuda and torch.equal(mine.cpu(), theirs.float())


def tiny_run(folder, kernel):
    """A whole run, from a language model to metrics."""
    model, dataset = save_model(folder / "model"), save_dataset(folder / "data", train=12)
    places = {"runs_dir": str(folder / kernel), "store_dir": str(folder / "stores")}
    size = {"expansion": 2, "k": 3, "epochs": 2, "batch_size": 32, "lr": 1e-2, "layer": 1}
    rows = {"train_tokens": 60, "val_tokens": 30, "eval_prompts": 2, "max_tokens": 24}
    return Run(make_config(model=model, dataset=dataset, kernel=kernel, matmul="fp32", **places, **size, **rows))


def assert_same_metrics(folder):
    """The run's metrics by the `cuda` kernel are those by the reference."""
    found = {}
    for kernel in ("reference", "cuda"):
        run = tiny_run(folder, kernel)
        run.train()
        run.evaluate()
        found[kernel] = json.loads((run.folder / "metrics.json").read_text())
        assert torch.load(run.folder / f"{run.config.name}.pt", weights_only=True)["b_pre"].device.type == "cpu"
    for name in ("val_mse", "fvu", "l0", "dead_pct", "ce_clean", "ce_spliced", "inference_threshold"):
        assert found["cuda"][name] == pytest.approx(found["reference"][name], rel=2e-3), name


@needs_gpu
def test_a_whole_run_on_a_gpu(tmp_path):
    assert_same_metrics(tmp_path)
