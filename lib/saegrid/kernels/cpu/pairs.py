"""Compiled loops of the `cpu` kernel: work on the active (row, latent) pairs, and Adam.

N rows, d_sae latents, d_in dimensions. Pairs are listed row by row (CSR: offsets, latents, values) or latent by latent
(CSC: starts, rows, values). A loop with `first, last, edges` does the chunks `first` to `last - 1`, where chunk c is
edges[c] to edges[c + 1], and releases the interpreter's lock, so that `chunks.run` can use plain threads.
Pairs are processed four at a time: the sum's row is then loaded and stored once per four.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

# fastmath without nnan and ninf: a diverging run must show a loss of NaN or infinity.
# Not shared: the cache on disk sees changes of its own file only, so no compiled code crosses modules.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
ZERO = np.float32(0)
TINY = np.float32(1e-30)  # first moments below become 0: those of dead latents would end as slow subnormals
GROUP_FLOATS = 2**19  # number of weights that about fit a core's L2


class Slopes(NamedTuple):
    """Slopes of pairs in addition to the error's, and outputs for the gradients of theta and gain."""

    theta: np.ndarray  # (d_sae,) or (0,), like the next three
    g_theta: np.ndarray
    gain: np.ndarray
    g_gain: np.ndarray
    half_band: np.float32 = ZERO  # half of JumpReLU's bandwidth
    pull: np.float32 = ZERO  # an active pair's slope in the L0 loss
    push: np.float32 = ZERO  # an active pair's slope in L1
    n_rows: int = 0  # N; later rows belong to another loss
    gate_rows: int = 0  # the first row of the gates' own reconstruction


@compiled
def group_size(offsets, weights):
    """Number of latents per group: their weights about fit L2, and a row has about 16 active ones among them."""
    n_latents, width = weights.shape
    pairs = max(offsets[-1], 1)
    return max(GROUP_FLOATS // width, 16 * n_latents * (len(offsets) - 1) // pairs, 1)


@compiled
def end_of_group(latents, start, stop, end):
    """Place in a row's list (start to stop) of the first latent >= `end`."""
    while start < stop and latents[start] < end:
        start += 1
    return start


@compiled
def recompute(first, last, edges, centred, w_enc, b_enc, offsets, latents, values):
    """Pre-activations of the listed pairs in float32."""
    begin, done, group = edges[first], edges[last], group_size(offsets, w_enc)
    places = offsets[begin:done].copy()
    for end in range(group, len(w_enc) + group, group):
        for n in range(begin, done):
            i, stop = places[n - begin], end_of_group(latents, places[n - begin], offsets[n + 1], end)
            places[n - begin] = stop
            while i + 4 <= stop:
                j0, j1, j2, j3 = latents[i], latents[i + 1], latents[i + 2], latents[i + 3]
                s0, s1, s2, s3 = b_enc[j0], b_enc[j1], b_enc[j2], b_enc[j3]
                for c in range(w_enc.shape[1]):
                    x = centred[n, c]
                    s0 += x * w_enc[j0, c]
                    s1 += x * w_enc[j1, c]
                    s2 += x * w_enc[j2, c]
                    s3 += x * w_enc[j3, c]
                values[i], values[i + 1], values[i + 2], values[i + 3] = s0, s1, s2, s3
                i += 4
            while i < stop:
                j0 = latents[i]
                s0 = b_enc[j0]
                for c in range(w_enc.shape[1]):
                    s0 += centred[n, c] * w_enc[j0, c]
                values[i] = s0
                i += 1


@compiled
def by_latent(offsets, latents, values, starts, rows, by_latent_values):
    """CSR to latent-major lists (CSC): latent j has entries starts[j] to starts[j + 1], rows ascending."""
    starts[:] = 0
    for i in range(offsets[-1]):
        starts[latents[i] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    place = starts[:-1].copy()
    for n in range(len(offsets) - 1):
        for i in range(offsets[n], offsets[n + 1]):
            j = latents[i]
            rows[place[j]] = n
            by_latent_values[place[j]] = values[i]
            place[j] += 1


@compiled
def scatter(first, last, edges, offsets, latents, values, out):
    """CSR lists to dense rows `out` (N, d_sae), which must be zero on entry."""
    for n in range(edges[first], edges[last]):
        for i in range(offsets[n], offsets[n + 1]):
            out[n, latents[i]] = values[i]


@compiled
def add_rows(start, stop, rows, factors, x, out):
    """out (d_in,) += sum of factors[i] * x[rows[i]]. Returns the sum of the factors."""
    width = x.shape[1]
    total = ZERO
    i = start
    while i + 4 <= stop:
        n0, n1, n2, n3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        for c in range(width):
            out[c] += f0 * x[n0, c] + f1 * x[n1, c] + f2 * x[n2, c] + f3 * x[n3, c]
        total += (f0 + f1) + (f2 + f3)
        i += 4
    while i < stop:
        n0, f0 = rows[i], factors[i]
        for c in range(width):
            out[c] += f0 * x[n0, c]
        total += f0
        i += 1
    return total


@compiled
def decode_rows(first, last, edges, offsets, latents, values, w_dec, bias, out):
    """Reconstructions (N, d_in), `bias` (d_in,) included."""
    begin, done, group = edges[first], edges[last], group_size(offsets, w_dec)
    places = offsets[begin:done].copy()
    for n in range(begin, done):
        for c in range(len(bias)):
            out[n, c] = bias[c]
    for end in range(group, len(w_dec) + group, group):
        for n in range(begin, done):
            start, stop = places[n - begin], end_of_group(latents, places[n - begin], offsets[n + 1], end)
            places[n - begin] = stop
            add_rows(start, stop, latents, values, w_dec, out[n])


@compiled
def error_rows(first, last, edges, x, x_hat, scale, square_sums):
    """Replace x_hat by scale * (x_hat - x); sum each row's squared errors, in float64."""
    width = x.shape[1]
    for n in range(edges[first], edges[last]):
        total = 0.0
        for c in range(width):
            error = x_hat[n, c] - x[n, c]
            total += np.float64(error) * np.float64(error)
            x_hat[n, c] = error * scale
        square_sums[n] = total


@compiled
def prefix_error_rows(first, last, edges, x, parts, bias, scale, square_sums):
    """Replace the parts' own reconstructions (G, N, d_in) by scale * the summed errors of all prefixes with that part.

    Prefix g reconstructs with the parts 0 to g and `bias`. Sums each row's squared errors of the last one, in float64.
    """
    last_one, width = len(parts) - 1, x.shape[1]
    for n in range(edges[first], edges[last]):
        total = 0.0
        for c in range(width):
            parts[0, n, c] += bias[c]
        for g in range(1, last_one + 1):
            for c in range(width):
                parts[g, n, c] += parts[g - 1, n, c]
        for c in range(width):
            error = parts[last_one, n, c] - x[n, c]
            total += np.float64(error) * np.float64(error)
        for g in range(last_one + 1):
            for c in range(width):
                parts[g, n, c] = (parts[g, n, c] - x[n, c]) * scale
        for g in range(last_one - 1, -1, -1):
            for c in range(width):
                parts[g, n, c] += parts[g + 1, n, c]
        square_sums[n] = total


@compiled
def decoder_gradient(j, start, stop, rows, values, d_hat, w_dec, gradient, d_z):
    """Adds latent j's gradient of W_dec to a row (d_in,); writes the gradient of each of its activations to d_z."""
    width = w_dec.shape[1]
    i = start
    while i + 4 <= stop:
        n0, n1, n2, n3 = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        z0, z1, z2, z3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        d0, d1, d2, d3 = ZERO, ZERO, ZERO, ZERO
        for c in range(width):
            w = w_dec[j, c]
            e0, e1, e2, e3 = d_hat[n0, c], d_hat[n1, c], d_hat[n2, c], d_hat[n3, c]
            d0 += w * e0
            d1 += w * e1
            d2 += w * e2
            d3 += w * e3
            gradient[c] += z0 * e0 + z1 * e1 + z2 * e2 + z3 * e3
        d_z[i], d_z[i + 1], d_z[i + 2], d_z[i + 3] = d0, d1, d2, d3
        i += 4
    while i < stop:
        n0, z0 = rows[i], values[i]
        d0 = ZERO
        for c in range(width):
            e0 = d_hat[n0, c]
            d0 += w_dec[j, c] * e0
            gradient[c] += z0 * e0
        d_z[i] = d0
        i += 1


@compiled
def adam_row(p, m, v, gradient, keep1, beta2, keep2, rate, correction, eps):
    """Adam on one row, in place; returns the new squared norm.

    keep1 = 1 - beta1, keep2 = 1 - beta2, rate = lr / (1 - beta1^t), correction = 1 / (1 - beta2^t).
    """
    square_sum = ZERO
    for c in range(len(p)):
        g = gradient[c]
        first = m[c] + keep1 * (g - m[c])
        first = first if abs(first) > TINY or first != first else ZERO
        second = beta2 * v[c] + keep2 * g * g
        new = p[c] - rate * first / (np.sqrt(second * correction) + eps)
        m[c], v[c], p[c] = first, second, new
        square_sum += new * new
    return square_sum


@compiled
def apply_encoder(j, g_enc, g_bias, params, m, v, adam):
    """Adam on latent j's encoder row and bias, and the tie to its decoder row. params, m, v: (W_enc, b_enc, W_dec)."""
    keep1, beta2, keep2, rate, correction, eps, tie = adam
    w_enc, w_dec = params[0][j], params[2][j]
    adam_row(w_enc, m[0][j], v[0][j], g_enc, keep1, beta2, keep2, rate, correction, eps)
    if tie > ZERO:
        for c in range(len(w_enc)):
            w_enc[c] += tie * (w_dec[c] - w_enc[c])
    bias = slice(j, j + 1)
    adam_row(params[1][bias], m[1][bias], v[1][bias], g_bias, keep1, beta2, keep2, rate, correction, eps)


@compiled
def apply_decoder(j, g_dec, params, m, v, adam):
    """Adam on latent j's decoder row, then normalise it to 1."""
    keep1, beta2, keep2, rate, correction, eps, _ = adam
    w_dec = params[2][j]
    square_sum = adam_row(w_dec, m[2][j], v[2][j], g_dec, keep1, beta2, keep2, rate, correction, eps)
    norm = max(np.sqrt(square_sum), np.float32(1e-12))
    for c in range(len(w_dec)):
        w_dec[c] /= norm


@compiled
def project_row(gradient, w_dec):
    """Drop the part of a gradient (d_in,) along a decoder row of norm 1, in place."""
    along = ZERO
    for c in range(len(w_dec)):
        along += gradient[c] * w_dec[c]
    for c in range(len(w_dec)):
        gradient[c] -= along * w_dec[c]


@compiled
def theta_gradient(j, start, stop, rows, values, d_z, slopes):
    """Gradient of latent j's theta, from the pairs of its band; zeroes d_z of inactive pairs: W_enc gets none.

    See `reference.jumprelu_gradients`.
    """
    theta, half, total = slopes.theta[j], slopes.half_band, ZERO
    for i in range(start, stop):
        if rows[i] < slopes.n_rows and values[i] < theta + half:
            total += theta * d_z[i] + slopes.pull
        if values[i] == ZERO:
            d_z[i] = ZERO
    slopes.g_theta[j] = -total / (half + half) if half > ZERO else ZERO


@compiled
def gate_gradient(j, start, stop, rows, values, d_z, slopes):
    """Gradients of latent j's theta and gain; turns d_z of magnitudes into d_z of gates; adds L1 to the gates' own.

    See `reference.gated_gradients`.
    """
    scale, of_theta, of_gain = np.exp(slopes.gain[j]), ZERO, ZERO
    for i in range(start, stop):
        if rows[i] < slopes.n_rows:
            slope = d_z[i] if values[i] > ZERO else ZERO
            of_theta += slope
            of_gain += slope * (values[i] - slopes.theta[j])
            d_z[i] = slope * scale
        elif rows[i] >= slopes.gate_rows:
            d_z[i] += slopes.push
    slopes.g_theta[j], slopes.g_gain[j] = of_theta, of_gain


@compiled
def other_slopes(j, start, stop, rows, values, d_z, slopes):
    """Turn latent j's d_z from the error's slope into that of its pre-activations; gradients of its theta and gain."""
    if len(slopes.gain) > 0:
        gate_gradient(j, start, stop, rows, values, d_z, slopes)
    elif len(slopes.theta) > 0:
        theta_gradient(j, start, stop, rows, values, d_z, slopes)
    elif slopes.push != ZERO:
        for i in range(start, stop):
            if rows[i] < slopes.n_rows:
                d_z[i] += slopes.push


@compiled
def step_latents(
    first, last, edges, starts, rows, x_rows, values, d_hat, centred, params, m, v, pull, project, slopes, adam
):
    """Gradient and Adam of each latent while its rows are in cache; chunk c's part of b_pre's gradient in pull[c].

    A pair has a row of d_hat (`rows`) and one of centred (`x_rows`): d_hat may stack the errors of several losses.
    Decoder rows come first, then encoder rows: each pass gathers rows of one array only, which about fits L2.
    """
    w_enc, _, w_dec = params
    width = w_enc.shape[1]
    gradient, g_bias = np.zeros(width, np.float32), np.zeros(1, np.float32)
    for chunk in range(first, last):
        begin = starts[edges[chunk]]
        d_z = np.empty(starts[edges[chunk + 1]] - begin, np.float32)
        its_rows, its_x_rows, its_values = rows[begin:], x_rows[begin:], values[begin:]
        for j in range(edges[chunk], edges[chunk + 1]):
            start, stop = starts[j] - begin, starts[j + 1] - begin
            gradient[:] = ZERO
            decoder_gradient(j, start, stop, its_rows, its_values, d_hat, w_dec, gradient, d_z)
            other_slopes(j, start, stop, its_rows, its_values, d_z, slopes)
            if project:
                project_row(gradient, w_dec[j])
            apply_decoder(j, gradient, params, m, v, adam)
        pull[chunk] = ZERO
        for j in range(edges[chunk], edges[chunk + 1]):
            start, stop = starts[j] - begin, starts[j + 1] - begin
            gradient[:] = ZERO
            bias = add_rows(start, stop, its_x_rows, d_z, centred, gradient)
            if bias != ZERO:
                for c in range(width):
                    pull[chunk, c] += bias * w_enc[j, c]
            g_bias[0] = bias
            apply_encoder(j, gradient, g_bias, params, m, v, adam)


@compiled
def gradient_latents(
    first, last, edges, starts, rows, x_rows, values, d_hat, centred, w_enc, w_dec, g_enc, g_bias, g_dec, pull, slopes
):
    """As `step_latents`, but writes the gradients out instead of applying them."""
    width = w_enc.shape[1]
    d_z = np.empty(starts[edges[last]], np.float32)
    for chunk in range(first, last):
        pull[chunk] = ZERO
        for j in range(edges[chunk], edges[chunk + 1]):
            start, stop = starts[j], starts[j + 1]
            g_enc[j] = ZERO
            g_dec[j] = ZERO
            decoder_gradient(j, start, stop, rows, values, d_hat, w_dec, g_dec[j], d_z)
            other_slopes(j, start, stop, rows, values, d_z, slopes)
            g_bias[j] = add_rows(start, stop, x_rows, d_z, centred, g_enc[j])
            for c in range(width):
                pull[chunk, c] += g_bias[j] * w_enc[j, c]


@compiled
def finish_gradients(first, last, edges, g_enc, g_dec, w_dec, project, squares):
    """Drop each decoder row's part along itself, if asked; chunk c's sum of squared gradients in squares[c]."""
    for chunk in range(first, last):
        total = 0.0
        for j in range(edges[chunk], edges[chunk + 1]):
            if project:
                project_row(g_dec[j], w_dec[j])
            for c in range(w_dec.shape[1]):
                of_enc, of_dec = np.float64(g_enc[j, c]), np.float64(g_dec[j, c])
                total += of_enc * of_enc + of_dec * of_dec
        squares[chunk] = total


@compiled
def apply_latents(first, last, edges, g_enc, g_bias, g_dec, params, m, v, adam):
    """Adam on each latent, given its gradients."""
    for j in range(edges[first], edges[last]):
        apply_decoder(j, g_dec[j], params, m, v, adam)
        apply_encoder(j, g_enc[j], g_bias[j : j + 1], params, m, v, adam)


@compiled
def apply_vector(gradient, p, m, v, adam):
    """Adam on a bias (d_in,)."""
    keep1, beta2, keep2, rate, correction, eps, _ = adam
    adam_row(p, m, v, gradient, keep1, beta2, keep2, rate, correction, eps)
