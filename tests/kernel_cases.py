"""Rows, weights, kinds of steps and comparisons for the tests of kernels and for `make gpu`."""

import torch

from saegrid.kernels import reference
from saegrid.kernels.state import UNDER_L1, Codes, Params, Rule, StepSettings, TrainState

D_IN, D_SAE = 48, 192
RULES = [
    Rule("topk", 9),
    Rule("batchtopk", 9),
    Rule("threshold", 0, 150.0),
    Rule("jumprelu", 9),
    Rule("relu", 9, aim=1.2),
    Rule("gated", 9, aim=0.9),
]


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


PUBLISHED = StepSettings(1e-2, aux_k=20, dead_after=300, bandwidth=3.0, l0_coef=500.0, theta_tie=2.0, batch_size=200)
SINK = torch.nn.functional.normalize(torch.arange(1.0, D_IN + 1), dim=0)
IMPROVED = PUBLISHED._replace(grad_clip=1.0, project_grad=True, aux_coef=1 / 32, sink=SINK, tie=3.0)
MATRYOSHKA = IMPROVED._replace(prefixes=(5, 40, D_SAE))
CASES = {
    f"{rule.kind} {name}": (rule, settings)
    for name, settings, rules in (
        ("published", PUBLISHED, RULES),
        ("improved", IMPROVED, RULES),
        ("matryoshka", MATRYOSHKA, RULES[:3]),
        *(
            (f"frozen {part}", IMPROVED._replace(freeze=part, start=make_params(3).W_dec), RULES[1:2])
            for part in ("decoder", "encoder", "soft")
        ),
    )
    for rule in rules
}
"""Every rule with the training choices that it takes."""


def begin(rule: Rule, settings: StepSettings, device: str = "cpu") -> TrainState:
    """A state that a rule's steps can start from."""
    params = make_params()
    if rule.kind in ("jumprelu", "gated"):
        params = params._replace(theta=torch.linspace(0, 20, D_SAE))
    if rule.kind == "gated":
        params = params._replace(gain=torch.linspace(-0.2, 0.2, D_SAE))
    if settings.sink is not None:
        reference.keep_apart(params, settings.sink)
    return start(Params(*(p.to(device) for p in params)))


def on(device: str, rule: Rule, settings: StepSettings) -> StepSettings:
    """The settings of a rule's steps on a device."""
    told = settings._replace(l1_coef=500.0) if rule.kind in UNDER_L1 else settings
    return told._replace(**{name: t.to(device) for name in ("sink", "start") if (t := getattr(told, name)) is not None})


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
