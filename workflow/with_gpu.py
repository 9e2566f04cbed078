"""Run a command on one free GPU of this machine: Snakemake counts GPUs but assigns none (snakemake#281).

    python workflow/with_gpu.py COMMAND [ARGUMENT ...]

Takes the lock of a free GPU, sets CUDA_VISIBLE_DEVICES to it, and releases it when the process ends: one run per GPU,
even with only one GPU. If a scheduler has already set CUDA_VISIBLE_DEVICES to one device, or there is no GPU, the
command runs unchanged.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


def main(command: list[str]) -> int:
    gpus = visible_gpus()
    given = "CUDA_VISIBLE_DEVICES" in os.environ and len(gpus) == 1
    if given or not gpus:
        return subprocess.call(command)
    folder = Path(tempfile.gettempdir()) / f"saegrid-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    while True:
        for gpu in gpus:
            try:
                with FileLock(folder / f"{gpu}.lock", timeout=0):
                    return subprocess.call(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu})
            except Timeout:
                continue
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
