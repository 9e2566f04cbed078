"""Whether two SAEs that differ in their seed alone find the same latents (arXiv:2501.16615, §3)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saegrid.core.sae import SAE
from saegrid.errors import ConfigError
from saegrid.kernels import Kernel, reference

SAME = 0.7
"""A latent is stable if the cosines of its match, of decoder and of encoder rows, are both above this."""


class Activity(NamedTuple):
    """How often and how strongly each latent of an SAE fires on some rows."""

    fired: Tensor  # (d_sae,) int64: number of rows on which each fires
    energy: Tensor  # (d_sae,) float64: sum over rows of z² ‖W_dec row‖²


class Stability(NamedTuple):
    """Two SAEs' latents, matched one to one. Means and shares are over the live latents of both."""

    stable_pct: float
    stable_energy_pct: float
    matched_cosine: float  # mean over the matches of the cosine of decoder rows
    random_cosine: float  # the same for equally many random directions
    latents: Tensor  # (n, 2) int64: a latent of the first SAE and its match
    decoder: Tensor  # (n,): cosine of their decoder rows
    encoder: Tensor  # (n,)

    @property
    def stable(self) -> Tensor:
        """Which matches are stable, (n,) bool."""
        return (self.decoder > SAME) & (self.encoder > SAME)


def activity(sae: SAE, rows: Iterable[Tensor], kernel: Kernel = reference) -> Activity:
    """How often and how strongly each latent fires on the batches of rows (N, d_in), by the inference rule."""
    fired, squares = torch.zeros(sae.d_sae, dtype=torch.int64), torch.zeros(sae.d_sae, dtype=torch.float64)
    for x in rows:
        codes = sae.codes(x, kernel)
        latents, values = codes.latents.long().cpu(), codes.values.double().cpu()
        fired += torch.bincount(latents, minlength=sae.d_sae)
        squares.index_add_(0, latents, values.square())
    return Activity(fired, squares * sae.W_dec.double().square().sum(1).cpu())


def matched(one: SAE, other: SAE, its: Activity, others: Activity, given: tuple[int, ...] = ()) -> Stability:
    """Match live latents one to one so that the cosines of decoder rows have the largest sum (Hungarian algorithm).

    A latent is live if it fires on a row. If one SAE has more live latents, those without a match are not stable.
    Shares are of both SAEs' live latents: of their number (`stable_pct`), of their energy (`stable_energy_pct`).

    Args:
        its, others: what the first and the second SAE do on the same held-out rows. Leave attention sinks out: they
            would be nearly all of the energy.
        given: latents that are set, not trained (those of the attention sinks): neither matched nor counted.

    Raises:
        ConfigError: the SAEs have different d_in, or one has no live latent.
    """
    if one.d_in != other.d_in:
        raise ConfigError(f"d_in = {other.d_in}: must be the first SAE's, {one.d_in}, to match their latents")
    live = []
    for sae, activity in ((one, its), (other, others)):
        keep = activity.fired > 0
        keep[list(given)] = False
        if not keep.any():
            raise ConfigError(f"{sae.arch} has no latent that fires on these rows, so none can be matched")
        live.append(keep.nonzero()[:, 0])
    a, b = live
    first, second = _assigned(_rows(one.W_dec, a) @ _rows(other.W_dec, b).T)
    latents = torch.stack([a[first], b[second]], 1)
    decoder, encoder = (
        (_rows(getattr(one, name), latents[:, 0]) * _rows(getattr(other, name), latents[:, 1])).sum(1)
        for name in ("W_dec", "W_enc")
    )
    found = Stability(
        0.0, 0.0, decoder.mean().item(), random_cosine(len(a), len(b), one.d_in), latents, decoder, encoder
    )
    stable = latents[found.stable]  # (n_stable, 2)
    energy = its.energy[stable[:, 0]].sum() + others.energy[stable[:, 1]].sum()
    return found._replace(
        stable_pct=100 * stable.numel() / (len(a) + len(b)),
        stable_energy_pct=100 * (energy / (its.energy[a].sum() + others.energy[b].sum())).item(),
    )


@functools.lru_cache(maxsize=64)
def random_cosine(n_one: int, n_other: int, d_in: int) -> float:
    """Mean cosine of `n_one` and `n_other` random directions, matched like latents. The same in each call."""
    generator = torch.Generator().manual_seed(0)
    one, other = (normalize(torch.randn(n, d_in, generator=generator)) for n in (n_one, n_other))
    cosines = one @ other.T
    return cosines[_assigned(cosines)].mean().item()


def coherence(sae: SAE, live: Tensor, chunk: int = 1024) -> float:
    """Mean |cosine| over pairs of live latents' decoder rows, the c_dec of arXiv:2508.16560; NaN below two.

    Args:
        live: which latents fire, (d_sae,) bool.
    """
    rows = _rows(sae.W_dec, live.nonzero()[:, 0])
    n = len(rows)
    total = sum((some @ rows.T).abs().double().sum().item() for some in torch.split(rows, chunk))
    return (total - n) / (n * (n - 1)) if n > 1 else float("nan")


def movement(sae: SAE, start: SAE) -> Tensor:
    """Cosine of each decoder row with its initial value, (d_sae,): 1 if training did not turn it."""
    return (normalize(sae.W_dec.data) * normalize(start.W_dec.data)).sum(1)


def _rows(weights: Tensor, latents: Tensor) -> Tensor:
    """Rows of some latents at unit norm, (n, d_in), on the CPU."""
    return normalize(weights.data[latents].float()).cpu()


def _assigned(cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the one-to-one assignment with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    return torch.from_numpy(rows), torch.from_numpy(columns)
