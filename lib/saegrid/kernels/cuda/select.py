"""Triton loops of the `cuda` kernel: which pre-activations a code keeps, and lists of the kept pairs.

N rows, d_sae latents. Nothing is sorted: positive floats order like their bits, and a radix select over four digits
of eight bits finds the k-th largest exactly. Pre-activations are the product (float32 or bfloat16) + b_enc in
float32. Ties at the cut go to the lower row, then to the lower latent, so that the same input gives the same lists.

`facts` (int32) holds what only the device knows: how many pairs are kept, whether they are too many for the lists (the
dense path then computes the step, see `dense`), and how many are active in the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEPT, DENSE, ACTIVE = (tl.constexpr(i) for i in range(3))  # places in `facts`
DIGITS = tl.constexpr(4)
BINS = tl.constexpr(256)


@triton.jit
def pre_acts(pre, bias, row, latents, inside, d_sae):
    """float32 pre-activations of one row; 0, which no rule keeps, outside."""
    value = tl.load(pre + tl.cast(row, tl.int64) * d_sae + latents, mask=inside, other=0.0).to(tl.float32)
    return value + tl.load(bias + latents, mask=inside, other=0.0)


@triton.jit
def order_bits(value):
    """Integers in the order of the positive floats; 0 for values not above 0, NaN included."""
    return tl.where(value > 0, value.to(tl.int32, bitcast=True), 0)


@triton.jit
def count_digit(bits, prefix, LEVEL: tl.constexpr):
    """Histogram (BINS,) of digit LEVEL, 0 the most significant, among values whose higher digits are `prefix`."""
    shift: tl.constexpr = 8 * (DIGITS - 1 - LEVEL)
    candidate = bits > 0
    if LEVEL > 0:
        candidate = candidate & ((bits >> (shift + 8)) == prefix)
    return tl.histogram((bits >> shift) & (BINS - 1), BINS, mask=candidate)


@triton.jit
def pick_digit(histogram, prefix, need):
    """The digit of the need-th largest candidate: (prefix with it, how many are needed among those that share it)."""
    above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # candidates of a larger digit
    here = (above < need) & (above + histogram >= need)
    digit = tl.sum(tl.where(here, tl.arange(0, BINS), 0), 0)
    return (prefix << 8) | digit, need - tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def batch_cut(histograms, count, LEVELS: tl.constexpr):
    """The count-th largest value by LEVELS of the histograms (DIGITS, BINS): (prefix, need) as in `pick_digit`.

    (0, 0) if all digits are known and at most `count` values are positive: then all of those are kept.
    """
    prefix, need = 0, count
    few = False
    for level in tl.static_range(LEVELS):
        histogram = tl.load(histograms + level * BINS + tl.arange(0, BINS))
        if level == 0:
            few = tl.sum(histogram, 0) <= count
        prefix, need = pick_digit(histogram, prefix, need)
    if LEVELS == DIGITS:
        prefix, need = tl.where(few, 0, prefix), tl.where(few, 0, need)
    return prefix, need


@triton.jit
def cut_rows(pre, bias, d_sae, k, cuts, above, ties, BLOCK: tl.constexpr):
    """TopK, one program per row: bits of its k-th largest value, number above it, number of ties that fill up to k."""
    row = tl.program_id(0)
    prefix, need = 0, k
    few = False
    positive = 0
    for level in tl.static_range(DIGITS):
        histogram = tl.zeros((BINS,), tl.int32)
        for first in range(0, d_sae, BLOCK):
            latents = first + tl.arange(0, BLOCK)
            bits = order_bits(pre_acts(pre, bias, row, latents, latents < d_sae, d_sae))
            histogram += count_digit(bits, prefix, level)
        if level == 0:
            positive = tl.sum(histogram, 0)
            few = positive <= k
        prefix, need = pick_digit(histogram, prefix, need)
    tl.store(cuts + row, tl.where(few, 0, prefix))
    tl.store(above + row, tl.where(few, positive, k - need))
    tl.store(ties + row, tl.where(few, 0, need))


@triton.jit
def batch_digits(pre, bias, n_rows, d_sae, count, histograms, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """BatchTopK: adds the histogram of digit LEVEL over all rows; earlier ones are complete, this one starts at 0."""
    prefix, _ = batch_cut(histograms, count, LEVEL)
    histogram = tl.zeros((BINS,), tl.int32)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        for first in range(0, d_sae, BLOCK):
            latents = first + tl.arange(0, BLOCK)
            bits = order_bits(pre_acts(pre, bias, row, latents, latents < d_sae, d_sae))
            histogram += count_digit(bits, prefix, LEVEL)
    tl.atomic_add(histograms + LEVEL * BINS + tl.arange(0, BINS), histogram, mask=histogram > 0)


@triton.jit
def count_rows(
    pre, bias, d_sae, cut, histograms, count, cuts, above, ties, BATCH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BatchTopK and thresholds, one program per row: the cut's bits, number of values above it, number equal to it.

    A threshold is given as the bits `cut`, and keeps no ties.
    """
    row = tl.program_id(0)
    if BATCH:
        cut, _ = batch_cut(histograms, count, DIGITS)
    larger, equal = 0, 0
    for first in range(0, d_sae, BLOCK):
        latents = first + tl.arange(0, BLOCK)
        bits = order_bits(pre_acts(pre, bias, row, latents, latents < d_sae, d_sae))
        larger += tl.sum((bits > cut).to(tl.int32), 0)
        if BATCH:
            equal += tl.sum(((bits == cut) & (bits > 0)).to(tl.int32), 0)
    tl.store(cuts + row, cut)
    tl.store(above + row, larger)
    tl.store(ties + row, equal)


@triton.jit
def place_rows(
    above, ties, histograms, count, n_rows, capacity, offsets, facts, BATCH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: where each row's list begins, offsets (N + 1,), and how many ties it keeps, overwriting `ties`."""
    left = 0
    if BATCH:
        _, left = batch_cut(histograms, count, DIGITS)
    total = 0
    for first in range(0, n_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < n_rows
        kept = tl.load(ties + rows, mask=inside, other=0)
        if BATCH:
            equal = kept
            before = tl.cumsum(equal, 0) - equal
            kept = tl.minimum(tl.maximum(left - before, 0), equal)
            left -= tl.sum(kept, 0)
            tl.store(ties + rows, kept, mask=inside)
        kept += tl.load(above + rows, mask=inside, other=0)
        tl.store(offsets + 1 + rows, total + tl.cumsum(kept, 0), mask=inside)
        total += tl.sum(kept, 0)
    tl.store(offsets, 0)
    tl.store(facts + KEPT, total)
    tl.store(facts + DENSE, (total > capacity).to(tl.int32))


@triton.jit
def list_rows(
    pre, bias, d_sae, cuts, ties, offsets, capacity, rows, latents, values, places, counts, segments,
    BY_LATENT: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: its kept pairs in ascending order, up to the lists' capacity.

    BY_LATENT: also `places` (N, d_sae), a pair's place in the lists + 1, 0 if it is not kept; and `counts`
    (1 + d_sae * segments,), the number of a latent's pairs in each segment of SEGMENT rows, from index 1 on.
    """
    row = tl.program_id(0)
    cut, quota, place = tl.load(cuts + row), tl.load(ties + row), tl.load(offsets + row)
    equal_so_far = 0
    for first in range(0, d_sae, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        inside = latent < d_sae
        value = pre_acts(pre, bias, row, latent, inside, d_sae)
        bits = order_bits(value)
        equal = ((bits == cut) & (bits > 0)).to(tl.int32)
        kept = (bits > cut) | ((equal > 0) & (equal_so_far + tl.cumsum(equal, 0) <= quota))
        count = kept.to(tl.int32)
        where = place + tl.cumsum(count, 0) - count
        listed = kept & (where < capacity)
        tl.store(rows + where, tl.zeros((BLOCK,), tl.int32) + row, mask=listed)
        tl.store(latents + where, latent, mask=listed)
        tl.store(values + where, value, mask=listed)
        if BY_LATENT:
            tl.store(places + row.to(tl.int64) * d_sae + latent, tl.where(kept, where + 1, 0), mask=inside)
            tl.atomic_add(counts + 1 + latent * segments + row // SEGMENT, 1, mask=kept)
        place += tl.sum(count, 0)
        equal_so_far += tl.sum(equal, 0)


@triton.jit
def list_latents(
    places, values, starts, facts, n_rows, d_sae, segments, latent_rows, latent_values,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """The pairs latent by latent, rows ascending; one program per LATENTS latents and SEGMENT rows.

    starts (1 + d_sae * segments,): latent j's pairs of segment s begin at starts[j * segments + s].
    """
    latent, segment = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), tl.program_id(1)
    known = latent < d_sae
    last = tl.minimum((segment + 1) * SEGMENT, n_rows)
    last = tl.where(tl.load(facts + DENSE) > 0, 0, last)  # no lists
    place = tl.load(starts + latent * segments + segment, mask=known, other=0)
    for first in range(segment * SEGMENT, last, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & known[None, :]
        pair = tl.load(places + row.to(tl.int64)[:, None] * d_sae + latent[None, :], mask=inside, other=0)
        kept = (pair > 0).to(tl.int32)
        where = place[None, :] + tl.cumsum(kept, 0) - kept
        tl.store(latent_rows + where, tl.broadcast_to(row[:, None], (ROWS, LATENTS)), mask=kept > 0)
        tl.store(latent_values + where, tl.load(values + pair - 1, mask=kept > 0, other=0.0), mask=kept > 0)
        place += tl.sum(kept, 0)
