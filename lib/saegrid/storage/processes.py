"""A process that ends with its parent, even if the parent is killed with -9.

`python -m saegrid.storage.processes COMMAND [ARGUMENT ...]`

The workflow binds every job to Snakemake this way, and a run binds its notebook's kernel to papermill, so that
nothing keeps writing after its workflow has ended. Linux only; elsewhere only the locks keep writers apart.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PARENT = "SAEGRID_PARENT"
"""Environment variable with the id of the process whose end also ends the command. Default: the parent process."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed when its parent ends. `parent`: the expected parent; if it has changed, exit now."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def die_with_papermill() -> None:
    """In a notebook's kernel: end with the process that started it. Elsewhere: do nothing."""
    if os.environ.get("JPY_PARENT_PID") == str(os.getppid()):
        die_with_parent()


def keep_freed_memory() -> None:
    """From now on, have glibc reuse freed memory instead of returning it to the system; elsewhere: do nothing.

    By default each large tensor takes fresh pages from the system and returns them: a fifth of the processor time of a
    language model's pass.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, 2**30)


def main(command: list[str]) -> int:
    if not command:
        print("saegrid.storage.processes: needs a command", file=sys.stderr)
        return 2
    die_with_parent(int(os.environ.pop(PARENT, os.getppid())))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"saegrid.storage.processes: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
