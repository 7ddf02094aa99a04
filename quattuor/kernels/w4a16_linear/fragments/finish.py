# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 (Triton knows no unpacking)
"""How the kernel for few tokens ends a tile: warps and programs that share it are added in a fixed order."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quattuor.kernels.w4a16_linear.fragments.text import unit_of

__all__ = ["finish"]


@gluon.jit
def add_shares(
    sums,
    tile,
    total_steps,
    partial,
    arrivals,
    NUM_STEPS,
    COUNT: gl.constexpr,
    flat: gl.constexpr,
):
    """Whether this program is the last of those that share a tile to arrive, and then the sums of all of them.

    A program shares at most two tiles: the one that it begins in the middle of, and the one that it leaves there.
    """
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    lanes = gl.arange(0, 32, flat)
    low = tile.to(gl.int64) * NUM_STEPS
    first = (((low + 1) * num_programs - 1) // total_steps).to(gl.int32)
    last = (((low + NUM_STEPS) * num_programs - 1) // total_steps).to(gl.int32)
    is_last = True
    if first < last:
        mine = partial + (program * 2 + gl.where(program == first, 1, 0)) * (32 * COUNT)
        for i in gl.static_range(COUNT):
            gl.store(mine + i * 32 + lanes, sums[i])
        gl.thread_barrier()
        is_last = gl.atomic_add(arrivals + tile, 1, sem="acq_rel") == last - first
        if is_last:
            added = ()
            for _ in gl.static_range(COUNT):
                added = added + (gl.zeros([32], gl.float32, flat),)
            for other in range(first, last + 1):
                slab = partial + (other * 2 + gl.where(other == first, 1, 0)) * (32 * COUNT)
                updated = ()
                for i in gl.static_range(COUNT):
                    updated = updated + (added[i] + gl.load(slab + i * 32 + lanes, cache_modifier=".cg"),)
                added = updated
            sums = added
            gl.store(arrivals + tile, 0)
    return is_last, sums


@gluon.jit
def finish(
    total,
    tile,
    total_steps,
    scale,
    bias,
    out,
    partial,
    arrivals,
    M,
    N,
    NUM_STEPS,
    R: gl.constexpr,
    T: gl.constexpr,
    W: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    IS_GROUPED: gl.constexpr,
    KIND: gl.constexpr,
):
    """Add what the warps hold, then store the outputs of a tile, or the sums for the program that arrives last."""
    COUNT: gl.constexpr = 4 * R * T
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    lanes = gl.arange(0, 32, flat)
    sums = ()
    for i in gl.static_range(COUNT):
        value = total[i]
        if W > 1:
            value = gl.convert_layout(gl.sum(gl.reshape(value, [W, 32]), axis=0), flat)
        sums = sums + (value,)
    is_last = True
    if IS_SPLIT:
        is_last, sums = add_shares(sums, tile, total_steps, partial, arrivals, NUM_STEPS, COUNT, flat)
    if is_last:
        for i in gl.static_range(COUNT):
            row = tile * (16 * R) + lanes // 4 * (2 * R) + (i // (4 * T) * 2 + i % 4 // 2)
            token = lanes % 4 * 2 + (i // 4 % T * 8 + i % 2)
            value = sums[i] * unit_of(KIND)
            if not IS_GROUPED:
                value = value * gl.load(scale + row).to(gl.float32)
            if HAS_BIAS:
                value = value + gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
            where = out + token.to(gl.int64) * N + row
            gl.store(where, value.to(out.dtype.element_ty), mask=(token < M) & (row < N))
