"""An SAE's delta loss by token rarity: evaluation tokens, binned by how many training rows have the same token.

    python benchmarks/rare_tokens.py runs/RUN_ID [runs/RUN_ID ...]

A row's token is the one at its position, whose residual stream the SAE replaces. FVU is a bin's squared error / its
variance about the mean of all rows. Attention sinks are neither replaced nor counted as rows.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from saegrid.core.evaluation import replacement, scored_rows
from saegrid.core.metrics import is_sink, sink_norm
from saegrid.core.splice import load_references, scored_positions, splice, token_scores
from saegrid.data.language_model import load_lm
from saegrid.data.prompts import make_prompts
from saegrid.data.sources import pinned
from saegrid.experiment.finished_run import load_config
from saegrid.experiment.run import prepare_store
from saegrid.formats import load_sae
from saegrid.kernels import cpu as kernel

BINS = {"0": -1, "1 to 10": 0, "11 to 100": 10, "101 to 1,000": 100, "more": 1000}
"""Number of training rows with a token, and the upper end of the previous bin."""


def by_rarity(run_dir: Path) -> pd.DataFrame:
    """One row per bin: its share of the tokens, FVU, delta loss (nats/token) and share of all delta loss."""
    config, sae = load_config(run_dir, run_dir.name), load_sae(run_dir)
    if config.activations:
        sys.exit(f"{run_dir}: was trained on {config.activations}, which says nothing of its tokens")
    store = prepare_store(config)
    same = pinned(config, store.manifest)
    references, lm = load_references(store.folder, store.data_sha256), load_lm(same, device="cpu")
    prompts = make_prompts(same, lm.tokenizer)["train"]
    rows_with = Counter(prompt.tokens[position] for prompt in prompts for position in prompt.positions)
    x = torch.cat(scored_rows(references))
    limit = sink_norm([x])
    replace = replacement(sae, kernel, limit)
    final = splice(lm, references.prompts, references.x, config.layer, replace)
    clean, spliced = (token_scores(lm, references.prompts, states)["ce"] for states in (references.clean, final))
    ordinary = ~is_sink(x, limit)
    tokens = [prompt.tokens[position] for prompt in references.prompts for position in scored_positions(prompt)]
    df = pd.DataFrame({"rows": [rows_with[token] for token in tokens], "delta": spliced - clean})
    df["error"] = (x - replace(x)).double().square().sum(1).numpy()
    df["spread"] = (x - x[ordinary].mean(0)).double().square().sum(1).numpy()
    df = df[ordinary.numpy()]
    df["training rows"] = pd.cut(df["rows"], [*BINS.values(), float("inf")], labels=[*BINS])
    sums = df.groupby("training rows", observed=True).agg(
        tokens=("delta", "size"), delta=("delta", "sum"), error=("error", "sum"), spread=("spread", "sum")
    )
    return pd.DataFrame(
        {
            "tokens, %": 100 * sums["tokens"] / sums["tokens"].sum(),
            "FVU": sums["error"] / sums["spread"],
            "delta loss": sums["delta"] / sums["tokens"],
            "of all delta loss, %": 100 * sums["delta"] / sums["delta"].sum(),
        }
    )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}\n{by_rarity(Path(argument)).round(3).to_string()}\n", flush=True)
