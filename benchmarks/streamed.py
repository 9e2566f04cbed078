"""A streamed run against a stored one on the same rows: time, memory, disk, loss. Writes results/trials/streamed.csv.

The language model is small and untrained, so that a million tokens take minutes on two cores; the text is the source
code of Python's standard library, one token per byte. Each run is a process of its own, and its memory is sampled.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path("results/trials/streamed.csv")
QUARTERS = (0.25, 0.5, 0.75, 1.0)
RUN = """
import json, sys
from saegrid.config.run_config import make_config
from saegrid.experiment.run import Run
run = Run(make_config(**json.loads(sys.argv[1])))
run.store
print("training", flush=True)
run.train()
print("trained", flush=True)
run.evaluate()
run.close()
"""


def main() -> None:
    """Train both and write one row each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--shuffle-rows", type=int, default=65_536)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(Path(folder, "model"))
        shared = {"model": model, "dataset": "embedded:python_code", "layer": 2, "k": 16, "expansion": 8, "epochs": 1}
        shared |= {"train_tokens": options.tokens, "recipe": "improved", "threads": 2, "eval_prompts": 20}
        streamed = {"rows": "streamed", "shuffle_rows": options.shuffle_rows}
        rows = [measured(shared | more, Path(folder, name)) for name, more in (("a", {}), ("b", streamed))]
    table = pd.DataFrame(rows)
    table.insert(0, "date", datetime.datetime.now(datetime.UTC).date().isoformat())
    table.to_csv(OUT, index=False, lineterminator="\n")
    print(table.T.to_string())


def save_model(folder: Path) -> str:
    """An untrained Llama of 4 blocks and width 64 with a token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: n for n, s in enumerate(["<end>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.2, **size)).save_pretrained(folder)
    return str(folder)


def measured(parameters: dict, folder: Path) -> dict:
    """Train a run in a process of its own. Returns its row: seconds, memory at each quarter of training, disk, loss."""
    parameters = parameters | {"runs_dir": str(folder / "runs"), "store_dir": str(folder / "stores")}
    command = [sys.executable, "-c", RUN, json.dumps(parameters)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    marks, watched = {}, psutil.Process(process.pid)
    samples: list[tuple[float, float]] = []  # seconds, MB

    def listen() -> None:
        for line in process.stdout:
            marks[line.strip()] = time.perf_counter() - started

    threading.Thread(target=listen, daemon=True).start()
    while process.poll() is None:
        try:
            samples.append((time.perf_counter() - started, watched.memory_info().rss / 1e6))
        except psutil.Error:
            break
        time.sleep(0.2)
    if process.wait():
        raise SystemExit(f"the run with {parameters} failed")
    within = [mb for seconds, mb in samples if marks["training"] <= seconds <= marks["trained"]]
    memory = {f"mb_at_{share:.0%}": round(within[int(share * (len(within) - 1))]) for share in QUARTERS}
    (metrics,) = (json.loads(path.read_text()) for path in Path(folder, "runs").glob("*/metrics.json"))
    stored = sum(path.stat().st_size for path in Path(folder, "stores").rglob("*") if path.is_file())
    return {
        "rows": parameters.get("rows", "stored"),
        "tokens": metrics["n_train_rows"],
        "store_seconds": round(marks["training"]),
        "train_seconds": round(marks["trained"] - marks["training"]),
        **memory,
        "disk_mb": round(stored / 1e6),
        **{name: metrics[name] for name in ("val_mse", "fvu_no_sink", "l0")},
    }


if __name__ == "__main__":
    main()
