# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 (Triton knows no unpacking)
"""Loads of the kernel for few tokens, in the order of the program, and what keeps them there.

Every tensor has one element per thread, so that it is a register; tuples of them are what a thread holds.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quattuor.kernels.w4a16_linear.fragments.text import load_text, masked_load_text

__all__ = ["hold_loads", "load_block", "load_tokens", "load_values"]


@gluon.jit
def load_vector(address, COUNT: gl.constexpr, STREAMS: gl.constexpr):
    """COUNT int32 of each thread from one address."""
    if COUNT == 1:
        found = (
            gl.inline_asm_elementwise(
                load_text(1, STREAMS), "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
            ),
        )
    elif COUNT == 2:
        found = gl.inline_asm_elementwise(
            load_text(2, STREAMS), "=r,=r,l", [address], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
        )
    else:
        found = gl.inline_asm_elementwise(
            load_text(4, STREAMS),
            "=r,=r,=r,=r,l",
            [address],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=False,
            pack=1,
        )
    return found


@gluon.jit
def load_if(address, condition):
    """Four int32 of each thread where the int32 condition is not 0, else zeros."""
    return gl.inline_asm_elementwise(
        masked_load_text(),
        "=r,=r,=r,=r,l,r",
        [address, condition],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def load_short(address):
    """Two bytes of each thread as int32."""
    return gl.inline_asm_elementwise(
        "{ .reg .u16 t; ld.global.u16 t, [$1]; cvt.u32.u16 $0, t; }",
        "=r,l",
        [address],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def hold_loads(value):
    """Keep the loads before this place there: the assembler would sink them to where it must wait for them."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_block(address, WORDS: gl.constexpr, PLANE_K: gl.constexpr, R: gl.constexpr):
    """The packed words of a block of each thread: by word, run of 32 words and row."""
    found = ()
    for word in gl.static_range(WORDS):
        for run in gl.static_range(PLANE_K // 32):
            for row in gl.static_range(2 * R):
                found = found + load_vector(
                    address + (word * 128 * PLANE_K + row * PLANE_K + run * 32) * 2, 4, True
                )
    return found


@gluon.jit
def load_values(
    values,
    row,
    block,
    N_PADDED,
    BYTES: gl.constexpr,
    R: gl.constexpr,
    PIECES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The scales or zero points of each thread's 2 R rows for the pieces of a block, as they lie in memory."""
    found = ()
    for piece in gl.static_range(PIECES):
        group = (block * BLOCK_K + piece * (BLOCK_K // PIECES)) // GROUP
        address = values + (group * N_PADDED + row).to(gl.int64) * BYTES
        if BYTES * R == 1:
            found = found + (load_short(address),)
        else:
            found = found + load_vector(address, BYTES * R // 2, False)
    return found


@gluon.jit
def load_tokens(address, k, K, token, M, stride_xm, OFFSET_K: gl.constexpr, T: gl.constexpr, EVEN_K: gl.constexpr):
    """Activations of 32 elements of K from OFFSET_K on, zero outside the matrix; `k` is the first of each lane."""
    found = ()
    for t in gl.static_range(T):
        condition = token + 8 * t < M
        if not EVEN_K:
            condition = condition & (k + OFFSET_K < K)
        start = address + OFFSET_K * 2
        if t > 0:
            start = start + stride_xm.to(gl.int64) * (16 * t)
        found = found + load_if(start, gl.where(condition, 1, 0))
    return found
