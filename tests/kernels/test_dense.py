"""The `dense` kernel against the reference, on the CPU and, where there is one, on a GPU."""

import json
import os

import pytest
import torch
from kernel_cases import CASES, D_SAE, IMPROVED, MATRYOSHKA, PUBLISHED, RULES, apart, begin, make_rows, on
from tiny import save_dataset, save_model

from saegrid import kernels
from saegrid.config.run_config import make_config
from saegrid.data.store import received, sent
from saegrid.errors import ConfigError
from saegrid.experiment.run import Run
from saegrid.kernels import dense, reference
from saegrid.kernels.state import Rule

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs and streams run there")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
pytestmark = pytest.mark.usefixtures("one_thread")
ALL = pytest.mark.parametrize(("rule", "settings"), CASES.values(), ids=CASES)


@pytest.mark.parametrize("device", DEVICES)
@ALL
def test_steps_are_the_references(rule, settings, device):
    """Batches of several sizes; AuxK with few and with many dead latents."""
    expected, actual = begin(rule, settings), begin(rule, settings, device)
    for step, n in enumerate([200, 200, 37, 200, 64, 200]):
        x = make_rows(n, step)
        loss, active = reference.train_step(expected, x, rule, on("cpu", rule, settings))
        mine, its_active = dense.train_step(actual, x.to(device), rule, on(device, rule, settings))
        assert mine.item() == pytest.approx(loss, rel=1e-5)
        assert abs(its_active.item() - active) <= 1 + 1e-3 * active
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert apart(mine.cpu(), theirs) < 1e-5
    assert float(actual.l1) == pytest.approx(expected.l1, rel=1e-3)
    assert (actual.quiet.cpu() == expected.quiet).double().mean() > 0.98


@pytest.mark.parametrize("dead", [0, 5, 20, 21, 150])
def test_auxk_with_any_number_of_dead_latents(dead):
    rule, settings = Rule("topk", 9), PUBLISHED._replace(aux_coef=1.0, dead_after=10_000)
    expected, actual = begin(rule, settings), begin(rule, settings)
    for state in (expected, actual):
        state.quiet[:dead] = 20_000
    for step in range(3):
        for kernel, state in ((reference, expected), (dense, actual)):
            kernel.train_step(state, make_rows(100, step), rule, settings)
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert apart(mine, theirs) < 1e-5


def test_latents_that_die_between_two_counts_are_seen(monkeypatch):
    """The host counts dead latents every few steps; the steps between must not miss one."""
    monkeypatch.setattr(dense, "LOOK_AHEAD", 4)
    rule = Rule("topk", 2)
    settings = PUBLISHED._replace(lr=1e-4, aux_coef=1.0, dead_after=1000, batch_size=50)
    expected, actual = begin(rule, settings), begin(rule, settings)
    rooms = set()
    for step in range(60):
        for kernel, state in ((reference, expected), (dense, actual)):
            kernel.train_step(state, make_rows(50, step), rule, settings)
        rooms |= {step.room for step in actual.workspace["dense"].values() if isinstance(step, dense._Step)}
    assert (expected.quiet >= 1000).any() and {0, 20} <= rooms
    for mine, theirs in zip(actual.params, expected.params, strict=True):
        assert apart(mine, theirs) < 1e-6


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_values_at_the_cut_are_all_kept(value):
    pre = torch.full((7, 12), value)
    assert (pre >= dense._smallest_kept(pre, 5, True)).all() and (pre >= dense._smallest_kept(pre, 30, False)).all()


@pytest.mark.parametrize("digit", [1, 2, 3, 4, 5])
def test_the_cut_is_exact(monkeypatch, digit):
    monkeypatch.setattr(dense, "DIGIT", digit)
    monkeypatch.setattr(dense, "ROW_DIGIT", digit)
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(30, 500, generator=generator).exp() * torch.randn(30, 500, generator=generator).sign()
    for k in (1, 17, 200):
        assert ((pre >= dense._smallest_kept(pre, k, True)).sum(1) == k).all()
        assert (pre >= dense._smallest_kept(pre, torch.tensor(30 * k - 7), False)).sum() == 30 * k - 7
    assert (dense._smallest_kept(pre, 400, True) == 0).all()  # fewer are positive


def test_a_rough_cut_is_barely_lower():
    pre = torch.randn(30, 500, generator=torch.Generator().manual_seed(0))
    for by_row in (True, False):
        exact, rough = (dense._smallest_kept(pre, 17, by_row, bits) for bits in (0, dense.ROUGH))
        assert (rough <= exact).all() and (rough > exact * (1 - 1 / 4000)).all() and (rough != exact).any()


@pytest.mark.parametrize(("rule", "settings"), [(RULES[1], MATRYOSHKA), (RULES[3], IMPROVED), (RULES[5], IMPROVED)])
def test_a_run_is_one_graph_without_breaks(rule, settings):
    """Traced as for the compiler, which takes minutes on a CPU."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    traced = torch.compile(dense._step, fullgraph=True, dynamic=False, backend="eager")
    state, told = begin(rule, settings), on("cpu", rule, settings)
    numbers = dense.Numbers(*map(torch.tensor, (150.0, 1e-2, 1.0, 0.03, 0.2, 9.0, 1.0, 0.0)))
    for step in range(4):
        numbers.rows.fill_(150 + step)
        traced(state.params, state.m, state.v, state.quiet, torch.tensor(1.0), make_rows(200, step), numbers,
               rule.kind, told, D_SAE)  # fmt: skip
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("arch", ["BatchTopK", "Matryoshka", "JumpReLU", "Gated"])
def test_short_trainings_end_equally_well(tmp_path, arch):
    """Validation MSE of the two kernels over a whole run of the improved recipe differs by less than 1%."""
    found = {}
    for kernel in ("reference", "dense"):
        run = tiny_run(tmp_path, kernel, arch=arch, recipe="improved", epochs=4, prefixes=2 * (arch == "Matryoshka"))
        run.train()
        found[kernel] = run.evaluate()
        assert run.curve.step.max() == 8
    assert found["dense"]["val_mse"] == pytest.approx(found["reference"]["val_mse"], rel=0.01)
    assert found["dense"]["l0"] == pytest.approx(found["reference"]["l0"], rel=0.02)


def test_l1_of_a_checkpoint_is_a_number(tmp_path):
    run = tiny_run(tmp_path, "dense", arch="ReLU", recipe="improved")
    run.train()
    assert run.evaluate()["val_mse"] > 0


def tiny_run(folder, kernel, **parameters):
    """A whole run, from a language model to metrics."""
    model, dataset = save_model(folder / "model"), save_dataset(folder / "data", train=12)
    places = {"runs_dir": str(folder / kernel), "store_dir": str(folder / "stores")}
    size = {"expansion": 2, "k": 3, "epochs": 2, "batch_size": 32, "lr": 1e-2, "layer": 1, "device": "auto"}
    rows = {"train_tokens": 60, "val_tokens": 30, "eval_prompts": 2, "max_tokens": 24}
    own = size | rows | parameters
    return Run(make_config(model=model, dataset=dataset, kernel=kernel, matmul="fp32", **places, **own))


# --- which kernel and device ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"^device = 'cuda': torch \S+ finds no GPU here; use 'cpu' or 'auto'$"):
        kernels.choose("auto", "auto", 0, "cuda")
    assert kernels.choose("auto", "fp32", 1)[::3] == ("cpu", "cpu")
    assert kernels.choose("dense", "fp32", 1) == ("dense", "fp32", 1, "cpu")


def test_the_cpu_kernel_is_refused_on_a_gpu():
    with pytest.raises(ConfigError, match="kernel = 'cpu': runs on device = 'cpu' only"):
        kernels.choose("cpu", "auto", 0, "cuda")


@pytest.mark.parametrize(("share", "threads"), [("1", 1), ("", None), ("100000", None), ("2,3", None)])
def test_threads_are_the_share_that_snakemake_gives(monkeypatch, share, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", share)
    assert kernels.choose("reference", "fp32", 0).threads == (threads or len(os.sched_getaffinity(0)))


# --- on a GPU ---


@needs_gpu
@pytest.mark.parametrize("matmul", ["fp32", "bf16"])
@ALL
def test_a_step_never_waits_and_repeats_its_bytes(rule, settings, matmul):
    told = on("cuda", rule, settings)._replace(matmul=matmul)
    states = [begin(rule, settings, "cuda") for _ in range(2)]
    batches = [make_rows(n, n).cuda() for n in (128, 128, 50, 128, 50)]
    losses = [[dense.train_step(state, x, rule, told)[0] for x in batches] for state in states]  # captured by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        for state, some in zip(states, losses, strict=True):
            some += [dense.train_step(state, x, rule, told)[0] for x in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*(torch.stack(some) for some in losses))
    for one, two in zip(states[0].params, states[1].params, strict=True):
        assert torch.equal(one, two)


@needs_gpu
def test_batches_arrive_on_the_gpu_as_they_are_stored():
    batches = [make_rows(64, seed).half() for seed in range(9)]
    arrived = list(received(sent(iter(batches), "cuda")))
    for mine, theirs in zip(arrived, batches, strict=True):
        assert mine.is_cuda and torch.equal(mine.cpu(), theirs.float())


@needs_gpu
def test_a_whole_run_on_a_gpu(tmp_path):
    found = {}
    for kernel in ("reference", "dense"):
        run = tiny_run(tmp_path, kernel)
        run.train()
        run.evaluate()
        found[kernel] = json.loads((run.folder / "metrics.json").read_text())
        assert torch.load(run.folder / f"{run.config.name}.pt", weights_only=True)["b_pre"].device.type == "cpu"
    for name in ("val_mse", "fvu", "l0", "dead_pct", "ce_clean", "ce_spliced", "inference_threshold"):
        assert found["dense"][name] == pytest.approx(found["reference"][name], rel=2e-3), name
