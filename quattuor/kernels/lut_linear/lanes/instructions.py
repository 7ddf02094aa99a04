# SPDX-License-Identifier: Apache-2.0
"""Instructions of one lane of a warp for Triton: each element of a tensor [32 * warps] is a register of one lane.

With ASM the functions are inline assembly; without, arithmetic with the same result, for Triton's interpreter.
"""

import triton
import triton.language as tl

__all__ = [
    "HELD",
    "ONCE",
    "SHARED",
    "add_pairs",
    "as_numbers",
    "from_lane",
    "hold",
    "load_two_words",
    "load_words",
    "multiply",
    "multiply_pairs",
    "permute",
    "selectors",
    "shift_right",
]


# How words are loaded: those that no other program reads, and those that other warps read as well.
ONCE = tl.constexpr("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
#: As those of `ONCE`, but `hold` holds them, which it does not hold loads of memory that is constant.
HELD = tl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
SHARED = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
#: Products of bytes with signed ones, in the lanes of `multiply`.
SIGNED = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
UNSIGNED = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@triton.jit
def hold(ASM: tl.constexpr):
    """Let the assembler move no load across: it would put those of the next block after the last product."""
    if ASM:
        tl.inline_asm_elementwise(
            "mov.u32 $0, 0; bar.warp.sync 0xffffffff;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def load_words(pointer, HOW: tl.constexpr, ASM: tl.constexpr):
    """Four neighbouring 32-bit words, which the kernel before may have written if they are SHARED."""
    if ASM:
        result = tl.inline_asm_elementwise(
            HOW,
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        result = tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    return result


@triton.jit
def load_two_words(pointer, ASM: tl.constexpr):
    """Two neighbouring 32-bit words, which the kernel before may have written."""
    if ASM:
        result = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        result = tl.load(pointer), tl.load(pointer + 1)
    return result


@triton.constexpr_function
def from_lane_assembly(place):
    """Return the assembly that takes $1 of one of every four lanes."""
    return f"shfl.sync.idx.b32 $0, $1, {place}, 0x1c1f, 0xffffffff;"


@triton.jit
def from_lane(word, PLACE: tl.constexpr, ASM: tl.constexpr):
    """The word of lane 4 g + PLACE for all lanes 4 g .. 4 g + 3."""
    if ASM:
        result = tl.inline_asm_elementwise(
            from_lane_assembly(PLACE),
            "=r,r",
            [word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        four = tl.reshape(word, (word.shape[0] // 4, 4))
        one = tl.sum(tl.where(tl.arange(0, 4)[None, :] == PLACE, four, 0), axis=1)
        result = tl.reshape(tl.broadcast_to(one[:, None], four.shape), word.shape)
    return result


@triton.jit
def bytes_of(word, IS_SIGNED: tl.constexpr):
    """The four bytes of each word, [lanes, 4]."""
    found = (word[:, None] << (24 - 8 * tl.arange(0, 4))[None, :]) >> 24
    if not IS_SIGNED:
        found = found & 255
    return found


@triton.jit
def row_products(first, second, b0, b1, IS_SIGNED: tl.constexpr, WARPS: tl.constexpr):
    """Two neighbouring columns of eight rows of a product, for each lane."""
    a_low = tl.reshape(bytes_of(first, IS_SIGNED), (WARPS, 8, 1, 16))
    a_high = tl.reshape(bytes_of(second, IS_SIGNED), (WARPS, 8, 1, 16))
    b_low = tl.reshape(bytes_of(b0, True), (WARPS, 1, 8, 16))
    b_high = tl.reshape(bytes_of(b1, True), (WARPS, 1, 8, 16))
    total = tl.sum(a_low * b_low + a_high * b_high, axis=3)
    return tl.split(tl.reshape(total, (WARPS * 32, 2)))


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c, IS_SIGNED: tl.constexpr, ASM: tl.constexpr):
    """c + A [16, 32] @ B [32, 8] for each warp, bytes and 32-bit sums, in the lanes of `mma.m16n8k32`.

    The bytes of B are signed, and those of A if IS_SIGNED.

    Lane 4 g + t holds bytes of A at rows g (a0, a2) and g + 8 (a1, a3) and places 4 t .. + 3 (a0, a1) and
    16 + 4 t .. + 3 (a2, a3), of B at these places and column g, of C at rows g and g + 8, columns 2 t and 2 t + 1.
    """
    c0, c1, c2, c3 = c
    if ASM:
        result = tl.inline_asm_elementwise(
            SIGNED if IS_SIGNED else UNSIGNED,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        s0, s1 = row_products(a0, a2, b0, b1, IS_SIGNED, a0.shape[0] // 32)
        s2, s3 = row_products(a1, a3, b0, b1, IS_SIGNED, a0.shape[0] // 32)
        result = c0 + s0, c1 + s1, c2 + s2, c3 + s3
    return result


@triton.jit
def as_numbers(word):
    """The two float16 numbers of each word, as float32."""
    low = word.to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def halves(word):
    """The two float16 numbers of each word, [lanes, 2], as float32."""
    pair = word[:, None] >> (16 * tl.arange(0, 2))[None, :]
    return pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pair_products(first, second, b0, b1, WARPS: tl.constexpr):
    """Two neighbouring columns of eight rows of a product of float16 pairs, for each lane."""
    a_low = tl.reshape(halves(first), (WARPS, 8, 1, 8))
    a_high = tl.reshape(halves(second), (WARPS, 8, 1, 8))
    b_low = tl.reshape(halves(b0), (WARPS, 1, 8, 8))
    b_high = tl.reshape(halves(b1), (WARPS, 1, 8, 8))
    total = tl.sum(a_low * b_low + a_high * b_high, axis=3)
    return tl.split(tl.reshape(total, (WARPS * 32, 2)))


@triton.jit
def multiply_pairs(a, b0, b1, c, ASM: tl.constexpr):
    """c + A [16, 16] @ B [16, 8] for each warp, float16 and float32 sums, in the lanes of `mma.m16n8k16`."""
    a0, a1, a2, a3 = a
    c0, c1, c2, c3 = c
    if ASM:
        result = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    else:
        s0, s1 = pair_products(a0, a2, b0, b1, a0.shape[0] // 32)
        s2, s3 = pair_products(a1, a3, b0, b1, a0.shape[0] // 32)
        result = c0 + s0, c1 + s1, c2 + s2, c3 + s3
    return result


@triton.jit
def add_pairs(a, b, ASM: tl.constexpr):
    """Sums of two float16 numbers in each word, rounded to float16."""
    if ASM:
        result = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = a.to(tl.int16).to(tl.float16, bitcast=True) + b.to(tl.int16).to(tl.float16, bitcast=True)
        first, second = (a >> 16).to(tl.int16), (b >> 16).to(tl.int16)
        high = first.to(tl.float16, bitcast=True) + second.to(tl.float16, bitcast=True)
        bits = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        result = bits | (low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
    return result


@triton.jit
def permute(low, high, selector, ASM: tl.constexpr):
    """Bytes of eight, chosen by the lower four nibbles; with its highest bit set, one takes the sign, 0 or -1."""
    if ASM:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = low * 0
        for place in tl.static_range(4):
            index = (selector >> (4 * place)) & 15
            byte = (tl.where(index & 4 == 0, low, high) >> (8 * (index & 3))) & 255
            byte = tl.where(index & 8 == 0, byte, tl.where(byte & 128 == 0, 0, 255))
            result |= byte << (8 * place)
    return result


@triton.jit
def shift_right(word, BY: tl.constexpr):
    """The bits of a word from `BY` on, zeros above."""
    return (word >> BY) & ((1 << (32 - BY)) - 1)


@triton.jit
def selectors(words, STEP: tl.constexpr, ROW: tl.constexpr, BITS: tl.constexpr):
    """The codes of row g + 8 ROW of one step in the nibbles of a word; `words` are all words of the block."""
    if BITS == 4:
        result = words[2 * STEP + ROW]
    elif BITS == 3:
        if STEP % 4 < 3:
            result = words[STEP // 4 * 6 + ROW * 3 + STEP % 4] & 0x77777777
        else:
            result = (words[STEP // 4 * 6 + ROW * 3] >> 3) & 0x11111111
            result |= (words[STEP // 4 * 6 + ROW * 3 + 1] >> 2) & 0x22222222
            result |= (words[STEP // 4 * 6 + ROW * 3 + 2] >> 1) & 0x44444444
    elif BITS == 2:
        result = (words[STEP // 2 * 2 + ROW] >> (2 * (STEP % 2))) & 0x33333333
    else:
        result = (words[STEP // 4 * 2 + ROW] >> (STEP % 4)) & 0x11111111
    return result
