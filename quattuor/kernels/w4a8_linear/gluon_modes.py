# SPDX-License-Identifier: Apache-2.0
"""The modes of the Hopper kernel, and how its consumers load group scales."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["CHANNEL", "HALF", "INTEGER", "UNCLAMPED", "load_group_scale"]

CHANNEL = gl.constexpr(0)
INTEGER = gl.constexpr(1)
HALF = gl.constexpr(2)
UNCLAMPED = gl.constexpr(3)


@gluon.jit
def load_group_scale(group_smem, first_row: gl.constexpr, layout: gl.constexpr, MODE: gl.constexpr):
    """int32 group scales [64, 1] of one plane, spread over the fragment of the packed weight."""
    ROWS: gl.constexpr = 64
    flat = group_smem.reshape((group_smem.shape[1],)).slice(first_row, ROWS)
    value = flat.load(gl.SliceLayout(1, layout))
    if MODE != INTEGER:
        bits = value.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
        value = bits | (bits << 16)
    else:
        value = value.to(gl.int32)
    return gl.expand_dims(value, 1)
