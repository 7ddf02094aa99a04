# SPDX-License-Identifier: Apache-2.0
"""Inline assembly that turns four packed codes into four int8 operands; $1 holds one byte of four elements of K.

The low plane is in the low nibbles, the high plane in the high nibbles. Byte arithmetic on int8 tensors would
compile to one extraction and one insertion per byte; these work on four bytes at once.
"""

import triton
import triton.language as tl

__all__ = [
    "HIGH_CHANNEL",
    "HIGH_HALF",
    "HIGH_INTEGER",
    "HIGH_UNCLAMPED",
    "LOW_CHANNEL",
    "LOW_HALF",
    "LOW_INTEGER",
    "LOW_UNCLAMPED",
    "PREFETCH_LINE",
    "bulk_prefetch_assembly",
    "joined_assembly",
    "plane_assembly",
]

# 16 * code: the nibble stays in the high half of its byte.
LOW_CHANNEL = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }")
HIGH_CHANNEL = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")

# With u = code + 8 in 0 .. 15: u * r + (128 - 8 r) = code * r + 128 lies in 0 .. 255 in each byte, for negative r
# too, so that one 32-bit multiply-add modulo 2^32 scales four codes: what carries between bytes cancels. Flipping
# the sign bits subtracts the 128. $2 is r, $6 the packed addend.
LOW_INTEGER = tl.constexpr("""{
    .reg .b32 t;
    lop3.b32 t, $1, 0x0F0F0F0F, 0x08080808, 0x6A;
    mad.lo.u32 t, t, $2, $6;
    xor.b32 $0, t, 0x80808080;
}""")
HIGH_INTEGER = tl.constexpr("""{
    .reg .b32 t;
    shr.u32 t, $1, 4;
    lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A;
    mad.lo.u32 t, t, $2, $6;
    xor.b32 $0, t, 0x80808080;
}""")

# 0x64uu is the float16 1024 + u, so subtracting 1032 gives the code. code * s + 1152 is rounded once; in
# 1024 .. 2048 float16 is spaced by 1, so that is rne(code * s) + 1152, and clamping to 1024 .. 1279 leaves
# clamp(..., -128, 127) + 128 in the low byte. Larger products round coarser but are clamped all the same.
HALF_BODY = """
    lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A;
    mov.b32 one, 0x64646464;
    prmt.b32 a, t, one, 0x4140;
    prmt.b32 b, t, one, 0x4342;
    mov.b32 c, 0x64086408;
    sub.rn.f16x2 a, a, c;
    sub.rn.f16x2 b, b, c;
    mov.b32 c, 0x64806480;
    fma.rn.f16x2 a, a, $2, c;
    fma.rn.f16x2 b, b, $2, c;
    mov.b32 c, 0x64006400;
    max.f16x2 a, a, c;
    max.f16x2 b, b, c;
    mov.b32 c, 0x64FF64FF;
    min.f16x2 a, a, c;
    min.f16x2 b, b, c;
    prmt.b32 t, a, b, 0x6420;
    xor.b32 $0, t, 0x80808080;
}"""
LOW_HALF = tl.constexpr("{ .reg .b32 t, a, b, c, one; mov.b32 t, $1;" + HALF_BODY)
HIGH_HALF = tl.constexpr("{ .reg .b32 t, a, b, c, one; shr.u32 t, $1, 4;" + HALF_BODY)

# For scales whose products stay in int8. 0x6400 | n is the float16 1024 + n, so one operation with three inputs
# makes 1024 + u, or 1024 + 16 u, of two codes that are two bytes apart, and the next one the code, exactly.
# code * s + 1536 is rounded once, to an integer as above, and its low byte is the product in two's complement.
UNCLAMPED_END = """
    mov.b32 c, 0x66006600;
    fma.rn.f16x2 a, a, $2, c;
    fma.rn.f16x2 b, b, $2, c;
    prmt.b32 $0, a, b, 0x6240;
}"""
LOW_UNCLAMPED = tl.constexpr(
    """{
    .reg .b32 t, a, b, c;
    shr.u32 t, $1, 8;
    lop3.b32 a, $1, 0x000F000F, 0x64086408, 0x6A;
    lop3.b32 b, t, 0x000F000F, 0x64086408, 0x6A;
    mov.b32 c, 0x64086408;
    sub.rn.f16x2 a, a, c;
    sub.rn.f16x2 b, b, c;"""
    + UNCLAMPED_END
)
# (1024 + 16 u) / 16 - 72
HIGH_UNCLAMPED = tl.constexpr(
    """{
    .reg .b32 t, a, b, c;
    shr.u32 t, $1, 8;
    lop3.b32 a, $1, 0x00F000F0, 0x64806480, 0x6A;
    lop3.b32 b, t, 0x00F000F0, 0x64806480, 0x6A;
    mov.b32 t, 0x2C002C00;
    mov.b32 c, 0xD480D480;
    fma.rn.f16x2 a, a, t, c;
    fma.rn.f16x2 b, b, t, c;"""
    + UNCLAMPED_END
)


@triton.constexpr_function
def plane_assembly(bits, shift):
    """Return the assembly that shifts one code of each byte to its top, which makes it 2^(8-b) * code."""
    mask = (0x100 - (1 << (8 - bits))) * 0x01010101
    if shift == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shl.b32 t, $1, {shift}; and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def joined_assembly(shift):
    """Return the assembly for 32 * code whose upper two bits are the lowest of $1 and whose last is a bit of $2.

    The last bit reaches bit 5 of its byte after a shift to the left.
    """
    return f"""{{
    .reg .b32 t, u;
    shl.b32 t, $1, 6;
    and.b32 t, t, 0xC0C0C0C0;
    shl.b32 u, $2, {shift};
    lop3.b32 $0, t, u, 0x20202020, 0xF8;
}}"""


# by one thread: a line that many threads of a warp ask for is fetched as often
PREFETCH_LINE = tl.constexpr("""{
    .reg .pred p;
    .reg .u32 t;
    .reg .b64 a;
    mov.u32 t, %tid.x;
    setp.eq.u32 p, t, 0;
    cvta.to.global.u64 a, $1;
    @p prefetch.global.L2 [a];
    mov.b32 $0, 0;
}""")


@triton.constexpr_function
def bulk_prefetch_assembly(num_bytes):
    """Return the assembly by which the first thread brings the bytes at $1 to L2."""
    return f"""{{
    .reg .pred p;
    .reg .u32 t;
    .reg .b64 a;
    mov.u32 t, %tid.x;
    setp.eq.u32 p, t, 0;
    cvta.to.global.u64 a, $1;
    @p cp.async.bulk.prefetch.L2.global [a], {num_bytes};
    mov.b32 $0, 0;
}}"""
