"""One SAE trained by a peer's own code, in the peers' environment: `peer_train.py '{"peer": ..., "arch": ..., ...}'`.

Each peer uses its authors' recommended settings and its released package, through its own trainer if that takes rows
(SAELens, dictionary_learning), else through the step inside it (sparsify). Settings in steps or tokens for long runs
become the same share of a short one: warm-up 5%, decay over the last 20%, dead latents after 5%. Matryoshka's widths
are this project's for all. The rows contain no attention sinks. The SAE is written in the peer's own format.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

WARM_UP, DECAY, DEAD = 0.05, 0.2, 0.05
PREFIXES = 5


def batches(x: Tensor, spec: dict) -> Iterator[Tensor]:
    """Batches of the rows for `epochs` epochs, shuffled anew in each."""
    generator = torch.Generator().manual_seed(spec["seed"])
    for _ in range(spec["epochs"]):
        for index in torch.randperm(len(x), generator=generator).split(spec["batch"]):
            yield x[index]


def widths(d_sae: int) -> list[int]:
    """Matryoshka's nested dictionaries, with this project's defaults."""
    return [d_sae >> halvings for halvings in reversed(range(PREFIXES))]


def sae_lens(spec: dict, x: Tensor, steps: int, out: Path) -> None:
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    nested = spec["arch"] == "Matryoshka"
    name = "MatryoshkaBatchTopK" if nested else spec["arch"]
    make, configure = getattr(sae_lens, f"{name}TrainingSAE"), getattr(sae_lens, f"{name}TrainingSAEConfig")
    more = {"matryoshka_widths": widths(spec["d_sae"])} if nested else {}
    scaled = "expected_average_only_in"
    sae = make(configure(d_in=x.shape[1], d_sae=spec["d_sae"], k=spec["k"], normalize_activations=scaled, **more))
    samples = spec["epochs"] * len(x)
    config = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=spec["batch"],
        lr=spec["lr"],
        lr_end=0.0,
        lr_warm_up_steps=int(WARM_UP * steps),
        lr_decay_steps=int(DECAY * steps),
        dead_feature_window=int(DEAD * steps),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches(x, spec))
    trainer.activation_scaler.scaling_factor = x.shape[1] ** 0.5 / x.norm(dim=1).mean().item()
    trainer.fit()
    sae.save_inference_model(out)


def dictionary_learning(spec: dict, x: Tensor, steps: int, out: Path) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainers = {"TopK": TopKTrainer, "BatchTopK": BatchTopKTrainer, "Matryoshka": MatryoshkaBatchTopKTrainer}
    make, sizes = trainers[spec["arch"]], [0, *widths(spec["d_sae"])]
    shares = [(b - a) / spec["d_sae"] for a, b in itertools.pairwise(sizes)]
    more = {"group_fractions": shares} if spec["arch"] == "Matryoshka" else {}
    trainer = make(
        steps=steps, activation_dim=x.shape[1], dict_size=spec["d_sae"], k=spec["k"], layer=0, lm_name="none",
        lr=spec["lr"], warmup_steps=int(WARM_UP * steps), decay_start=int((1 - DECAY) * steps),
        threshold_start_step=steps // 10, seed=spec["seed"], device="cpu", **more,
    )  # fmt: skip
    trainer.dead_feature_threshold = int(DEAD * spec["epochs"] * len(x))
    norm = x.norm(dim=1).square().mean().sqrt().item()
    trainer.ae.scale_biases(1.0)
    for step, batch in enumerate(batches(x, spec)):
        trainer.update(step, batch / norm)
    trainer.ae.scale_biases(norm)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))


def sparsify(spec: dict, x: Tensor, steps: int, out: Path) -> None:
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=spec["d_sae"], k=spec["k"]), dtype=torch.float32)
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=spec["lr"]), momentum=0.95)
    optimizer.train()
    for step, batch in enumerate(batches(x, spec)):
        if step == 0:
            sae.b_dec.data.copy_(batch.mean(0))
        sae.set_decoder_norm_to_unit_norm()
        sae(batch).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()  # the averaged weights, as its trainer saves them
    sae.save_to_disk(out)


PEERS = {"sae-lens": sae_lens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}


def main(spec: dict) -> None:
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(spec["seed"])
    x = load_file(spec["rows"])["x"]
    started = time.perf_counter()
    steps = spec["epochs"] * -(-len(x) // spec["batch"])
    PEERS[spec["peer"]](spec, x, steps, Path(spec["out"]))
    print(json.dumps({"seconds": time.perf_counter() - started, "steps": steps}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
