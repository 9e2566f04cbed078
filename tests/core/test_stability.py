"""Matching two SAEs' latents: by hand, and against a slow computation that shares nothing with it."""

import itertools
import math

import pytest
import torch
from ground_truth import recovered

from saegrid.config.run_config import make_config
from saegrid.core.sae import JumpReLU, TopK, initial_sae
from saegrid.core.stability import activity, coherence, matched, movement, random_cosine
from saegrid.errors import ConfigError
from saegrid.kernels import cpu, reference

pytest.importorskip("scipy")


def sae_of(W_enc, W_dec, arch=JumpReLU, k=0):
    W_enc, W_dec = torch.as_tensor(W_enc).float(), torch.as_tensor(W_dec).float()
    sae = arch(W_dec.shape[1], len(W_dec), k=k)
    sae.W_enc.data, sae.W_dec.data = W_enc.clone(), W_dec.clone()
    return sae


def compare(one, other, rows, kernel=reference, given=()):
    return matched(one, other, activity(one, rows, kernel), activity(other, rows, kernel), given)


def test_by_hand():
    """Three latents in the plane; the second SAE has them in another order, one turned, and one that never fires."""
    one = sae_of([[1, 0], [0, 1], [-1, 0]], [[1, 0], [0, 1], [-1, 0]])
    # its latent 2 is latent 0 turned by 0.8, its latent 0 is latent 1 with an encoder that points elsewhere
    other = sae_of([[1, 0], [0, -1], [0.6, 0.8]], [[0, 1], [0, -1], [0.8, 0.6]])
    x = torch.tensor([[2.0, 1.0], [-3.0, 1.0]])
    # pre-activations: (2, 1, -2), (-3, 1, 3) and (2, -1, 2), (-3, -1, -1): all of one's are live, 1 of other's is dead
    its, others = activity(one, [x]), activity(other, [x])
    assert its.fired.tolist() == [1, 2, 1] and others.fired.tolist() == [1, 0, 1]
    assert its.energy.tolist() == [4, 2, 9] and others.energy.tolist() == pytest.approx([4, 0, 4])
    found = compare(one, other, [x])
    # cosines of one's (0, 1, 2) with other's (0, 2): (0, .8), (1, .6), (0, -.8): 0 with 2 and 1 with 0, latent 2 alone
    assert found.latents.tolist() == [[0, 2], [1, 0]]
    assert found.decoder.tolist() == pytest.approx([0.8, 1.0])
    assert found.encoder.tolist() == pytest.approx([0.6, 0.0])
    assert found.matched_cosine == pytest.approx(0.9)
    assert (found.stable_pct, found.stable_energy_pct) == (0, 0)
    other.W_enc.data[2] = torch.tensor([1.6, 1.2])  # now at a cosine of 0.8 with (1, 0): pre-activations 4.4 and -3.6
    found = compare(one, other, [x])
    assert found.stable.tolist() == [True, False]
    assert found.stable_pct == pytest.approx(100 * 2 / 5)  # of the 3 + 2 that fire
    assert found.stable_energy_pct == pytest.approx(100 * (4 + 4.4**2) / (15 + 4 + 4.4**2))
    found = compare(one, other, [x], given=(0,))
    assert found.latents.tolist() == [[1, 2]] and found.stable_pct == 0


def slow(one, other, rows):
    """All of it in float64 from the definition: every assignment tried, every sum a loop."""
    acts = [sae.encode(rows).double() for sae in (one, other)]
    live = [[j for j in range(sae.d_sae) if (z[:, j] > 0).any()] for sae, z in zip((one, other), acts, strict=True)]
    unit = [
        {name: [w / w.norm() for w in getattr(sae, name).double()] for name in ("W_dec", "W_enc")}
        for sae in (one, other)
    ]
    small, large = sorted((0, 1), key=lambda s: len(live[s]))

    def cosine(i, j, name="W_dec"):
        return float(unit[small][name][i] @ unit[large][name][j])

    best = max(
        (list(zip(live[small], some, strict=True)) for some in itertools.permutations(live[large], len(live[small]))),
        key=lambda pairs: sum(cosine(i, j) for i, j in pairs),
    )
    stable = [(i, j) for i, j in best if cosine(i, j) > 0.7 and cosine(i, j, "W_enc") > 0.7]
    total = kept = 0.0
    for side, sae in ((small, (one, other)[small]), (large, (one, other)[large])):
        for j in live[side]:
            energy = sum(float(z) ** 2 for z in acts[side][:, j]) * float(sae.W_dec[j].double().square().sum())
            total += energy
            kept += energy if j in [pair[side != small] for pair in stable] else 0.0
    share = 100 * 2 * len(stable) / (len(live[0]) + len(live[1]))
    return share, 100 * kept / total, sum(cosine(i, j) for i, j in best) / len(best)


@pytest.mark.parametrize("seed", range(4))
def test_against_a_slow_computation(seed):
    generator = torch.Generator().manual_seed(seed)
    W_dec, noise = torch.randn(2, 8, 6, generator=generator)
    W_enc = W_dec + 0.1 * torch.randn(8, 6, generator=generator)
    order = torch.randperm(8, generator=generator)
    scale = torch.rand(8, 1, generator=generator) * torch.tensor([[0.1] * 4 + [3.0] * 4]).T.reshape(8, 1)
    one, other = (
        sae_of(W_enc, W_dec, TopK, 3),
        sae_of((W_enc + scale * noise)[order], (W_dec + scale * noise)[order], TopK, 3),
    )
    one.b_enc.data[1] = -100.0  # dead
    rows = torch.randn(50, 6, generator=generator)
    found, (share, energy, cosine) = compare(one, other, rows.split(20), cpu), slow(one, other, rows)
    assert 0 < share < 100
    assert found.stable_pct == pytest.approx(share, rel=1e-6)
    assert found.stable_energy_pct == pytest.approx(energy, rel=1e-6)
    assert found.matched_cosine == pytest.approx(cosine, rel=1e-6)
    back = compare(other, one, rows.split(50), cpu)
    assert back.stable_energy_pct == pytest.approx(energy, rel=1e-6) and back.stable_pct == found.stable_pct


def test_an_sae_is_stable_against_itself_and_a_random_one_is_at_the_random_level():
    def start(seed):
        return initial_sae(
            make_config(arch="TopK", k=8, expansion=8, recipe="improved", seed=seed), 32, torch.zeros(32)
        )

    rows = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    same = compare(start(0), start(0), [rows], cpu)
    assert (same.stable_pct, same.matched_cosine) == (100, pytest.approx(1))
    assert same.stable_energy_pct == pytest.approx(100)
    found = compare(start(0), start(1), [rows], cpu)
    assert found.matched_cosine == pytest.approx(found.random_cosine, abs=0.01)
    assert found.random_cosine == random_cosine(256, 256, 32)


def test_movement_is_the_cosine_with_the_start():
    begin = sae_of(torch.zeros(3, 2), [[1, 0], [0, 1], [0.6, 0.8]])
    turned = sae_of(torch.zeros(3, 2), [[1, 0], [math.sqrt(0.5), math.sqrt(0.5)], [-0.6, -0.8]])
    assert movement(turned, begin).tolist() == pytest.approx([1, math.sqrt(0.5), -1])


def test_recovery_by_hand():
    """Two latents close to the first of three directions, one that points against the third, one dead."""
    directions = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    sae = sae_of([[1, 0, 0], [1, 0, 0], [0, 0, -1], [0, -1, 0]], [[1, 0, 0], [0.8, 0.6, 0], [0, 0, -1], [0, 0, 1]])
    x = torch.tensor([[1.0, 0, 0], [3, 0, -1], [-1, 2, 0], [0, 1, -2]])
    is_in = torch.tensor([[True, False, False], [True, False, False], [False, True, False], [True, True, True]])
    found = recovered(sae, directions, [(x[:3], is_in[:3]), (x[3:], is_in[3:])])
    # |cosines| with the directions: (1, 0, 0), (.8, .6, 0), (0, 0, 1), (0, 0, 1): matched 1, .6 and 1
    assert found.mcc == pytest.approx((1 + 0.6 + 1) / 3)
    # latents 0, 1 fire on rows 0, 1 where direction 0 is in rows 0, 1, 3: F1 = 4 / 5; 2 on 1, 3, where 2 is in 3: 2 / 3
    assert found.f1 == pytest.approx((0.8 + 0.8 + 2 / 3 + 0) / 4)
    assert found.uniqueness == 2 / 4


@pytest.mark.parametrize("seed", range(3))
def test_recovery_and_coherence_against_a_slow_computation(seed):
    """Every assignment, every row and every pair in float64, from the definitions."""
    generator = torch.Generator().manual_seed(seed)
    W_dec, W_enc = torch.randn(2, 7, 5, generator=generator)
    directions, rows = torch.randn(4, 5, generator=generator), torch.randn(60, 5, generator=generator)
    is_in = torch.rand(60, 4, generator=generator) < 0.4
    sae = sae_of(W_enc, W_dec, TopK, 2)
    sae.b_enc.data[3] = -100.0  # dead
    found = recovered(sae, directions, zip(rows.split(25), is_in.split(25), strict=True), cpu)
    units, true = ([w / w.norm() for w in some.double()] for some in (W_dec, directions))
    cosines = [[abs(float(w @ d)) for d in true] for w in units]
    best = max(sum(cosines[i][j] for j, i in enumerate(some)) for some in itertools.permutations(range(7), 4))
    assert found.mcc == pytest.approx(best / 4, rel=1e-6)
    z, f1, closest = sae.encode(rows), 0.0, []
    for i in range(7):
        j = max(range(4), key=lambda j: cosines[i][j])
        closest.append(j)
        hits = sum(bool(z[t, i] > 0) and bool(is_in[t, j]) for t in range(60))
        fires, there = (sum(map(bool, some)) for some in (z[:, i] > 0, is_in[:, j]))
        precision, recall = hits / fires if fires else 0.0, hits / there
        f1 += 2 * precision * recall / (precision + recall) / 7 if hits else 0.0
    assert found.f1 == pytest.approx(f1, rel=1e-6) and found.uniqueness == len(set(closest)) / 7
    live = (z > 0).any(0)
    pairs = [abs(float(units[i] @ units[j])) for i, j in itertools.combinations(live.nonzero()[:, 0].tolist(), 2)]
    assert len(pairs) == 15 and coherence(sae, live, chunk=4) == pytest.approx(sum(pairs) / 15, rel=1e-6)


def test_coherence_by_hand():
    sae = sae_of(torch.zeros(4, 2), [[1, 0], [0, 2], [-3, -4], [1, 1]])
    # |cosines| of the first three: 0, 0.6, 0.8
    assert coherence(sae, torch.tensor([True, True, True, False])) == pytest.approx(1.4 / 3)
    assert math.isnan(coherence(sae, torch.tensor([True, False, False, False])))


def test_what_can_not_be_matched_is_one_line():
    one, other = sae_of(torch.eye(2), torch.eye(2)), sae_of(torch.eye(3), torch.eye(3))
    with pytest.raises(ConfigError, match=r"d_in = 3: must be the first SAE.s, 2"):
        matched(one, other, activity(one, []), activity(other, []))
    with pytest.raises(ConfigError, match="JumpReLU has no latent that fires"):
        compare(one, one, [-torch.ones(4, 2)])
