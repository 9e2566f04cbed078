"""What all tests of kernels share."""

import pytest
import torch

from saegrid import kernels


@pytest.fixture(autouse=True)
def one_thread():
    """Threads as the grid has them; a test that sets another number leaves no trace."""
    before = torch.get_num_threads()
    kernels.set_threads(1)
    yield
    kernels.set_threads(before)
