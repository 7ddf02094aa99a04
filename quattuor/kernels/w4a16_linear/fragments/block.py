# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 (Triton knows no unpacking)
"""What the kernel for few tokens does with a block: products of its planes, and the scales of its groups.

Every tensor has one element per thread, so that it is a register; tuples of them are what a thread holds.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quattuor.kernels.w4a16_linear.fragments.loads import load_tokens
from quattuor.kernels.w4a16_linear.fragments.text import (
    ends_unit,
    factor,
    field_position,
    field_shift,
    is_lowest,
    ones_text,
    plane_at,
    product_constraints,
    product_text,
    starts_unit,
)

__all__ = ["INTEGER", "MIDDLE", "OFFSET", "add_block", "zeros_of"]

# What is subtracted from a code; as decode_kernel has it.
MIDDLE = gl.constexpr(0)
INTEGER = gl.constexpr(1)
OFFSET = gl.constexpr(2)


@gluon.jit
def multiply(words, x, acc, T: gl.constexpr, BITS: gl.constexpr, POSITION: gl.constexpr, KIND: gl.constexpr):
    """Sums plus two products for each of T times 8 tokens: 16 rows by 32 elements of a plane."""
    if T == 1:
        found = gl.inline_asm_elementwise(
            product_text(BITS, POSITION, KIND, 1),
            product_constraints(1),
            words + x + acc,
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        found = gl.inline_asm_elementwise(
            product_text(BITS, POSITION, KIND, 2),
            product_constraints(2),
            words + x + acc,
            dtype=(
                gl.float32,
                gl.float32,
                gl.float32,
                gl.float32,
                gl.float32,
                gl.float32,
                gl.float32,
                gl.float32,
            ),
            is_pure=True,
            pack=1,
        )
    return found


@gluon.jit
def add_tokens(x, acc, KIND: gl.constexpr):
    """Sums plus the activations of 32 elements of K, in the unit of the products."""
    return gl.inline_asm_elementwise(
        ones_text(KIND),
        "=f,=f,=f,=f,r,r,r,r,0,1,2,3",
        x + acc,
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def zeros_of(COUNT: gl.constexpr, layout: gl.constexpr, SIZE: gl.constexpr):
    """Zeros of each thread."""
    found = ()
    for _ in gl.static_range(COUNT):
        found = found + (gl.zeros([SIZE], gl.float32, layout),)
    return found


@gluon.jit
def part(values, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """COUNT elements of a tuple."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (values[FIRST + i],)
    return found


@gluon.jit
def value_of(raw, piece: gl.constexpr, row: gl.constexpr, BYTES: gl.constexpr, R: gl.constexpr):
    """The float32 of one row and piece: from float32, float16 or a byte."""
    if BYTES == 4:
        value = raw[piece * (2 * R) + row].to(gl.float32, bitcast=True)
    elif BYTES == 2:
        word = raw[piece * R + row // 2]
        if row % 2 == 1:
            word = word >> 16
        value = word.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        value = ((raw[piece] >> (8 * row)) & 0xFF).to(gl.float32)
    return value


@gluon.jit
def plane_word(
    words,
    plane: gl.constexpr,
    at: gl.constexpr,
    STRIDE: gl.constexpr,
    BITS: gl.constexpr,
    KIND: gl.constexpr,
):
    """One register, shifted such that the plane lies at its position; `at` is its place among those of a word."""
    if BITS == 3 and plane == 15:
        first = (words[at] >> 15) & 0x00010001
        second = (words[STRIDE + at] >> 14) & 0x00020002
        word = first | second | ((words[2 * STRIDE + at] >> 13) & 0x00040004)
    else:
        word = words[(plane // 5 if BITS == 3 else 0) * STRIDE + at]
        if field_shift(BITS, plane, KIND) > 0:
            word = word >> field_shift(BITS, plane, KIND)
    return word


@gluon.jit
def add_run(
    sums,
    products,
    words,
    x,
    plane: gl.constexpr,
    run: gl.constexpr,
    RUNS: gl.constexpr,
    BITS: gl.constexpr,
    R: gl.constexpr,
    T: gl.constexpr,
    KIND: gl.constexpr,
):
    """Sums and products plus those of 32 elements of K."""
    STRIDE: gl.constexpr = RUNS * 2 * R * 4
    POSITION: gl.constexpr = field_position(BITS, plane, KIND)
    added = ()
    for t in gl.static_range(T):
        added = added + add_tokens(part(x, 4 * t, 4), part(sums, 4 * t, 4), KIND)
    updated = ()
    for r in gl.static_range(R):
        operand = ()
        for at in gl.static_range(8):
            word = plane_word(words, plane, (run * 2 * R + 2 * r) * 4 + at, STRIDE, BITS, KIND)
            operand = operand + (word,)
        updated = updated + multiply(operand, x, part(products, 4 * T * r, 4 * T), T, BITS, POSITION, KIND)
    return added, updated


@gluon.jit
def combine(combined, products, FACTOR: gl.constexpr, IS_FIRST: gl.constexpr, COUNT: gl.constexpr):
    """Products of planes of another unit, added to those of the piece."""
    updated = ()
    for i in gl.static_range(COUNT):
        value = products[i]
        if FACTOR != 1.0:
            value = value * FACTOR
        if not IS_FIRST:
            value = combined[i] + value
        updated = updated + (value,)
    return updated


@gluon.jit
def add_piece(
    total,
    combined,
    sums,
    scales,
    zeros,
    piece: gl.constexpr,
    BITS: gl.constexpr,
    ZERO: gl.constexpr,
    IS_GROUPED: gl.constexpr,
    SCALE_BYTES: gl.constexpr,
    ZERO_BYTES: gl.constexpr,
    R: gl.constexpr,
    T: gl.constexpr,
):
    """The sums of a tile plus those of a piece, less the zero point times its activations, and scaled."""
    updated = ()
    for i in gl.static_range(4 * R * T):
        value = combined[i]
        if ZERO == MIDDLE:
            value = value - sums[i // 4 % T * 4 + i % 2] * (2.0 ** (BITS - 1))
        else:
            zero = value_of(zeros, piece, i // (4 * T) * 2 + i % 4 // 2, ZERO_BYTES, R)
            if ZERO == OFFSET:
                zero = zero + 2.0 ** (BITS - 1)
            value = value - zero * sums[i // 4 % T * 4 + i % 2]
        if IS_GROUPED:
            value = value * value_of(scales, piece, i // (4 * T) * 2 + i % 4 // 2, SCALE_BYTES, R)
        updated = updated + (value + total[i],)
    return updated


@gluon.jit
def add_block(
    total,
    words,
    scales,
    zeros,
    x_address,
    k,
    K,
    token,
    M,
    stride_xm,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    PLANE_K: gl.constexpr,
    PIECES: gl.constexpr,
    ZERO: gl.constexpr,
    IS_GROUPED: gl.constexpr,
    SCALE_BYTES: gl.constexpr,
    ZERO_BYTES: gl.constexpr,
    R: gl.constexpr,
    T: gl.constexpr,
    EVEN_K: gl.constexpr,
    KIND: gl.constexpr,
    SIZE: gl.constexpr,
    layout: gl.constexpr,
):
    """The sums of a tile plus those of a block; `k` is the first element of K of each lane."""
    RUNS: gl.constexpr = PLANE_K // 32
    LENGTH: gl.constexpr = PLANES // PIECES
    COUNT: gl.constexpr = 4 * R * T
    sums = zeros_of(4 * T, layout, SIZE)
    products = zeros_of(COUNT, layout, SIZE)
    combined = products
    for i in gl.static_range(PLANES):
        if i % LENGTH == 0:
            sums = zeros_of(4 * T, layout, SIZE)
        if starts_unit(BITS, LENGTH, i, KIND):
            products = zeros_of(COUNT, layout, SIZE)
        for run in gl.static_range(RUNS):
            x = load_tokens(
                x_address,
                k,
                K,
                token,
                M,
                stride_xm,
                plane_at(BITS, LENGTH, i, KIND) * PLANE_K + run * 32,
                T,
                EVEN_K,
            )
            sums, products = add_run(
                sums, products, words, x, plane_at(BITS, LENGTH, i, KIND), run, RUNS, BITS, R, T, KIND
            )
        if ends_unit(BITS, LENGTH, i, KIND):
            combined = combine(
                combined,
                products,
                factor(BITS, LENGTH, i, KIND),
                is_lowest(BITS, LENGTH, i, KIND),
                COUNT,
            )
        if i % LENGTH == LENGTH - 1:
            total = add_piece(
                total,
                combined,
                sums,
                scales,
                zeros,
                i // LENGTH,
                BITS,
                ZERO,
                IS_GROUPED,
                SCALE_BYTES,
                ZERO_BYTES,
                R,
                T,
            )
    return total
