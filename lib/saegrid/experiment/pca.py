"""The PCA baseline: what is lost with as many principal components as an SAE has active latents?

The components are those of the centred training rows and the same for every token, while an SAE chooses its latents
per token. Metrics, held-out rows and prompts are the same as for SAEs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saegrid import kernels
from saegrid.config.run_config import RunConfig
from saegrid.core.metrics import Moments, is_sink, sink_norm, splice_metrics
from saegrid.core.splice import evaluate, load_references, mean_losses
from saegrid.data.language_model import LM, evaluating_lm
from saegrid.data.sources import pinned
from saegrid.data.store import Store
from saegrid.errors import DamagedError
from saegrid.experiment.pca_table import COLUMNS, COMPONENTS, MEASURES
from saegrid.storage.checksums import read_sealed, write_sealed

BATCH = 4096


def make(config: RunConfig, store: Store) -> None:
    """Write the store's `pca.json` unless it exists: one record for each number in `COMPONENTS`."""
    path = store.folder / "pca.json"
    try:
        if path.exists():
            made = read_sealed(path)
            whole = all(set(COLUMNS) <= record.keys() for record in made["records"])  # else an older version wrote it
            if whole and made["data_sha256"] == store.data_sha256:
                return
    except (DamagedError, KeyError) as error:
        print(f"{error}; it is made again", flush=True)
    mean, directions = principal(store)
    choice = kernels.choose(config.kernel, config.matmul, config.threads, config.device)
    lm = evaluating_lm(pinned(config.model_copy(update=choice._asdict()), store.manifest))
    records = [_measured(config, store, lm, mean, directions[:n]) for n in COMPONENTS if n <= store.d_in]
    write_sealed(path, {"data_sha256": store.data_sha256, "records": records})


def principal(store: Store) -> tuple[Tensor, Tensor]:
    """The training rows' mean (d_in,) and principal directions (d_in, d_in), one per row, largest variance first."""
    total: Any = 0.0
    products: Any = 0.0
    for x in store.batches("train", BATCH):
        x = x.double()
        total, products = total + x.sum(0), products + x.T @ x
    mean = total / store.n_train
    _, vectors = torch.linalg.eigh(products / store.n_train - torch.outer(mean, mean))
    return mean.float(), vectors.T.flip(0).float()


def _measured(config: RunConfig, store: Store, lm: LM, mean: Tensor, directions: Tensor) -> dict[str, Any]:
    """FVU on the validation rows and losses on the prompts with only these directions (n, d_in) kept."""

    def replace(x: Tensor) -> Tensor:
        x = x.to(mean.device)  # the language model may be on a GPU
        return (x - mean) @ directions.T @ directions + mean

    limit = sink_norm(store.batches("val", BATCH))
    every, ordinary, errors = Moments(), Moments(), torch.zeros(2, dtype=torch.float64)
    for x in store.batches("val", BATCH):
        error, keep = (replace(x) - x).double().square().sum(1), ~is_sink(x, limit)
        every.add(x)
        ordinary.add(x[keep])
        errors += torch.stack([error.sum(), error[keep].sum()])
    references = load_references(store.folder, store.data_sha256)
    assert references is not None  # `prepare_store` made it
    sums = evaluate(lm, references, config.layer, replace, config.site)
    found = splice_metrics(**mean_losses(sums))
    found |= {"fvu": errors[0].item() / every.centred, "fvu_no_sink": errors[1].item() / ordinary.centred}
    return {"store_id": config.store_id, "components": len(directions), **{name: found[name] for name in MEASURES}}
