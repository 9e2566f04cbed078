"""Fuzz one parser by coverage: `python tests/fuzz/fuzz.py TARGET CORPUS_DIR [libFuzzer options]`.

Needs the extra `fuzz` (atheris). Stops at the first exception that is not the project's own, and leaves its input.

    python tests/fuzz/fuzz.py grid /tmp/corpus/grid -max_total_time=600
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["saegrid", "yaml"]):
    import targets


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-", dir=memory if memory.is_dir() else None))
    for number, seed in enumerate(targets.seeds(target, scratch / "seeds")):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [sys.argv[0], str(corpus), "-max_len=65536", "-rss_limit_mb=4000", "-timeout=20", *sys.argv[3:]],
        lambda data: targets.check(target, data, scratch / "input"),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
