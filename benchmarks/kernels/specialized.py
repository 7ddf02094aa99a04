# SPDX-License-Identifier: Apache-2.0
"""The least kernel with specialized warps: what the race checker says of it, it says of the compiler.

Its partitions share nothing and allocate no shared memory; all of that in its machine code is the compiler's: the
byte for each warp from which a worker reads which partition it runs.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["specialized_kernel", "specialized_sum"]


@gluon.jit
def store_part(out, PART: gl.constexpr, SIZE: gl.constexpr, WARPS: gl.constexpr):
    """Store PART + 1 in part PART of `out`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    offset = gl.program_id(0) * (3 * SIZE) + PART * SIZE + gl.arange(0, SIZE, layout)
    gl.store(out + offset, gl.full((SIZE,), PART + 1, gl.int32, layout))


@gluon.jit
def specialized_kernel(out, SIZE: gl.constexpr):
    """Fill each third of a program's elements by other warps, as many as the Hopper kernel has."""
    gl.warp_specialize(
        [
            (store_part, (out, 0, SIZE, 4)),
            (store_part, (out, 1, SIZE, 4)),
            (store_part, (out, 2, SIZE, 1)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[64, 40],
    )


def specialized_sum() -> int:
    """Launch the kernel with two programs and return the sum of what it stored: 2 * 128 * (1 + 2 + 3)."""
    out = torch.zeros(2 * 3 * 128, dtype=torch.int32, device="cuda")
    specialized_kernel[(2,)](out, SIZE=128, num_warps=4)
    return int(out.sum())
