"""Python commands in processes that are forked from one with the large imports: each starts 3 CPU seconds cheaper."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# The Hub's client is not among them: it reads the environment when it is imported.
FORKS.set_forkserver_preload(["__main__", "forked", "torch", "seaborn", "scipy.stats", "pyarrow.dataset", "httpx"])


def python(arguments, cwd, env):
    """`python -m module …` or `python -c code` with these environment variables, as `subprocess.run` gives it."""
    with tempfile.TemporaryDirectory() as folder:
        process = FORKS.Process(target=_start, args=(arguments, folder, str(cwd), dict(env)))
        process.start()
        process.join()
        texts = [Path(folder, name).read_text(encoding="utf-8") for name in ("1", "2")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _start(arguments, folder, cwd, env):
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    kind, text, *words = arguments
    sys.argv = [kind, *words]
    if kind == "-m":
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    else:
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
