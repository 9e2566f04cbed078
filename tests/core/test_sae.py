import pytest
import torch
from published import CLASSES

from saegrid.config.run_config import make_config
from saegrid.core.sae import SAE_CLASSES, BatchTopK, fold_scale, initial_sae
from saegrid.formats.run_folder import from_published, published_state_dict

SPARSITY = {arch: {"threshold": 0.4} if arch == "JumpReLU" else {"k": 5} for arch in SAE_CLASSES}
SCALED = {"ReLU": {"recipe": "improved"}, "Gated": {"recipe": "improved"}}
IN_USE = CLASSES | {"Matryoshka": CLASSES["BatchTopK"]}  # the published class that each one's file loads into


def rows(n, d_in=16, seed=0):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def published(arch):
    torch.manual_seed(1)
    return IN_USE[arch](16, 48, **SPARSITY[arch])


@pytest.mark.parametrize("arch", IN_USE)
def test_a_published_state_dict_gives_the_published_outputs(arch):
    theirs = published(arch)
    with torch.no_grad():
        theirs.b_pre.normal_()
        ours = from_published(theirs.state_dict(), arch, **SPARSITY[arch])
        x = rows(32)
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(published_state_dict(ours))
    assert (ours.encode(x) > 0).any() and not (ours.encode(x) > 0).all()


def test_a_calibrated_batchtopk_gives_a_row_the_same_code_in_any_batch():
    sae = initial_sae(make_config(arch="BatchTopK", expansion=3, k=5), 16, torch.zeros(16))
    x = rows(32) * torch.linspace(0.1, 4, 32)[:, None]
    assert not torch.equal(sae.encode(x)[:1], sae.encode(x[:1]))  # the batch cut looks at the neighbours
    sae.inference_threshold = 0.7
    assert torch.allclose(sae.encode(x)[:1], sae.encode(x[:1]), atol=1e-6)
    assert (sae.encode(x)[sae.encode(x) > 0] > 0.7).all()


def test_encode_keeps_leading_dimensions():
    sae = BatchTopK(16, 48, k=5)
    assert sae.encode(rows(12).view(3, 4, 16)).shape == (3, 4, 48)
    assert sae(rows(12).view(3, 4, 16)).shape == (3, 4, 16)


def test_the_start_is_set_by_the_seed_and_the_inits():
    def start(**changes):
        config = make_config(**{"arch": "TopK", "expansion": 3, "k": 5} | changes)
        return initial_sae(config, 16, torch.full((16,), 7.0))

    assert torch.equal(start().W_enc, start().W_enc)
    assert not torch.equal(start().W_enc, start(seed=1).W_enc)
    torch.testing.assert_close(start().W_dec.norm(dim=1), torch.ones(48))
    assert (start().b_pre == 0).all() and (start(b_pre_init="mean").b_pre == 7).all()
    assert torch.equal(start(encoder_init="decoder").W_enc, start().W_dec)
    assert start().W_enc.abs().max() <= 1 / 4  # U(±1/√d_in)


@pytest.mark.parametrize("arch", SAE_CLASSES)
def test_a_folded_scale_is_the_sae_of_scaled_rows(arch):
    torch.manual_seed(1)
    config = make_config(arch=arch, expansion=3, **SPARSITY[arch], **SCALED.get(arch, {}))
    sae = initial_sae(config, 16, torch.zeros(16))
    for bias in (sae.b_pre, sae.b_enc, sae.b_dec, sae.theta, sae.gain):
        bias.data.normal_()
    x = rows(32)
    latent_acts, x_hat = sae.encode(x), sae(x)
    fold_scale(sae, 4.0)
    torch.testing.assert_close(sae.encode(4 * x), 4 * latent_acts)
    torch.testing.assert_close(sae(4 * x), 4 * x_hat)


def test_a_folded_gate_is_the_same_sae():
    torch.manual_seed(1)
    config = make_config(arch="Gated", expansion=3, k=5, recipe="improved")
    sae = initial_sae(config, 16, torch.zeros(16))
    for vector in (sae.b_pre, sae.b_enc, sae.b_dec, sae.theta, sae.gain):
        vector.data.normal_()
    x = rows(32)
    latent_acts, x_hat = sae.encode(x), sae(x)
    sae.finish()
    assert len(sae.gain) == 0 and sae.theta.min() == 0 < sae.theta.max()
    torch.testing.assert_close(sae.encode(x), latent_acts)
    torch.testing.assert_close(sae(x), x_hat)


def test_sinks_apart_have_two_latents():
    """A sink of 100 times the rows' norm fires as many latents as any row, and is reconstructed from the start."""
    direction = torch.nn.functional.normalize(rows(1, seed=3)[0], dim=0)
    config = make_config(arch="BatchTopK", expansion=3, k=5, encoder_init="decoder")
    x, sinks = rows(400), rows(4, seed=5) + 400 * direction
    for direction_known, most in ((None, 48), (direction, 5)):
        sae = initial_sae(config, 16, torch.zeros(16), direction_known)
        counts = (sae.encode(torch.cat([x, sinks])) > 0).sum(1)
        assert counts.sum() == 404 * 5
        assert (counts[-4:] <= most + 5).all() and (counts[-4:].float().mean() > 15) == (direction_known is None)
    for weights in (sae.W_enc, sae.W_dec):
        assert torch.equal(weights[:2], torch.stack([direction, -direction]))
    assert (sae.W_enc[2:] @ direction).abs().max() < 1e-6
    assert ((sae(sinks) - sinks).norm(dim=1) < 0.02 * sinks.norm(dim=1)).all()
