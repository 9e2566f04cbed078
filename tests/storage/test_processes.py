"""What a process asks of the system."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from saegrid.storage.processes import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1:]:
    keep_freed_memory()
for _ in range(50):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(10_000_000)  # 40 MB, above the largest threshold below which glibc keeps memory by itself
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {
        arguments: float(subprocess.check_output([sys.executable, "-c", FAULTS, *arguments], text=True))
        for arguments in ((), ("keep",))
    }
    assert faults["keep",] < 100 < faults[()]
