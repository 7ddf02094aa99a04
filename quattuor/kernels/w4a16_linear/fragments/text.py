# SPDX-License-Identifier: Apache-2.0
"""Inline assembly of the kernel for few tokens, and which field of a word it takes when.

An operand is made of two codes at a time, in one of three kinds:

    RAW     float16   the field alone, the subnormal 2^(p - 24) code at position p: one instruction, but the tensor
                      cores do not normalize it, so that sums keep about 17 bits
    EXACT   float16   0x6400 | field is 1024 + 2^p code; a multiply-add leaves the code
    BFLOAT  bfloat16  0x4300 | field is 128 + 2^p code; a multiply-add leaves the code
"""

import triton

__all__ = [
    "BFLOAT",
    "EXACT",
    "RAW",
    "ends_unit",
    "factor",
    "field_position",
    "field_shift",
    "is_lowest",
    "load_text",
    "masked_load_text",
    "ones_text",
    "plane_at",
    "product_constraints",
    "product_text",
    "starts_unit",
    "unit_of",
]

RAW, EXACT, BFLOAT = range(3)
#: The low bits of an operand that a field may take.
ROOM = (10, 10, 7)


@triton.constexpr_function
def field_shift(bits, plane, kind):
    """Return how far the word of a plane is shifted right; neighbours share a shift."""
    if bits == 3 and plane == 15:
        return 0
    per_word = 5 if bits == 3 else 16 // bits
    fields = ROOM[kind] // bits
    return plane % per_word // fields * fields * bits


@triton.constexpr_function
def field_position(bits, plane, kind):
    """Return the lowest bit of the field after the shift."""
    if bits == 3 and plane == 15:
        return 0
    per_word = 5 if bits == 3 else 16 // bits
    return plane % per_word * bits - field_shift(bits, plane, kind)


@triton.constexpr_function
def unit(bits, plane, kind):
    """Return the exponent of 2 by which operands exceed codes, in the unit of the kind."""
    return field_position(bits, plane, kind) if kind == RAW else 0


@triton.constexpr_function
def plane_at(bits, length, place, kind):
    """Return the plane that comes at a place: pieces of `length` planes, in each the lowest unit first."""
    first = place // length * length
    return sorted(range(first, first + length), key=lambda plane: unit(bits, plane, kind))[place - first]


@triton.constexpr_function
def unit_at(bits, length, place, kind):
    """Return the unit of the plane that comes at a place."""
    return unit(bits, plane_at(bits, length, place, kind), kind)


@triton.constexpr_function
def starts_unit(bits, length, place, kind):
    """Return whether the plane before, in the same piece, has another unit."""
    return place % length == 0 or unit_at(bits, length, place, kind) != unit_at(bits, length, place - 1, kind)


@triton.constexpr_function
def ends_unit(bits, length, place, kind):
    """Return whether no plane of the same piece and unit follows."""
    return (place + 1) % length == 0 or starts_unit(bits, length, place + 1, kind)


@triton.constexpr_function
def is_lowest(bits, length, place, kind):
    """Return whether the plane has the lowest unit of its piece."""
    return unit_at(bits, length, place, kind) == unit_at(bits, length, place // length * length, kind)


@triton.constexpr_function
def factor(bits, length, place, kind):
    """Return what makes products of the plane at a place those of codes."""
    return 2.0 ** -unit_at(bits, length, place, kind)


@triton.constexpr_function
def unit_of(kind):
    """Return what makes sums of a kind those of codes."""
    return 2.0**24 if kind == RAW else 1.0


@triton.constexpr_function
def load_text(count, streams):
    """Return a load of `count` 32-bit registers; what streams is read once and leaves the cache to others."""
    outputs = ", ".join(f"${i}" for i in range(count))
    outputs = "{" + outputs + "}" if count > 1 else outputs
    vector = f".v{count}" if count > 1 else ""
    hint = ".L1::no_allocate.L2::128B" if streams else ""
    return f"ld.global{hint}{vector}.b32 {outputs}, [${count}];"


@triton.constexpr_function
def masked_load_text():
    """Return a load of four registers where operand 5 is not 0, and zeros elsewhere."""
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(4))
    return "{ .reg .pred p; setp.ne.s32 p, $5, 0; " + zeros + " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }"


@triton.constexpr_function
def twice(value):
    """Write a 16-bit number twice, as a 32-bit immediate."""
    return f"0x{value << 16 | value:08X}"


@triton.constexpr_function
def product(kind, span, a, b):
    """Return one product, added to the outputs of a span."""
    name = "bf16" if kind == BFLOAT else "f16"
    out = "{" + ", ".join(f"${4 * span + i}" for i in range(4)) + "}"
    a, b = ("{" + ", ".join(registers) + "}" for registers in (a, b))
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {out}, {a}, {b}, {out};"


@triton.constexpr_function
def operand_text(bits, position, kind, first):
    """Return instructions that make operands a0-a7 of the eight words from `first` on."""
    mask = twice((2**bits - 1) << position)
    if kind == RAW:
        return [f"and.b32 a{i}, ${first + i}, {mask};" for i in range(8)]
    half = kind == EXACT
    magic = twice(0x6400 if half else 0x4300)
    # 2^-p, and -1024 2^-p or -128 2^-p
    one = twice((15 - position) << 10 if half else (127 - position) << 7)
    rest = twice(0xE400 - (position << 10) if half else 0xC300 - (position << 7))
    lines = [f"mov.b32 one, {one}; mov.b32 rest, {rest};"]
    for i in range(8):
        lines.append(f"lop3.b32 a{i}, ${first + i}, {mask}, {magic}, 0xEA;")
        lines.append(f"fma.rn.{'f16x2' if half else 'bf16x2'} a{i}, a{i}, one, rest;")
    return lines


@triton.constexpr_function
def product_text(bits, position, kind, spans):
    """Return two products for each span of 8 tokens.

    Operands after the outputs: words of the first row of each pair, of the second, activations, sums.
    """
    first = 4 * spans
    lines = ["{ .reg .b32 a<8>, one, rest;", *operand_text(bits, position, kind, first)]
    for half in range(2):
        for span in range(spans):
            x = first + 8 + 4 * span + 2 * half
            a = (f"a{i}" for i in (2 * half, 2 * half + 4, 2 * half + 1, 2 * half + 5))
            lines.append(product(kind, span, a, (f"${x}", f"${x + 1}")))
    return " ".join(lines) + " }"


@triton.constexpr_function
def product_constraints(spans):
    """Return the registers of `product_text`; the sums are the outputs."""
    outputs = 4 * spans
    return ",".join(["=f"] * outputs + ["r"] * (8 + outputs) + [str(i) for i in range(outputs)])


@triton.constexpr_function
def ones_text(kind):
    """Return two products of ones, in the unit of the kind, and activations $4-$7."""
    one = twice((0x0001, 0x3C00, 0x3F80)[kind])
    lines = "{ .reg .b32 one; mov.b32 one, " + one + "; "
    products = (product(kind, 0, ("one",) * 4, (f"${i}", f"${i + 1}")) for i in (4, 6))
    return lines + " ".join(products) + " }"
