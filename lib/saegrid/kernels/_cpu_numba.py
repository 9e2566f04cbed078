"""Compiled loops of the `cpu` kernel. N rows, d_sae latents, d_in dimensions; C chunks.

A loop with `first, last, edges` does the chunks `first` to `last - 1`, chunk c being edges[c] to edges[c + 1], and
releases the interpreter's lock: `cpu._Team` runs it in plain threads. Chunks are cut by the amount of work, never by the
number of threads, and sums that cross chunks are kept per chunk, so no result depends on who ran what.

fastmath leaves out `nnan` and `ninf`: a run that diverges must show a loss of NaN or infinity.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})

ZERO = np.float32(0)
HALF = np.float32(0.5)
TINY = np.float32(1e-30)  # a first moment below is 0: those of dead latents would end as subnormals, which are slow
ROW_SAMPLE = 512  # about as many values of a row tell where its cut lies
SAMPLE_STRIDE = 61  # prime, so that the sample visits all columns


# --- selection ---


def as_float(value):
    """A float32, or the bits of a bfloat16 as uint16, as float32."""


@overload(as_float)
def _as_float(value):
    if isinstance(value, types.Float):
        return lambda value: value
    return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)


@compiled
def from_bits(bits):
    return np.int32(bits).view(np.float32)


@compiled
def count_above(values, n, low):
    total = np.int32(0)
    for i in range(n):
        total = np.int32(total + (values[i] > low))  # 32 bits: as many lanes as floats
    return int(total)


@compiled
def kth_largest(values, n, k):
    """The k-th largest of n >= k positive floats, exactly: bisection on their bits, which order as integers do."""
    low, high = np.int32(1), np.int32(0x7F800000)
    while low < high:
        middle = np.int32(low + (high - low + 1) // 2)
        if count_above(values, n, from_bits(middle - 1)) >= k:
            low = middle
        else:
            high = np.int32(middle - 1)
    return from_bits(low)


@compiled
def bound_by_sample(sample, n, count, stride):
    """A bound, at least 0, that most likely has at least `count` values above it, and few more.

    sample: the positive ones (n) of every stride-th value.
    """
    expected = count / stride
    rank = count if stride == 1 else int(expected + 4 * math.sqrt(expected)) + 4
    return from_bits(np.float32(kth_largest(sample, n, rank)).view(np.int32) - 1) if rank <= n else ZERO


@compiled
def row_bound(row, k, sample):
    """`bound_by_sample` for the k largest of a row."""
    stride = max(1, len(row) // ROW_SAMPLE)
    n = 0
    for i in range(0, len(row), stride):
        sample[n] = row[i]
        n += row[i] > ZERO
    return bound_by_sample(sample, n, k, stride)


@compiled
def batch_bound(pre, bias, count):
    """`bound_by_sample` for the `count` largest of pre + bias."""
    n_rows, width = pre.shape
    sample = np.empty(n_rows * width // SAMPLE_STRIDE + 2, np.float32)
    n = 0
    for place in range(0, n_rows * width, SAMPLE_STRIDE):
        row, latent = divmod(place, width)
        sample[n] = as_float(pre[row, latent]) + bias[latent]
        n += sample[n] > ZERO
    return bound_by_sample(sample, n, count, SAMPLE_STRIDE)


@compiled
def list_row(row, low, latents, values):
    """Places and values of the entries above `low`, at the front of two rows of the same length. Returns how many."""
    count = 0
    for i in range(len(row)):
        latents[count] = i
        values[count] = row[i]
        count += row[i] > low
    return count


@compiled
def list_above(first, last, edges, pre, bias, bound, k, latents, values, counts):
    """The entries of pre + bias above `bound`, row by row, at the front of each row of `latents` and `values` (N, d_sae).

    With k > 0: the k largest positive ones of each row; `bound` is not used then.
    """
    width = pre.shape[1]
    row, sample = np.empty(width, np.float32), np.empty(width + 1, np.float32)
    for n in range(edges[first], edges[last]):
        for i in range(width):
            row[i] = as_float(pre[n, i]) + bias[i]
        low = row_bound(row, k, sample) if k > 0 else bound
        count = list_row(row, low, latents[n], values[n])
        if count < k and low > ZERO:  # the sample misled
            count = list_row(row, ZERO, latents[n], values[n])
        if 0 < k < count:
            cut = kth_largest(values[n], count, k)
            ties = k - count_above(values[n], count, cut)
            count = cut_row(latents[n], values[n], 0, count, latents[n], values[n], 0, cut, ties)[0]
        counts[n] = count


@compiled
def cut_row(from_latents, from_values, start, stop, latents, values, kept, cut, ties):
    """Move the entries above `cut`, and the first `ties` of those at it, to `kept` on. Returns the end, and ties left."""
    for i in range(start, stop):
        value = from_values[i]
        tied = value == cut and ties > 0
        latents[kept] = from_latents[i]
        values[kept] = value
        kept += value > cut or tied
        ties -= tied
    return kept, ties


@compiled
def pack(first, last, edges, wide_latents, wide_values, offsets, latents, values):
    """Rows of lists (N, d_sae) to one list (CSR)."""
    for n in range(edges[first], edges[last]):
        start = offsets[n]
        for i in range(offsets[n + 1] - start):
            latents[start + i] = wide_latents[n, i]
            values[start + i] = wide_values[n, i]


@compiled
def cut_batch(offsets, latents, values, cut, ties):
    """Keep the entries above `cut`, and the first `ties` of those at it, in place."""
    kept, stop = 0, 0
    for n in range(len(offsets) - 1):
        start, stop = stop, offsets[n + 1]
        kept, ties = cut_row(latents, values, start, stop, latents, values, kept, cut, ties)
        offsets[n + 1] = kept


@compiled
def recompute(first, last, edges, centred, w_enc, b_enc, offsets, latents, values):
    """Pre-activations of the listed pairs in float32."""
    width = centred.shape[1]
    for n in range(edges[first], edges[last]):
        i, stop = offsets[n], offsets[n + 1]
        while i + 4 <= stop:
            j0, j1, j2, j3 = latents[i], latents[i + 1], latents[i + 2], latents[i + 3]
            s0, s1, s2, s3 = ZERO, ZERO, ZERO, ZERO
            for c in range(width):
                x = centred[n, c]
                s0 += x * w_enc[j0, c]
                s1 += x * w_enc[j1, c]
                s2 += x * w_enc[j2, c]
                s3 += x * w_enc[j3, c]
            values[i] = s0 + b_enc[j0]
            values[i + 1] = s1 + b_enc[j1]
            values[i + 2] = s2 + b_enc[j2]
            values[i + 3] = s3 + b_enc[j3]
            i += 4
        while i < stop:
            j0 = latents[i]
            s0 = ZERO
            for c in range(width):
                s0 += centred[n, c] * w_enc[j0, c]
            values[i] = s0 + b_enc[j0]
            i += 1


# --- decoder and backward ---


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
    """CSR lists to dense rows `out` (N, d_sae), which are zero before."""
    for n in range(edges[first], edges[last]):
        for i in range(offsets[n], offsets[n + 1]):
            out[n, latents[i]] = values[i]


@compiled
def decode_rows(first, last, edges, offsets, latents, values, w_dec, bias, out):
    """Reconstructions (N, d_in), `bias` (d_in,) included."""
    width = w_dec.shape[1]
    for n in range(edges[first], edges[last]):
        for c in range(width):
            out[n, c] = bias[c]
        i, stop = offsets[n], offsets[n + 1]
        while i + 4 <= stop:
            j0, j1, j2, j3 = latents[i], latents[i + 1], latents[i + 2], latents[i + 3]
            z0, z1, z2, z3 = values[i], values[i + 1], values[i + 2], values[i + 3]
            for c in range(width):
                out[n, c] += z0 * w_dec[j0, c] + z1 * w_dec[j1, c] + z2 * w_dec[j2, c] + z3 * w_dec[j3, c]
            i += 4
        while i < stop:
            j0, z0 = latents[i], values[i]
            for c in range(width):
                out[n, c] += z0 * w_dec[j0, c]
            i += 1


@compiled
def error_rows(first, last, edges, x, x_hat, scale, square_sums):
    """x_hat to scale * (x_hat - x), in place; the squared errors' sum of each row, in float64."""
    width = x.shape[1]
    for n in range(edges[first], edges[last]):
        total = 0.0
        for c in range(width):
            error = x_hat[n, c] - x[n, c]
            total += np.float64(error) * np.float64(error)
            x_hat[n, c] = error * scale
        square_sums[n] = total


@compiled
def decoder_gradient(j, start, stop, rows, values, d_hat, w_dec, gradient, d_z):
    """Adds latent j's gradient of W_dec to a row (d_in,); writes that of each of its activations to d_z."""
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
    """Adam on latent j's encoder row and bias. params, m, v: (W_enc, b_enc, W_dec)."""
    keep1, beta2, keep2, rate, correction, eps = adam
    adam_row(params[0][j], m[0][j], v[0][j], g_enc, keep1, beta2, keep2, rate, correction, eps)
    bias = slice(j, j + 1)
    adam_row(params[1][bias], m[1][bias], v[1][bias], g_bias, keep1, beta2, keep2, rate, correction, eps)


@compiled
def apply_decoder(j, g_dec, params, m, v, adam):
    """Adam on latent j's decoder row, and the row back to norm 1."""
    keep1, beta2, keep2, rate, correction, eps = adam
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
def step_latents(first, last, edges, starts, rows, values, d_hat, centred, params, m, v, pull, project, adam):
    """Gradient and Adam of each latent while its rows are in cache; chunk c's part of b_pre's gradient in pull[c].

    The decoder's rows first, then the encoder's: each pass gathers rows of one array only, which L2 about holds.
    """
    w_enc, _, w_dec = params
    width = w_enc.shape[1]
    gradient, g_bias = np.zeros(width, np.float32), np.zeros(1, np.float32)
    for chunk in range(first, last):
        begin = starts[edges[chunk]]
        d_z = np.empty(starts[edges[chunk + 1]] - begin, np.float32)
        its_rows, its_values = rows[begin:], values[begin:]
        for j in range(edges[chunk], edges[chunk + 1]):
            start, stop = starts[j] - begin, starts[j + 1] - begin
            gradient[:] = ZERO
            decoder_gradient(j, start, stop, its_rows, its_values, d_hat, w_dec, gradient, d_z)
            if project:
                project_row(gradient, w_dec[j])
            apply_decoder(j, gradient, params, m, v, adam)
        pull[chunk] = ZERO
        for j in range(edges[chunk], edges[chunk + 1]):
            start, stop = starts[j] - begin, starts[j + 1] - begin
            gradient[:] = ZERO
            bias = add_rows(start, stop, its_rows, d_z, centred, gradient)
            if bias != ZERO:
                for c in range(width):
                    pull[chunk, c] += bias * w_enc[j, c]
            g_bias[0] = bias
            apply_encoder(j, gradient, g_bias, params, m, v, adam)


@compiled
def gradient_latents(first, last, edges, starts, rows, values, d_hat, centred, w_enc, w_dec, g_enc, g_bias, g_dec, pull):
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
            g_bias[j] = add_rows(start, stop, rows, d_z, centred, g_enc[j])
            for c in range(width):
                pull[chunk, c] += g_bias[j] * w_enc[j, c]


@compiled
def project_latents(first, last, edges, g_dec, w_dec):
    for j in range(edges[first], edges[last]):
        project_row(g_dec[j], w_dec[j])


@compiled
def apply_latents(first, last, edges, g_enc, g_bias, g_dec, params, m, v, adam):
    """Adam of each latent from gradients that are there already."""
    for j in range(edges[first], edges[last]):
        apply_decoder(j, g_dec[j], params, m, v, adam)
        apply_encoder(j, g_enc[j], g_bias[j : j + 1], params, m, v, adam)


@compiled
def apply_vector(gradient, p, m, v, adam):
    """Adam on a bias (d_in,)."""
    keep1, beta2, keep2, rate, correction, eps = adam
    adam_row(p, m, v, gradient, keep1, beta2, keep2, rate, correction, eps)
