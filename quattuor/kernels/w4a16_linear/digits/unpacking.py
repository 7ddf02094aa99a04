# SPDX-License-Identifier: Apache-2.0
"""Inline assembly that turns four 16-bit words into four bytes, 2^(8 - b) times the signed code of one plane."""

import triton

__all__ = ["byte_assembly", "byte_constraints"]

LOW_BYTES, HIGH_BYTES = "0x6420", "0x7531"


@triton.constexpr_function
def byte_constraints(bits, plane):
    """Return the registers: four words are two."""
    return "=r" + ",r,r" * (3 if bits == 3 and plane == 15 else 1)


@triton.constexpr_function
def shifted(name, by):
    """Return the instruction that shifts a register to the left, or to the right."""
    if by == 0:
        return ""
    return f" shl.b32 {name}, {name}, {by};" if by > 0 else f" shr.u32 {name}, {name}, {-by};"


@triton.constexpr_function
def last_plane():
    """Return the text for the plane whose bits are the highest of three words."""
    lines = ""
    for name, first in (("t", 1), ("u", 3), ("v", 5)):
        lines += f" prmt.b32 {name}, ${first}, ${first + 1}, {HIGH_BYTES};"
    lines += " shr.u32 t, t, 2; and.b32 t, t, 0x20202020;"
    lines += " shr.u32 u, u, 1; lop3.b32 t, u, 0x40404040, t, 0xEA;"  # (a & b) | c
    return "{ .reg .b32 t, u, v;" + lines + " lop3.b32 $0, v, 0x80808080, t, 0xAE; }"  # (~a & b) | c


@triton.constexpr_function
def byte_assembly(bits, plane):
    """Return the text; operands are the word of the plane, or all three words.

    The highest bit is flipped: what is stored is the code plus 2^(b - 1), and the result is signed.
    """
    if bits == 3 and plane == 15:
        return last_plane()
    place = plane % 5 * 3 if bits == 3 else plane * bits
    mask = (0x100 - (1 << (8 - bits))) * 0x01010101
    lines = " mov.b32 t, $1; mov.b32 u, $2;"
    if place < 8 < place + bits:  # a code in both bytes of its word: to the top of the lower one
        lines += shifted("t", 8 - place - bits) + shifted("u", 8 - place - bits)
        lines += f" prmt.b32 t, t, u, {LOW_BYTES};"
    else:
        lines += f" prmt.b32 t, t, u, {HIGH_BYTES if place >= 8 else LOW_BYTES};" + shifted(
            "t", 8 - bits - place % 8
        )
    if bits == 8:
        lines += " xor.b32 $0, t, 0x80808080;"
    else:
        lines += f" mov.b32 u, 0x80808080; lop3.b32 $0, t, {mask}, u, 0x6A;"  # (a & b) ^ c
    return "{ .reg .b32 t, u;" + lines + " }"
