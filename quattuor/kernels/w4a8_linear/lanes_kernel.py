# SPDX-License-Identifier: Apache-2.0
"""The kernel for one token, for compute capability 8.0 and later, and its launch. README.md explains the design.

A product with a vector needs no tensor core to keep up with memory, only bytes in flight. Each thread loads 16
bytes of several rows straight to registers and adds products of four bytes at a time; the bytes of the token that
meet these are the same in all its rows. Nothing waits at a barrier until the sums of a row are added over a warp.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quattuor.kernels.launch import launcher
from quattuor.kernels.token_quantize.triton_kernel import gated, overlaps
from quattuor.kernels.w4a8_linear.lane_scales import STEP_BLOCKS
from quattuor.kernels.w4a8_linear.lanes_sums import (
    CHANNEL,
    INTEGER,
    MODES,
    add_step,
    extend_scales,
    scales_of,
    start_of_scales,
)
from quattuor.kernels.w4a8_linear.planes import LanesTile

__all__ = ["launch_lanes", "w4a8_lanes_kernel"]


@triton.jit
def load_rows(start, offset, block, step: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Four blocks of the rows, as words; zero beyond the last block."""
    if 4 * step + 4 <= NUM_BLOCKS:
        words = tl.load(start + step * 16384 + offset, eviction_policy="evict_first")
    else:
        is_inside = tl.broadcast_to(block < NUM_BLOCKS - 4 * step, offset.shape)
        words = tl.load(start + step * 16384 + offset, mask=is_inside, other=0, eviction_policy="evict_first")
    return words


@triton.jit
def load_plane(x_words, offset, block, step: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """Codes of the token that meet one plane of four blocks, as words; zero beyond the last block."""
    if 4 * step + 4 <= NUM_BLOCKS:
        words = tl.load(x_words + step * 256 + offset)
    else:
        is_inside = tl.broadcast_to(block < NUM_BLOCKS - 4 * step, offset.shape)
        words = tl.load(x_words + step * 256 + offset, mask=is_inside, other=0)
    return words


@triton.jit
def store_row(
    out,
    bias,
    sums,
    row_scale,
    token_scale,
    first,
    row,
    N,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    ASM: tl.constexpr,
):
    """Scale the sums of a program, add the bias, round once; gate one half with the other where that is asked."""
    result = tl.sum(sums, axis=2).to(tl.float32) * row_scale * token_scale
    if HAS_BIAS:
        num_rows = 2 * N if IS_GATED else N
        result = result + tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)
    rounded = result.to(out.dtype.element_ty)
    if IS_GATED:
        PAIRS: tl.constexpr = rounded.shape[1] // 2
        gate, up = tl.split(tl.reshape(rounded, (rounded.shape[0], PAIRS, 2)))
        warp = tl.arange(0, rounded.shape[0])[:, None]
        output = first + warp + tl.arange(0, PAIRS)[None, :] * rounded.shape[0]
        tl.store(out + output, gated(gate, up, ASM), mask=output < N)
    else:
        tl.store(out + row, rounded, mask=row < N)


@triton.jit
def w4a8_lanes_kernel(
    x,
    x_scale,
    packed,
    scale,
    lane_scales,
    bias,
    out,
    N,
    stride_xm,
    NUM_BLOCKS: tl.constexpr,
    MODE: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS rows of the weight by one token, over the whole of K, four blocks of it in a step.

    AHEAD steps are loaded before they are needed, the first ones before the kernel waits for the one before it.
    With IS_GATED half of the rows are gates, and N counts outputs.
    """
    if OVERLAP:
        gdc_launch_dependents()
    OUTPUTS: tl.constexpr = ROWS // 2 if IS_GATED else ROWS
    first = tl.program_id(0) * OUTPUTS
    token = tl.program_id(1)
    lane = tl.arange(0, 128)[None, None, :]
    block = lane // 32
    own = tl.arange(0, ROWS // WARPS)
    if IS_GATED:
        # a gate and what it multiplies follow each other
        row = first + tl.arange(0, WARPS)[:, None] + (own // 2 * WARPS + own % 2 * N)[None, :]
        start = packed.to(tl.pointer_type(tl.int32), bitcast=True)
        of_row = row // 128 * (NUM_BLOCKS * 4096) + row % 128 * 32
    else:
        row = first + tl.arange(0, WARPS)[:, None] + (own * WARPS)[None, :]
        rows_start = packed + (first // 128).to(tl.int64) * (NUM_BLOCKS * 16384) + first % 128 * 128
        start = rows_start.to(tl.pointer_type(tl.int32), bitcast=True)
        of_row = (row - first) * 32
    offset = of_row[:, :, None] + (block * 4096 + lane % 32)

    STEPS: tl.constexpr = (NUM_BLOCKS + 3) // 4
    scales_start = lane_scales
    if MODE != CHANNEL:
        scales_start = start_of_scales(lane_scales, first, row, PARTS, WORDS, IS_GATED)

    # neither the weight nor its scales depend on the kernel before this one
    words = ()
    scales = ()
    for step in tl.static_range(AHEAD):
        scales = extend_scales(scales, scales_start, step, MODE, WORDS, ASM)
    for step in tl.static_range(AHEAD):
        words += (load_rows(start, offset, block, step, NUM_BLOCKS),)
    row_scale = tl.load(scale + row)
    if OVERLAP:
        gdc_wait()
    x += token.to(tl.int64) * stride_xm
    x_words = x.to(tl.pointer_type(tl.int32), bitcast=True)
    of_x = tl.broadcast_to(block * 64 + lane % 32, (WARPS, 1, 128))
    sums = tl.zeros((WARPS, ROWS // WARPS, 32), dtype=tl.int32)
    token_scale = tl.load(x_scale + token)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            scales = extend_scales(scales, scales_start, step + AHEAD, MODE, WORDS, ASM)
            words += (load_rows(start, offset, block, step + AHEAD, NUM_BLOCKS),)
        x_low = load_plane(x_words, of_x, block, step, NUM_BLOCKS)
        x_high = load_plane(x_words + 32, of_x, block, step, NUM_BLOCKS)
        sums = add_step(sums, words[step], x_low, x_high, scales_of(scales, step, MODE, ASM), MODE, ASM)
    if MODE == INTEGER:
        # the sums are of 16 * code, the stored scale is not a sixteenth
        sums = sums >> 4
    out += token.to(tl.int64) * N
    store_row(out, bias, sums, row_scale, token_scale, first, row, N, HAS_BIAS, IS_GATED, ASM)


def launch_lanes(
    x_codes: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tile: LanesTile,
    mode: str = "channel",
    lane_scales: Tensor | None = None,
    is_gated: bool = False,
    interpret: bool = False,
) -> None:
    """Fill `out` [M, N]; `packed` and `scale` are padded as `planes` describes.

    Args:
        x_codes: [M, K], K whole blocks; rows are contiguous and aligned to 16 bytes.
        x_scale: [M].
        packed: The weight; with `is_gated` of 2 N rows.
        scale: Of each row.
        bias: Of each row, or None.
        out: [M, N], contiguous.
        mode: "channel", or how groups are scaled, as `planes.group_scale_of` returns it.
        lane_scales: Group scales as `pack_lane_scales` returns them, for every row of `packed`; None without.
        tile: With `is_gated` N is a multiple of half its rows, and each warp has an even number of them.
        is_gated: Whether outputs are silu(gate) * up, both rounded to their dtype, of rows that are gate, then up.
        interpret: As for the other kernels.
    """
    num_tokens, out_features = out.shape
    num_blocks = packed.shape[1]
    overlap = overlaps(x_codes.device)
    grid = (triton.cdiv(out_features * (1 + is_gated), tile.rows), num_tokens)
    launcher(w4a8_lanes_kernel, grid)(
        x_codes,
        x_scale,
        packed,
        scale,
        scale if lane_scales is None else lane_scales,
        scale if bias is None else bias,
        out,
        out_features,
        x_codes.stride(0),
        NUM_BLOCKS=num_blocks,
        MODE=MODES[mode],
        PARTS=1 if lane_scales is None else lane_scales.shape[1] // STEP_BLOCKS,
        WORDS=2 if lane_scales is None else lane_scales.shape[2],
        ROWS=tile.rows,
        WARPS=tile.num_warps,
        AHEAD=min(tile.ahead, triton.cdiv(num_blocks, 4)),
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        ASM=not interpret,
        OVERLAP=overlap,
        num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
        launch_pdl=overlap,
        # the float32 steps of the epilogue must round one by one, as in the reference
        enable_fp_fusion=False,
    )
