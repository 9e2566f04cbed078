"""Peak memory of collecting and of training does not grow with the rows: measured in processes of their own."""

import json
import subprocess
import sys

import pytest
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

D_IN = 128
MEASURE = """
import json, resource, sys
from saegrid.data.collect import collect
from saegrid.config.run_config import make_config
from saegrid.experiment.run import Run
step, parameters = sys.argv[1], json.loads(sys.argv[2])
config = make_config(**parameters)
if step == "collect":
    collect(config, shard_rows=2048)
else:
    run = Run(config)
    run.train()
    run.evaluate()
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    shape = {"vocab_size": 260, "hidden_size": D_IN, "intermediate_size": 128, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for split, count in (("train", 1500), ("test", 20)):
        lines = [
            json.dumps({"question": f"{split} {i}: " + "why so many? " * 14, "answer": f"{i}"}) for i in range(count)
        ]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return {"model": str(folder / "model"), "dataset": str(folder / "data")}


def test_ten_times_the_rows_take_no_more_memory(sources, tmp_path):
    """205 MB of rows instead of 20: kept in memory, they would show."""
    small = {"layer": 0, "arch": "TopK", "k": 4, "expansion": 1, "epochs": 1, "batch_size": 512, "threads": 1}
    small |= {"act_dtype": "float32", "kernel": "reference", "eval_prompts": 4, "val_tokens": 2000, **sources}
    peaks = {}
    for rows in (20_000, 200_000):
        places = {"runs_dir": str(tmp_path / f"runs{rows}"), "store_dir": str(tmp_path / f"stores{rows}")}
        for step in ("collect", "run"):
            command = [sys.executable, "-c", MEASURE, step, json.dumps(small | places | {"train_tokens": rows})]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            peaks[step, rows] = int(done.stdout.split()[-1])
    print(peaks)
    for step in ("collect", "run"):
        assert peaks[step, 200_000] < 1.1 * peaks[step, 20_000], peaks
