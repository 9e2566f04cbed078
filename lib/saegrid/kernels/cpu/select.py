"""Compiled loops of the `cpu` kernel: which pre-activations a code keeps.

N rows, d_sae latents. A loop with `first, last, edges` does the chunks `first` to `last - 1`, where chunk c is edges[c]
to edges[c + 1], and releases the interpreter's lock, so that `chunks.run` can use plain threads.

The cut is exact and nothing is sorted: a sample gives a bound a little below it, the few values above the bound are
listed, and bisection on their bits finds the cut among them.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

# fastmath without nnan and ninf: a diverging run must show a loss of NaN or infinity.
# Not shared: the cache on disk sees changes of its own file only, so no compiled code crosses modules.
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
ZERO = np.float32(0)
ROW_SAMPLE = 512  # about this many values of a row estimate its cut
SAMPLE_STRIDE = 61  # of the whole batch; prime, so that the sample visits all columns


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

    sample: the positive values (n) among every stride-th one.
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
def list_above(first, last, edges, pre, bias, bounds, k, latents, values, counts):
    """Entries of pre + bias above their row's bound (N,), at the front of the rows of `latents`, `values` (N, d_sae).

    With k > 0: the k largest positive ones of each row; `bounds` are not used then.
    """
    width = pre.shape[1]
    row, sample = np.empty(width, np.float32), np.empty(width + 1, np.float32)
    for n in range(edges[first], edges[last]):
        for i in range(width):
            row[i] = as_float(pre[n, i]) + bias[i]
        low = row_bound(row, k, sample) if k > 0 else bounds[n]
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
    """Move the entries above `cut` and the first `ties` equal to it to places `kept` on. Returns end and ties left."""
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
    """Pack rows of lists (N, d_sae) into one list (CSR)."""
    for n in range(edges[first], edges[last]):
        start = offsets[n]
        for i in range(offsets[n + 1] - start):
            latents[start + i] = wide_latents[n, i]
            values[start + i] = wide_values[n, i]


@compiled
def split_by_prefix(offsets, latents, values, ends, new_offsets, new_latents, new_values):
    """One list per dictionary, concatenated: rows g N to (g + 1) N hold the latents ends[g - 1] to ends[g]."""
    n_rows, place = len(offsets) - 1, 0
    new_offsets[0] = 0
    next_one = offsets[:-1].copy()
    for g in range(len(ends)):
        for n in range(n_rows):
            i = next_one[n]
            while i < offsets[n + 1] and latents[i] < ends[g]:
                new_latents[place], new_values[place] = latents[i], values[i]
                place += 1
                i += 1
            next_one[n] = i
            new_offsets[g * n_rows + n + 1] = place


@compiled
def cut_batch(offsets, latents, values, cut, ties):
    """Keep the entries above `cut`, and the first `ties` equal to it, in place."""
    kept, stop = 0, 0
    for n in range(len(offsets) - 1):
        start, stop = stop, offsets[n + 1]
        kept, ties = cut_row(latents, values, start, stop, latents, values, kept, cut, ties)
        offsets[n + 1] = kept
