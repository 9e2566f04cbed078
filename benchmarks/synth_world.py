"""SAELens' synthetic benchmark, in the peers' environment: its rows, and its own judgement of SAEs.

    python synth_world.py rows FOLDER '{"part": 4, "train_rows": 200000, "val_rows": 10000}'
    python synth_world.py train FOLDER '{"specs": [...]}'
    python synth_world.py judge FOLDER '{"rows": 20000}'

The model has the documented parameters of SynthSAEBench-16k (arXiv:2602.14687), its sizes divided by `part`. `rows`
writes it as `world/`, and `rows.safetensors`: float16 rows `train` and `val`, the directions, and which of them is in
which row of `val`. `train` trains the peers' SAEs of several calls of `peer_train.py` in one. `judge` writes
`judged.json`: the result of SAELens' evaluation for each SAE in `saes/`, on the same fresh rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    eval_sae_on_synthetic_data,
)
from safetensors.torch import save_file

BATCH = 2048


def model(part: int) -> SyntheticModel:
    """SynthSAEBench-16k with features, width and hierarchy `part` times smaller."""
    hierarchy = HierarchyConfig(
        total_root_nodes=128 // part,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    )
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=16_384 // part,
            hidden_dim=768 // part,
            firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
            hierarchy=hierarchy,
            orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
            correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            seed=42,
        )
    )


def rows(folder: Path, told: dict[str, Any]) -> None:
    source = model(told["part"])
    source.save(folder / "world")
    torch.set_grad_enabled(False)  # only from here: the model is made by gradient steps
    torch.manual_seed(0)
    tensors = {"directions": source.feature_dict.feature_vectors.detach().contiguous()}
    for split in ("train", "val"):
        parts, fires = [], []
        for start in range(0, told[f"{split}_rows"], BATCH):
            acts = source.activation_generator.sample(min(BATCH, told[f"{split}_rows"] - start))
            parts.append(source.feature_dict(acts).half())
            fires += [acts > 0] if split == "val" else []
        tensors |= {split: torch.cat(parts)} | ({"fires": torch.cat(fires)} if fires else {})
    save_file(tensors, folder / "rows.safetensors")


def train(folder: Path, told: dict[str, Any]) -> None:
    import peer_train

    for spec in told["specs"]:
        peer_train.main(spec)


def judge(folder: Path, told: dict[str, Any]) -> None:
    source, found = SyntheticModel.load_from_disk(folder / "world"), {}
    for path in sorted((folder / "saes").iterdir()):
        torch.manual_seed(1)  # the same rows for all
        sae = SAE.load_from_disk(path)
        result = eval_sae_on_synthetic_data(
            sae, source.feature_dict, source.activation_generator, num_samples=told["rows"], batch_size=BATCH
        )
        found[path.name] = result.to_log_dict()
    (folder / "judged.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"rows": rows, "train": train, "judge": judge}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))
