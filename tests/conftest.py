"""What all tests share: the order of their files, and a project folder with synthetic runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import hypothesis
import pytest
from synthetic_runs import write_synthetic_run

from saegrid.config.grid import Grid

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

FIRST = ("test_kernels", "test_slurm", "test_workflow", "test_rehearse", "test_site", "test_resilience", "test_hub")
"""The kernels, compiled there once for all that copy the sources; then files of a minute: none runs last alone."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture
def one_thread():
    """Tiny tensors: threads would only wait for each other. A test that sets another number leaves no trace."""
    import torch

    from saegrid import kernels

    before = torch.get_num_threads()
    kernels.set_threads(1)
    yield
    kernels.set_threads(before)


@pytest.fixture(scope="session")
def fake_grid() -> Grid:
    """A grid on which every finding can be tested."""
    return Grid(
        name="synthetic",
        title="A synthetic grid for the tests",
        results_dir="results/synthetic",
        constants={"train_tokens": 1000, "val_tokens": 200, "threads": 1},
        axes=[
            {"arch": ["BatchTopK", "TopK"], "expansion": [4, 8, 16], "k": [64, 128, 220]},
            {"arch": ["JumpReLU"], "expansion": [4, 8], "threshold": [0.1, 0.5]},
        ],
    )


@pytest.fixture(scope="session")
def _fake_runs(tmp_path_factory, fake_grid) -> Path:
    root = tmp_path_factory.mktemp("project")
    for run in fake_grid.runs():
        write_synthetic_run(root / "runs" / run.run_id, run)
    return root


@pytest.fixture
def fake_runs(_fake_runs, tmp_path) -> Path:
    """A project folder, copied per test, with a synthetic run in `runs/` for every point of `fake_grid`."""
    root = tmp_path / "project"
    shutil.copytree(_fake_runs, root)
    return root
