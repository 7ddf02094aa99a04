# SPDX-License-Identifier: Apache-2.0
"""Inline assembly that turns two packed words of 16 bits into floating-point operands, and arithmetic for it.

A byte permutation takes four selectors, nibbles of its low 16 bits, and finds each among eight bytes: one
instruction looks up one byte of four entries in a table of eight. Entries are split into a table of low and one of
high bytes; a table of sixteen is looked up in both halves, and a third permutation takes the right ones.
"""

import triton
import triton.language as tl

__all__ = ["bit_value", "look_up", "signs"]

#: 1.0 in both halves of a register.
ONES = {"fp16": 0x3C003C00, "bf16": 0x3F803F80}


@triton.constexpr_function
def bit_value(bit):
    """Return the number that `signs` has for a set bit when masked: float16 with this bit, or 14 instead of 15."""
    bit = min(bit, 14)
    return 2.0 ** (bit - 24) if bit < 10 else 2.0 ** (2 ** (bit - 10) - 15)


@triton.constexpr_function
def sign_assembly(bit, name, is_masked):
    """Return the assembly for a number whose sign is a bit of each half of $1, or that is `bit_value` or 0."""
    if is_masked and bit == 15:  # a sign alone is no number: the bit below, instead
        return "{ .reg .b32 t; shr.u32 t, $1, 1; and.b32 $0, t, 0x40004000; }"
    if is_masked:
        return f"and.b32 $0, $1, {0x00010001 << bit};"
    return f"{{ .reg .b32 t; shl.b32 t, $1, {15 - bit}; lop3.b32 $0, t, 0x80008000, {ONES[name]}, 0xEA; }}"


@triton.constexpr_function
def shift_right(target, source, distance):
    """Return the assembly for a shift on the multipliers: permutations and logic fill the other pipe."""
    return (
        f"mul.hi.u32 {target}, {source}, {1 << (32 - distance)};" if distance else f"mov.b32 {target}, {source};"
    )


@triton.constexpr_function
def selectors(bits, step):
    """Return the assembly that leaves the low three bits of eight codes in the nibbles of `t`.

    $4 holds the codes; of 3-bit codes it holds the lower two bits, and $5 the third.
    """
    if bits == 4:
        return "and.b32 t, $4, 0x77777777;"
    mask = 0x11111111 if bits == 1 else 0x33333333
    shift = step if bits == 1 else 2 * (step % 2)
    text = f"{shift_right('t', '$4', shift)} and.b32 t, t, {mask};"
    if bits == 3:
        move = f"shl.b32 u, $5, {2 - step};" if step <= 2 else f"shr.u32 u, $5, {step - 2};"
        text += f" {move} and.b32 u, u, 0x44444444; or.b32 t, t, u;"
    return text


@triton.constexpr_function
def look_up_assembly(bits, step):
    """Return the assembly for the entries of two words: $0 .. $3 for four neighbouring sub-blocks.

    Each table register is given twice, once for each word.
    """
    first = 6 if bits == 3 else 5
    table = [f"${first + 2 * index}" for index in range(8)]
    lines = [selectors(bits, step)]
    if bits == 4:
        lines.append(shift_right("s", "$4", 1) + " lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;")
    for half in range(2):
        for place, name in ((0, "l"), (4, "h")):
            if bits == 4:
                lines.append(f"prmt.b32 a, {table[place]}, {table[place + 1]}, t;")
                lines.append(f"prmt.b32 b, {table[place + 2]}, {table[place + 3]}, t;")
                lines.append(f"prmt.b32 {name}, a, b, s;")
            else:
                lines.append(f"prmt.b32 {name}, {table[place]}, {table[place + 1]}, t;")
        lines.append(f"prmt.b32 ${2 * half}, l, h, 0x5140; prmt.b32 ${2 * half + 1}, l, h, 0x7362;")
        if half == 0:
            lines.append(shift_right("t", "t", 16) + (shift_right("s", "s", 16) if bits == 4 else ""))
    return "{ .reg .b32 t, u, s, a, b, l, h; " + " ".join(lines) + " }"


@triton.constexpr_function
def look_up_constraints(bits):
    """Return the constraints of `look_up_assembly`."""
    return ",".join(["=&r"] * 4 + ["r"] * ((2 if bits == 3 else 1) + 16))


@triton.jit
def signs(words, BIT: tl.constexpr, dtype: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr):
    """-1 where a bit of the words is set, else 1; or, when MASKED, `bit_value` and 0."""
    if ASM:
        if dtype == tl.float16:
            value = tl.inline_asm_elementwise(
                sign_assembly(BIT, "fp16", MASKED), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            value = tl.inline_asm_elementwise(
                sign_assembly(BIT, "bf16", False), "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
            )
    else:
        bit = ((words.to(tl.int32) >> BIT) & 1).to(tl.float32)
        value = (bit * bit_value(BIT) if MASKED else 1.0 - 2.0 * bit).to(dtype)
    return value


@triton.jit
def entry(code, table, BITS: tl.constexpr):
    """Entries of codes, by arithmetic on the tables of bytes: the interpreter's path."""
    low = code * 0
    high = code * 0
    for index in tl.static_range(1 if BITS < 3 else 2 ** (BITS - 2)):
        is_here = code // 4 == index
        low = tl.where(is_here, (table[index] >> (code % 4 * 8)) & 255, low)
        high = tl.where(is_here, (table[4 + index] >> (code % 4 * 8)) & 255, high)
    return (low | (high << 8)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def code_of(words, third, SUB: tl.constexpr, STEP: tl.constexpr, BITS: tl.constexpr):
    """Codes of sub-block SUB of four, undoing the exchange of nibbles: the interpreter's path."""
    ROWS: tl.constexpr = words.shape[0]
    PAIRS: tl.constexpr = words.shape[1] // 2
    shift: tl.constexpr = STEP if BITS == 1 else (0 if BITS == 4 else 2 * (STEP % 2))
    both = words.to(tl.int32) & 0xFFFF
    if BITS == 3:
        low = (both >> shift) & 0x3333
        code = low | ((((third.to(tl.int32) & 0xFFFF) >> STEP) & 0x1111) << 2)
    else:
        code = (both >> shift) & (0xFFFF if BITS == 4 else (0x3333 if BITS == 2 else 0x1111))
    halves = tl.reshape(code, (ROWS, PAIRS, 2))
    which = tl.arange(0, 2)[None, None, :]
    half = tl.sum(tl.where(which == SUB // 2, halves, 0), axis=2)
    place = tl.arange(0, 2)[None, None, :] * 4 + SUB % 2 * 8
    return tl.reshape((half[:, :, None] >> place) & 15, (ROWS, PAIRS * 2))


@triton.jit
def look_up(words, third, table, STEP: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The entries of sub-blocks 4 STEP .. 4 STEP + 3, as float16."""
    t0, t1, t2, t3, t4, t5, t6, t7 = table
    if ASM:
        if BITS == 3:
            entries = tl.inline_asm_elementwise(
                look_up_assembly(BITS, STEP),
                look_up_constraints(BITS),
                [words, third, t0, t1, t2, t3, t4, t5, t6, t7],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        else:
            entries = tl.inline_asm_elementwise(
                look_up_assembly(BITS, STEP),
                look_up_constraints(BITS),
                [words, t0, t1, t2, t3, t4, t5, t6, t7],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        entries = (
            entry(code_of(words, third, 0, STEP, BITS), table, BITS),
            entry(code_of(words, third, 1, STEP, BITS), table, BITS),
            entry(code_of(words, third, 2, STEP, BITS), table, BITS),
            entry(code_of(words, third, 3, STEP, BITS), table, BITS),
        )
    return entries
