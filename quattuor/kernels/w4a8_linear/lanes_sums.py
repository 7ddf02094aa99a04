# SPDX-License-Identifier: Apache-2.0
"""What a thread of the kernel for one token adds up: four words of each row in a step, with and without groups.

The four words of a thread lie in one group of each plane, because groups are multiples of 16 elements: their
products are added before they are scaled. One sum for each row leaves registers to weight on its way.
"""

import triton
import triton.language as tl

from quattuor.kernels.w4a8_linear.unpacking import HIGH_HALF, HIGH_UNCLAMPED, LOW_HALF, LOW_UNCLAMPED

__all__ = ["CHANNEL", "INTEGER", "MODES", "add_step", "extend_scales", "scales_of", "start_of_scales"]

# How codes are scaled before the sum over a row.
CHANNEL = tl.constexpr(0)  # not at all
INTEGER = tl.constexpr(1)  # sums of a thread by integers
HALF = tl.constexpr(2)  # codes by float16, clamped to int8
UNCLAMPED = tl.constexpr(3)  # codes by float16, which no product needs clamped

MODES = {"channel": CHANNEL, "integer": INTEGER, "half": HALF, "unclamped": UNCLAMPED}


@triton.constexpr_function
def extraction(index, is_integer):
    """Return the assembly that spreads one byte with its sign, or one half, of $1 over a word."""
    selector = (8 + index) * 0x1110 + index if is_integer else 0x1010 + index * 0x2222
    return f"prmt.b32 $0, $1, 0, {selector:#x};"


@triton.jit
def add_bytes(sums, a, b, ASM: tl.constexpr):
    """sums + the products of the four int8 in each int32."""
    if ASM:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            sums += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return sums


@triton.jit
def quarters(words):
    """The four words of a thread apart: each of four results has one for each lane."""
    FOUR: tl.constexpr = (words.shape[0], words.shape[1], 32, 2, 2)
    even, odd = tl.split(tl.reshape(words, FOUR))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_words(pointer, COUNT: tl.constexpr, ASM: tl.constexpr):
    """Two or four neighbouring words for each lane; as assembly, which leaves them where they are needed."""
    if not ASM:
        words = (tl.load(pointer), tl.load(pointer + 1))
        if COUNT == 4:
            words += (tl.load(pointer + 2), tl.load(pointer + 3))
    elif COUNT == 4:
        words = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        words = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return words


@triton.jit
def start_of_scales(lane_scales, first, row, PARTS: tl.constexpr, WORDS: tl.constexpr, IS_GATED: tl.constexpr):
    """Where the scales of each row and lane begin; rows follow `first` closely unless some are gates."""
    lane = tl.arange(0, 32)[None, None, :]
    part = lane // 8 * PARTS + lane % 8 // (8 // PARTS)
    OF_ROW: tl.constexpr = 4 * PARTS * WORDS
    if IS_GATED:
        start = lane_scales + ((row * OF_ROW)[:, :, None] + part * WORDS)
    else:
        # a base for all, so that what differs between rows is known to be small
        start = lane_scales + first.to(tl.int64) * OF_ROW + (((row - first) * OF_ROW)[:, :, None] + part * WORDS)
    return start


@triton.jit
def extend_scales(scales, start, step: tl.constexpr, MODE: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Load scales where a step needs the first of several words: an integer takes a fourth of one, a half two."""
    if MODE != CHANNEL:
        STEPS: tl.constexpr = 2 if MODE == INTEGER else 1
        COUNT: tl.constexpr = 4 if WORDS % 4 == 0 else 2
        if step % (STEPS * COUNT) == 0:
            scales += load_words(start + step // STEPS, COUNT, ASM)
    return scales


@triton.jit
def scale_of(word, INDEX: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """One scale of a word as int32: a byte with its sign, or a float16 in both halves."""
    if ASM:
        scale = tl.inline_asm_elementwise(
            extraction(INDEX, MODE == INTEGER), "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    elif MODE == INTEGER:
        scale = (word << (24 - 8 * INDEX)) >> 24
    else:
        scale = (word >> (16 * INDEX)) & 0xFFFF
    return scale


@triton.jit
def scales_of(scales, step: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """The scales of a step of both planes."""
    if MODE == CHANNEL:
        both = (0, 0)
    elif MODE == INTEGER:
        word = scales[step // 2]
        both = (scale_of(word, step % 2 * 2, MODE, ASM), scale_of(word, step % 2 * 2 + 1, MODE, ASM))
    else:
        both = (scale_of(scales[step], 0, MODE, ASM), scale_of(scales[step], 1, MODE, ASM))
    return both


@triton.jit
def scale_code(code, half):
    """clamp(rne(code * half)) for the interpreter; `half` holds a float16 in its low bits."""
    product = code.to(tl.float32) * half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # adding and subtracting 1.5 * 2^23 rounds a small float32 to the nearest even integer
    rounded = (tl.minimum(tl.maximum(product, -256.0), 256.0) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int32)


@triton.jit
def scale_codes(word, both, HIGH: tl.constexpr, MODE: tl.constexpr, ASM: tl.constexpr):
    """Four int8 of a plane of a word: clamp(rne(code * scale)); the scale is in both halves of `both`."""
    if ASM:
        LOW_BODY: tl.constexpr = LOW_HALF if MODE == HALF else LOW_UNCLAMPED
        HIGH_BODY: tl.constexpr = HIGH_HALF if MODE == HALF else HIGH_UNCLAMPED
        operand = tl.inline_asm_elementwise(
            HIGH_BODY if HIGH else LOW_BODY, "=r,r,r", [word, both], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        operand = word * 0
        for byte in tl.static_range(4):
            code = (word << ((24 if HIGH else 28) - 8 * byte)) >> 28
            operand |= (scale_code(code, both) & 0xFF) << (8 * byte)
    return operand


@triton.jit
def add_step(sums, words, x_low, x_high, both, MODE: tl.constexpr, ASM: tl.constexpr):
    """Add a step to the sums of every row and lane; `both` are the scales of its planes.

    16 * code of both planes is multiplied, unless float16 scales make int8 of codes.
    """
    four = quarters(words)
    four_low = quarters(x_low)
    four_high = quarters(x_high)
    if MODE == INTEGER:
        low = tl.zeros(sums.shape, dtype=tl.int32)
        high = tl.zeros(sums.shape, dtype=tl.int32)
        for i in tl.static_range(4):
            low = add_bytes(low, (four[i] << 4) & -0x0F0F0F10, tl.broadcast_to(four_low[i], sums.shape), ASM)
            high = add_bytes(high, four[i] & -0x0F0F0F10, tl.broadcast_to(four_high[i], sums.shape), ASM)
        sums += low * both[0]
        sums += high * both[1]
    else:
        for i in tl.static_range(4):
            if MODE == CHANNEL:
                low = (four[i] << 4) & -0x0F0F0F10
                high = four[i] & -0x0F0F0F10
            else:
                low = scale_codes(four[i], both[0], False, MODE, ASM)
                high = scale_codes(four[i], both[1], True, MODE, ASM)
            sums = add_bytes(sums, low, tl.broadcast_to(four_low[i], sums.shape), ASM)
            sums = add_bytes(sums, high, tl.broadcast_to(four_high[i], sums.shape), ASM)
    return sums
