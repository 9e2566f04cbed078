"""Triton loops of the `cuda` kernel: values, reconstruction, gradients and Adam from lists of active pairs.

N rows, d_sae latents, d_in dimensions; all arithmetic in float32. Lists are row by row (offsets, latents, values; also
`rows`, the row of each pair) and latent by latent (starts, latent_rows, latent_values), see `select`. Sums run
in a fixed order: the same input gives the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saegrid.kernels.cuda.select import ACTIVE, DENSE, KEPT
from saegrid.kernels.reference import BETAS, EPS

BETA1, BETA2, ADAM_EPS = tl.constexpr(BETAS[0]), tl.constexpr(BETAS[1]), tl.constexpr(EPS)
RATE, CORRECTION, SCALE = (tl.constexpr(i) for i in range(3))  # places in `hyper`


@triton.jit
def recompute(
    centred, w_enc, b_enc, rows, latents, values, facts, bound, d_in, PAIRS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Pre-activations of the listed pairs in float32; 0 for those not above `bound`."""
    total = tl.where(tl.load(facts + DENSE) > 0, 0, tl.load(facts + KEPT))
    for first in range(tl.program_id(0) * PAIRS, total, tl.num_programs(0) * PAIRS):
        pair = first + tl.arange(0, PAIRS)
        valid = pair < total
        row = tl.load(rows + pair, mask=valid, other=0).to(tl.int64)
        latent = tl.load(latents + pair, mask=valid, other=0).to(tl.int64)
        products = tl.zeros((PAIRS, WIDTH), tl.float32)
        for start in range(0, d_in, WIDTH):
            column = start + tl.arange(0, WIDTH)
            mask = valid[:, None] & (column < d_in)[None, :]
            x = tl.load(centred + row[:, None] * d_in + column[None, :], mask=mask, other=0.0)
            products += x * tl.load(w_enc + latent[:, None] * d_in + column[None, :], mask=mask, other=0.0)
        value = tl.sum(products, 1) + tl.load(b_enc + latent, mask=valid, other=0.0)
        tl.store(values + pair, tl.where(value > bound, value, 0.0), mask=valid)


@triton.jit
def decode_rows(
    offsets, latents, values, w_dec, b_dec, b_pre, product, x, out, square_sums, facts, scale, d_in,
    MAY_BE_DENSE: tl.constexpr, ERROR: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Reconstructions (N, d_in), biases included; one program per row and WIDTH columns.

    MAY_BE_DENSE: if the dense path has computed `product` = z W_dec, it is used instead of the lists.
    ERROR: `out` is scale * (x_hat - x), square_sums takes the sums of squared errors, facts the number of active pairs.
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * WIDTH + tl.arange(0, WIDTH)
    inside = column < d_in
    place = row.to(tl.int64) * d_in + column
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    x_hat = tl.load(b_dec + column, mask=inside, other=0.0) + tl.load(b_pre + column, mask=inside, other=0.0)
    if MAY_BE_DENSE:
        dense = tl.load(facts + DENSE) > 0
        last = tl.where(dense, first, last)
        x_hat += tl.load(product + place, mask=inside & dense, other=0.0)
    sums, active = tl.zeros((PAIRS, WIDTH), tl.float32), tl.zeros((PAIRS,), tl.int32)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        valid = pair < last
        latent = tl.load(latents + pair, mask=valid, other=0).to(tl.int64)
        value = tl.load(values + pair, mask=valid, other=0.0)
        mask = valid[:, None] & inside[None, :]
        sums += value[:, None] * tl.load(w_dec + latent[:, None] * d_in + column[None, :], mask=mask, other=0.0)
        active += (value > 0).to(tl.int32)
    x_hat += tl.sum(sums, 0)
    if ERROR:
        error = tl.where(inside, x_hat - tl.load(x + place, mask=inside, other=0.0), 0.0)
        tl.store(out + place, error * scale, mask=inside)
        exact = error.to(tl.float64)
        tl.store(square_sums + row * tl.num_programs(1) + chunk, tl.sum(exact * exact, 0))
        if chunk == 0:
            tl.atomic_add(facts + ACTIVE, tl.sum(active, 0))
    else:
        tl.store(out + place, x_hat, mask=inside)


@triton.jit
def add_pairs(
    first, last, rows, values, d_hat, centred, w_dec, g_dec, g_enc, g_bias, column, inside, d_in, PAIRS: tl.constexpr
):  # fmt: skip
    """Adds the contribution of pairs `first` to `last - 1` under one error matrix d_hat to one latent's gradients.

    A loss with several error matrices (an auxiliary one, nested ones) calls this once for each, with its own list.
    """
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        valid = pair < last
        row = tl.load(rows + pair, mask=valid, other=0).to(tl.int64)
        value = tl.load(values + pair, mask=valid, other=0.0)
        place = row[:, None] * d_in + column[None, :]
        mask = valid[:, None] & inside[None, :]
        error = tl.load(d_hat + place, mask=mask, other=0.0)
        x = tl.load(centred + place, mask=mask, other=0.0)
        d_z = tl.where(value > 0, tl.sum(error * w_dec[None, :], 1), 0.0)
        g_dec += tl.sum(error * value[:, None], 0)
        g_enc += tl.sum(x * d_z[:, None], 0)
        g_bias += tl.sum(d_z, 0)
    return g_dec, g_enc, g_bias


@triton.jit
def adam(p, m, v, place, mask, weight, gradient, rate, correction):
    """New weights from the old ones and their gradient; stores both moments, but not the weights.

    rate = lr / (1 - beta1^t), correction = 1 / (1 - beta2^t).
    """
    first = tl.load(m + place, mask=mask, other=0.0)
    first += (1 - BETA1) * (gradient - first)
    second = BETA2 * tl.load(v + place, mask=mask, other=0.0) + (1 - BETA2) * gradient * gradient
    tl.store(m + place, first, mask=mask)
    tl.store(v + place, second, mask=mask)
    return weight - rate * tl.div_rn(first, tl.sqrt_rn(second * correction) + ADAM_EPS)


@triton.jit
def step_latents(
    starts, segments, latent_rows, latent_values, d_hat, centred, facts, hyper,
    w_enc, b_enc, w_dec, m_enc, m_bias, m_dec, v_enc, v_bias, v_dec, g_enc_all, g_bias_all, g_dec_all,
    pull, squares, d_sae, d_in,
    FROM_PAIRS: tl.constexpr, FROM_MEMORY: tl.constexpr, PROJECT: tl.constexpr, APPLY: tl.constexpr,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each latent's gradient, and Adam with the decoder's unit norm while its rows are in registers.

    FROM_PAIRS: gradients come from the lists; with FROM_MEMORY too, from memory if the dense path has computed them.
    FROM_MEMORY alone: from memory, times hyper[SCALE] (the second half of a clipped step).
    APPLY: update weights and moments; else write the gradients and each latent's sum of squares.
    pull (programs, d_in): each program's part of the sum of g_bias W_enc, b_pre's gradient through the encoder.
    """
    column = tl.arange(0, WIDTH)
    inside = column < d_in
    pulled = tl.zeros((WIDTH,), tl.float32)
    for j in range(tl.program_id(0), d_sae, tl.num_programs(0)):
        place = tl.cast(j, tl.int64) * d_in + column
        decoder = tl.load(w_dec + place, mask=inside, other=0.0)
        encoder = tl.load(w_enc + place, mask=inside, other=0.0)
        g_dec, g_enc = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        g_bias = 0.0
        if FROM_MEMORY:
            ready = True
            if FROM_PAIRS:
                ready = tl.load(facts + DENSE) > 0
            g_dec = tl.load(g_dec_all + place, mask=inside & ready, other=0.0)
            g_enc = tl.load(g_enc_all + place, mask=inside & ready, other=0.0)
            g_bias = tl.load(g_bias_all + j, mask=ready, other=0.0)
            if not FROM_PAIRS:
                scale = tl.load(hyper + SCALE)
                g_dec, g_enc, g_bias = g_dec * scale, g_enc * scale, g_bias * scale
        if FROM_PAIRS:
            first, last = tl.load(starts + j * segments), tl.load(starts + (j + 1) * segments)
            if FROM_MEMORY:
                last = tl.where(tl.load(facts + DENSE) > 0, first, last)
            g_dec, g_enc, g_bias = add_pairs(
                first, last, latent_rows, latent_values, d_hat, centred, decoder, g_dec, g_enc, g_bias,
                column, inside, d_in, PAIRS,
            )  # fmt: skip
            pulled += g_bias * encoder
        if PROJECT:
            g_dec -= tl.sum(g_dec * decoder, 0) * decoder
        if APPLY:
            rate, correction = tl.load(hyper + RATE), tl.load(hyper + CORRECTION)
            decoder = adam(w_dec, m_dec, v_dec, place, inside, decoder, g_dec, rate, correction)
            norm = tl.maximum(tl.sqrt_rn(tl.sum(decoder * decoder, 0)), 1e-12)
            tl.store(w_dec + place, tl.div_rn(decoder, norm), mask=inside)
            encoder = adam(w_enc, m_enc, v_enc, place, inside, encoder, g_enc, rate, correction)
            tl.store(w_enc + place, encoder, mask=inside)
            bias = adam(b_enc, m_bias, v_bias, j, True, tl.load(b_enc + j), g_bias, rate, correction)
            tl.store(b_enc + j, bias)
        else:
            tl.store(g_dec_all + place, g_dec, mask=inside)
            tl.store(g_enc_all + place, g_enc, mask=inside)
            tl.store(g_bias_all + j, g_bias)
            exact_dec, exact_enc, exact_bias = g_dec.to(tl.float64), g_enc.to(tl.float64), g_bias.to(tl.float64)
            square = tl.sum(exact_dec * exact_dec, 0) + tl.sum(exact_enc * exact_enc, 0) + exact_bias * exact_bias
            tl.store(squares + j, square)
    if FROM_PAIRS:
        tl.store(pull + tl.program_id(0) * d_in + column, pulled, mask=inside)


@triton.jit
def step_vectors(
    g_dec, g_pre, b_dec, m_dec, v_dec, b_pre, m_pre, v_pre, hyper, d_in, CLIP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Adam on the biases of width d_in; one program per WIDTH columns."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < d_in
    scale = 1.0
    if CLIP:
        scale = tl.load(hyper + SCALE)
    rate, correction = tl.load(hyper + RATE), tl.load(hyper + CORRECTION)
    gradient = scale * tl.load(g_dec + column, mask=inside, other=0.0)
    weight = tl.load(b_dec + column, mask=inside, other=0.0)
    tl.store(b_dec + column, adam(b_dec, m_dec, v_dec, column, inside, weight, gradient, rate, correction), mask=inside)
    gradient = scale * tl.load(g_pre + column, mask=inside, other=0.0)
    weight = tl.load(b_pre + column, mask=inside, other=0.0)
    tl.store(b_pre + column, adam(b_pre, m_pre, v_pre, column, inside, weight, gradient, rate, correction), mask=inside)
