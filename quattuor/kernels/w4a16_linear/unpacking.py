# SPDX-License-Identifier: Apache-2.0
"""Inline assembly that turns two 16-bit words into two operands of the tensor cores; exact for every code.

float16: a field at position p of 0x6400 is 1024 + 2^p code, since 0x6400 is 1024 and its last bit counts 1. One
multiply-add with 2^-p leaves the code less its zero point. Positions up to 6 fit below the exponent, so that words
are shifted once for many fields. bfloat16 has 7 bits: 0x4300 | code is 128 + code, and 8 bits come as two nibbles.
"""

import triton

__all__ = ["arity", "assembly", "constraints", "position", "word_of"]


@triton.constexpr_function
def word_of(bits, plane):
    """Return the word that holds a plane; 3 for the plane that all three words hold."""
    return plane // 5 if bits == 3 else 0


@triton.constexpr_function
def shift_of(bits, plane, is_half):
    """Return how far words are shifted right before the mask."""
    field = plane % 5 if bits == 3 else plane
    if not is_half:
        return field * bits
    if bits == 3:
        return 9 if field >= 3 else 0
    return 8 * (field * bits // 8)


@triton.constexpr_function
def position(bits, plane, is_half):
    """Return the lowest bit of the field after the shift."""
    field = plane % 5 if bits == 3 else plane
    return field * bits - shift_of(bits, plane, is_half) if word_of(bits, plane) < 3 else 0


@triton.constexpr_function
def arity(bits, plane):
    """Return how many words hold the plane."""
    return 3 if word_of(bits, plane) == 3 else 1


@triton.constexpr_function
def pair(value):
    """Write a 16-bit number twice, as a 32-bit immediate."""
    return f"0x{value << 16 | value:08X}"


@triton.constexpr_function
def field_text(bits, plane, is_half, magic):
    """Return instructions that leave `magic | field` in t."""
    if arity(bits, plane) == 3:
        lines = "shr.u32 t, $1, 15; lop3.b32 t, t, 0x00010001, " + magic + ", 0xEA;"
        lines += " shr.u32 u, $2, 14; lop3.b32 t, u, 0x00020002, t, 0xEA;"
        return lines + " shr.u32 u, $3, 13; lop3.b32 t, u, 0x00040004, t, 0xEA;"
    mask = pair((2**bits - 1) << position(bits, plane, is_half))
    shift = shift_of(bits, plane, is_half)
    if shift == 0:
        return "lop3.b32 t, $1, " + mask + ", " + magic + ", 0xEA;"
    return f"shr.u32 t, $1, {shift}; lop3.b32 t, t, " + mask + ", " + magic + ", 0xEA;"


@triton.constexpr_function
def byte_text(plane, rest):
    """Return instructions for 8-bit codes as bfloat16: nibbles less 128, put together, less the zero point."""
    lines = f"shr.u32 u, $1, {8 * plane}; lop3.b32 t, u, 0x000F000F, 0x43004300, 0xEA;"
    lines += " shr.u32 u, u, 4; lop3.b32 u, u, 0x000F000F, 0x43004300, 0xEA; mov.b32 one, 0x3F803F80;"
    lines += " mov.b32 rest, 0xC300C300; fma.rn.bf16x2 t, t, one, rest;"  # low nibble
    lines += " mov.b32 rest, 0xC500C500; mov.b32 s, 0x41804180;"
    lines += " fma.rn.bf16x2 u, u, s, rest;"  # 16 (128 + high nibble) - 2048
    lines += " fma.rn.bf16x2 t, u, one, t; mov.b32 rest, " + rest + "; fma.rn.bf16x2 $0, t, one, rest;"
    return "{ .reg .b32 t, u, s, one, rest; " + lines + " }"


@triton.constexpr_function
def assembly(bits, plane, is_half, has_zero):
    """Return the text; operands are the words, then with `has_zero` what to add after the product with 2^-p.

    Without, the middle of the range is subtracted, as signed codes need it.
    """
    middle = 2 ** (bits - 1)
    last = f"${arity(bits, plane) + 1}"
    if bits == 8 and not is_half:
        return byte_text(plane, last if has_zero else pair(0xC300))
    low = position(bits, plane, is_half)
    if is_half:
        # 1024 2^-p + middle, negative; 2^-p
        rest, one, kind = 0xE400 - (low << 10) + (middle << low), (15 - low) << 10, "f16x2"
    else:
        rest, one, kind = 0xC300 + middle, 0x3F80, "bf16x2"
    lines = field_text(bits, plane, is_half, pair(0x6400 if is_half else 0x4300))
    lines += " mov.b32 one, " + pair(one) + ";"
    lines += " mov.b32 rest, " + (last if has_zero else pair(rest)) + "; fma.rn." + kind + " $0, t, one, rest;"
    return "{ .reg .b32 t, u, one, rest; " + lines + " }"


@triton.constexpr_function
def constraints(bits, plane, has_zero):
    """Return the registers: two words are one, and two equal addends are two."""
    return "=r" + ",r" * arity(bits, plane) + (",r,r" if has_zero else "")
