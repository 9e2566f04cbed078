"""A matrix product that runs only if the device finds the codes dense; used by the `cuda` kernel.

Only the device knows how many pairs a threshold keeps, and the host must not wait for it. So both paths are launched,
and each kernel of the wrong one exits at once (`facts[DENSE]`, see `select`). Float32 by three TF32 products
per block ("tf32x3": about 2^-21 relative), on tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from saegrid.kernels.cuda.select import ACTIVE, DENSE


@triton.jit
def product_if_dense(
    a, b, out, facts, gate, bias, bound, m, n, k, a_row, a_column, b_row, b_column,
    ENCODE: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out (m, n) = a (m, k) @ b (k, n) if the codes are dense, else nothing. `out` and `gate` (m, n) are contiguous.

    ENCODE: z = product + bias (n,) where gate > 0 and that sum is above `bound`, else 0; adds the number kept to facts.
    GATED: the product where gate > 0, else 0.
    """
    if tl.load(facts + DENSE) > 0:
        row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
        column = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)
        inner = tl.arange(0, K).to(tl.int64)
        total = tl.zeros((M, N), tl.float32)
        for start in range(0, k, K):
            step = start + inner
            left = a + row[:, None] * a_row + step[None, :] * a_column
            right = b + step[:, None] * b_row + column[None, :] * b_column
            tile = tl.load(left, mask=(row < m)[:, None] & (step < k)[None, :], other=0.0)
            other = tl.load(right, mask=(step < k)[:, None] & (column < n)[None, :], other=0.0)
            total = tl.dot(tile, other, total, input_precision="tf32x3")
        inside = (row < m)[:, None] & (column < n)[None, :]
        place = row[:, None] * n + column[None, :]
        if ENCODE:
            total += tl.load(bias + column, mask=column < n, other=0.0)[None, :]
            kept = (tl.load(gate + place, mask=inside, other=0) > 0) & (total > bound)
            total = tl.where(kept, total, 0.0)
            tl.atomic_add(facts + ACTIVE, tl.sum(kept.to(tl.int32)))
        elif GATED:
            total = tl.where(tl.load(gate + place, mask=inside, other=0.0) > 0, total, 0.0)
        tl.store(out + place, total, mask=inside)
