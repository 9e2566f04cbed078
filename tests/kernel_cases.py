"""Rows, weights and comparisons for the tests of kernels."""

import torch

from saegrid.kernels import reference
from saegrid.kernels.state import Codes, Params, TrainState

D_IN, D_SAE = 48, 192


def make_rows(n: int, seed: int = 0, d_in: int = D_IN, sinks: int = 0) -> torch.Tensor:
    """Anisotropic rows (n, d_in) of norm about 145, the first `sinks` of them of norm about 25,000."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(d_in, generator=generator).exp()
    rows = torch.randn(n, d_in, generator=generator) * scales
    rows *= 145 / rows.norm(dim=1).median()
    direction = torch.randn(d_in, generator=generator)
    rows[:sinks] += 25_000 * direction / direction.norm()
    return rows


def make_params(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> Params:
    generator = torch.Generator().manual_seed(1000 + seed)
    w_dec = torch.randn(d_sae, d_in, generator=generator)
    return Params(
        W_enc=torch.randn(d_sae, d_in, generator=generator) / d_in**0.5,
        b_enc=torch.randn(d_sae, generator=generator),
        W_dec=w_dec / w_dec.norm(dim=1, keepdim=True),
        b_dec=torch.randn(d_in, generator=generator),
        b_pre=torch.randn(d_in, generator=generator),
    )


def start(params: Params) -> TrainState:
    return TrainState.start(Params(*(p.clone() for p in params)))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference / norm of the expected value."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def dense(codes: Codes, d_sae: int = D_SAE) -> torch.Tensor:
    z = torch.zeros(len(codes.offsets) - 1, d_sae)
    z[reference._rows(codes), codes.latents.long()] = codes.values
    return z


def assert_same_codes(actual: Codes, expected: Codes, params: Params, x: torch.Tensor) -> None:
    """Equal up to rounding: a pair in only one of them lies very close to the cut."""
    assert_well_formed(actual)
    d_sae = len(params.b_enc)
    z, z_expected = dense(actual, d_sae), dense(expected, d_sae)
    scale = (x - params.b_pre).norm(dim=1, keepdim=True)  # rounding errors scale with the rows' norms
    both = (z > 0) & (z_expected > 0)
    assert ((z - z_expected).abs() <= 1e-5 * scale + 1e-5)[both].all()
    either = (z > 0) != (z_expected > 0)
    assert either.sum() <= 2 + 1e-3 * both.sum()


def assert_well_formed(codes: Codes) -> None:
    assert codes.offsets.dtype == torch.int64 and codes.latents.dtype == torch.int32
    assert codes.values.dtype == torch.float32 and (codes.values > 0).all()
    assert codes.offsets[0] == 0 and codes.offsets[-1] == len(codes.latents) == len(codes.values)
    rows = reference._rows(codes)
    keys = rows * 2**32 + codes.latents
    assert (keys.diff() > 0).all()  # latents ascend within a row, none twice
