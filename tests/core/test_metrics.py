import math

import pytest
import torch

from saegrid.core.metrics import Moments, Reconstruction, sink_norm, splice_metrics
from saegrid.kernels.state import Codes

X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
X_HAT = torch.tensor([[1.0, 1.0], [3.0, 0.0], [2.0, 1.0]])
LATENTS, VALUES = torch.tensor([0, 2, 0], dtype=torch.int32), torch.tensor([1.0, 4.0, 2.0])
OFFSETS = torch.tensor([0, 1, 2, 3])  # one latent per row


def reconstruction(parts, **options):
    sums = Reconstruction(d_sae=4, **options)
    for rows in parts:
        offsets = OFFSETS[rows.start : rows.stop + 1] - rows.start
        sums.add(X[rows], X_HAT[rows], Codes(offsets, LATENTS[rows], VALUES[rows]))
    return sums


@pytest.mark.parametrize("parts", [[slice(0, 3)], [slice(0, 1), slice(1, 3)]])
def test_by_hand_and_however_the_rows_are_batched(parts):
    result = reconstruction(parts).result()
    # errors: row 0 1, row 1 0, row 2 4; elements 6; elements' mean 9/6, mean square 23/6
    assert result["val_mse"] == pytest.approx(5 / 6)
    assert result["nmse"] == pytest.approx((5 / 6) / (23 / 6 - 2.25))
    # means (2, 1): squared distances 1+1, 1+1, 0+4
    assert result["fvu"] == pytest.approx(5 / 8)
    assert result["l0"] == pytest.approx(1.0)
    assert result["dead_pct"] == pytest.approx(50.0)
    assert result["sink_pct"] == 0


def test_sinks_are_left_out_of_one_measure_and_counted():
    result = reconstruction([slice(0, 3)], sink_norm=3.0).result()  # drops row 2, norm √13
    assert result["fvu_no_sink"] == pytest.approx(1 / 2)  # error 1; rows (1,0), (3,0) about (2,0)
    assert result["sink_pct"] == pytest.approx(100 / 3)
    assert result["fvu"] == pytest.approx(5 / 8)
    assert (result["l0_no_sink"], result["dead_pct_no_sink"]) == (1.0, 50.0)


def test_a_latent_that_fires_on_sinks_alone_is_dead_to_the_rest():
    result = reconstruction([slice(0, 3)], sink_norm=2.5).result()  # drops rows 1 and 2, norms 3 and √13
    assert (result["dead_pct"], result["dead_pct_no_sink"]) == (50.0, 75.0)


def test_firing_of_each_latent():
    sums = reconstruction([slice(0, 3)])
    assert sums.fired.tolist() == [2, 0, 1, 0]
    assert sums.act_sum.tolist() == [3.0, 0.0, 4.0, 0.0]
    assert sums.act_max.tolist() == [2.0, 0.0, 4.0, 0.0]


def test_rows_that_are_all_alike_have_no_variance_to_explain():
    sums = Reconstruction(d_sae=1)
    x = torch.ones(3, 2)
    sums.add(x, x, Codes(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)))
    assert sums.result()["val_mse"] == 0
    assert math.isnan(sums.result()["fvu"]) and math.isnan(sums.result()["nmse"])


def test_the_means_are_exact_beside_a_sink():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[::200] *= 25_000
    moments = Moments()
    for part in x.split(512):
        moments.add(part)
    x = x.double()
    assert moments.pooled_variance == pytest.approx(x.var(correction=0).item(), rel=1e-12)
    assert moments.centred == pytest.approx((x - x.mean(0)).square().sum().item(), rel=1e-12)
    assert sink_norm(x.split(512)) == 10 * x.norm(dim=1).median().item()


def test_splice_metrics_by_hand():
    result = splice_metrics(clean=2.0, spliced=2.5, zero=10.0, mean=7.0, kl=0.25)
    assert result["delta_loss"] == 0.5
    assert result["frac_rec_pct"] == 80.0
    assert result["loss_recovered_zero"] == 7.5 / 8
    assert result["loss_recovered_mean"] == 4.5 / 5
    assert math.isnan(splice_metrics(1.0, 1.0, 1.0, 1.0, 0.0)["loss_recovered_zero"])
