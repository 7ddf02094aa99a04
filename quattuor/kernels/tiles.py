# SPDX-License-Identifier: Apache-2.0
"""What Triton products share at their end: parts of K that meet in a tile, and its place in the output."""

import triton
import triton.language as tl

__all__ = ["join_parts", "store_tile"]


@triton.jit
def join_parts(sums, partial, arrivals, tile, part, SPLIT, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Leave the sums of one part of K; return whether all parts of the tile have come, and then their total.

    The last program to arrive adds the parts in their order, whoever is last, so that equal calls give equal bits,
    and resets the arrival counter for the next launch.
    """
    offset = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    slabs = partial + tile.to(tl.int64) * (SPLIT * ROWS * TOKENS)
    tl.store(slabs + part * (ROWS * TOKENS) + offset, sums)
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1
    if is_last:
        sums = tl.zeros((ROWS, TOKENS), dtype=sums.dtype)
        for other in range(SPLIT):
            sums += tl.load(slabs + other * (ROWS * TOKENS) + offset, cache_modifier=".cg")
        tl.store(arrivals + tile, 0)
    return is_last, sums


@triton.jit
def store_tile(out, result, row, token, M, N):
    """Write [rows, tokens] to the row-major [M, N] output in its dtype; rows and tokens beyond it are left out."""
    where = out + token[None, :].to(tl.int64) * N + row[:, None]
    mask = (token[None, :] < M) & (row[:, None] < N)
    tl.store(where, result.to(out.dtype.element_ty), mask=mask)
