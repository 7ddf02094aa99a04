# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, the tile for each token count, when the weight is decoded."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem, TokenRange
from quattuor.kernels.requirements import reason_against_triton
from quattuor.kernels.w4a8_linear.triton import processors
from quattuor.kernels.w4a16_linear import measured
from quattuor.kernels.w4a16_linear.planes import (
    MAX_BYTES_FEATURES,
    MIN_BYTES_PLANE,
    MIN_PLANE,
    STORED_BITS,
    DigitTile,
    LaneTile,
    Layout,
    PairTile,
    Tile,
    layout_of,
    prepare_tensors,
)

__all__ = ["DECODED_FROM", "Triton", "choose_bytes_tile", "choose_lane_tile", "choose_tile", "takes_bytes"]

#: Without a measured tile, up to this many tokens are multiplied as bytes: of a layer of so many codes.
FEW, LARGE = 2, 2**27
#: The same for one token.
MEDIUM = 2**24

#: From this many tokens on, the weight is written out once per call and multiplied by the library.
DECODED_FROM = 512


def choose_tile(
    num_tokens: int,
    out_features: int,
    layout: Layout,
    num_blocks: int,
    num_processors: int,
    has_warpgroups: bool,
    element_size: int = 2,
) -> Tile:
    """Return the tile for a token count: small, with K split, while tiles are few; wide otherwise.

    Activations of 4 bytes leave shared memory for 16 tokens, and for two stages. The more planes a block has, the
    more registers its operands take, and the fewer tokens fit beside them, above all without warpgroup
    instructions.
    """
    most = {16: 32, 8: 64, 4: 64, 2: 64}[layout.planes] // (1 if has_warpgroups or layout.planes < 8 else 2)
    if element_size == 4:
        rows, tokens, num_warps, num_stages, per_processor = 64, 16, 4, 2, 3
    elif num_tokens <= 8:
        rows, tokens, num_warps, num_stages, per_processor = 64, 8, 4, 3, 4
    elif num_tokens <= 16 or most == 16:
        rows, tokens, num_warps, num_stages, per_processor = 64, 16, 4, 3, 3
    elif num_tokens <= 32 or most == 32:
        rows, tokens, num_warps, num_stages, per_processor = 64, 32, 4, 2, 2
    elif not has_warpgroups:
        rows, tokens, num_warps, num_stages, per_processor = 64, 64, 4, 2, 2
    else:
        # 128 tokens would need more registers than there are: the sums of a group and of all groups coexist
        rows, tokens, num_warps, num_stages, per_processor = 128, 64, 8, 2 if layout.planes > 4 else 3, 1
    tiles = -(-out_features // rows) * -(-num_tokens // tokens)
    # a part shorter than 2 blocks costs more in partial sums than it gains in occupancy
    split = max(1, min(num_processors * per_processor // tiles, num_blocks // 2))
    return Tile(rows=rows, tokens=tokens, split=split, num_warps=num_warps, num_stages=num_stages)


def choose_lane_tile(out_features: int, num_blocks: int, num_processors: int) -> LaneTile:
    """Return the tile of `lanes`: as few warps for 16 rows as give every multiprocessor seven.

    Programs of a single warp were fastest with the next kernel after all of them, others as a rule before.
    """
    tiles = -(-out_features // 16)
    num_warps = 1
    while num_warps < 8 and tiles * num_warps < 7 * num_processors and 2 * num_warps <= num_blocks:
        num_warps *= 2
    return LaneTile(
        num_warps=num_warps, depth=1, holds=True, before=0, overlap="own" if num_warps == 1 else "late"
    )


def choose_bytes_tile(
    problem: LinearProblem, layout: Layout, num_blocks: int, num_processors: int, num_tokens: int
) -> DigitTile | LaneTile | PairTile:
    """Return the tile of one or two tokens, for compute capability 9.0; what most measured layers chose.

    On large layers `pairs` is ahead for one token with groups, else `digits`, but for 3 bits, whose planes of 32
    elements are short for its copies.
    """
    out_features = problem.out_features
    if layout.bits == 3 or out_features * problem.in_features < LARGE:
        return choose_lane_tile(out_features, num_blocks, num_processors)
    if num_tokens == 1 and layout.pieces(problem.group_size) > 1 and not problem.zero_point:
        return PairTile(num_warps=2, is_early=False, overlap="late")
    split = max(1, min(num_processors * 4 // -(-out_features // 64), num_blocks // 2))
    sizes = {"rows": 64, "tokens": FEW, "split": split, "num_warps": 2, "num_stages": 4}
    return DigitTile(**sizes, overlap="own", before=0, is_direct=False)


def takes_bytes(problem: LinearProblem, num_tokens: int, element_size: int, has_warpgroups: bool) -> bool:
    """Return whether bytes are multiplied where no tile was measured.

    They are where the kernel before the product does not show beside the weight, and where activations of 4 bytes
    would take no tensor cores.
    """
    layout = layout_of(problem)
    size = problem.out_features * problem.in_features
    return (
        has_warpgroups
        and num_tokens <= FEW
        and layout.plane_k >= MIN_BYTES_PLANE
        and problem.in_features <= MAX_BYTES_FEATURES
        and (element_size == 4 or (layout.bits < 8 and size >= (MEDIUM if num_tokens == 1 else LARGE)))
    )


@functools.lru_cache(maxsize=4096)
def tile_for(
    problem: LinearProblem, num_tokens: int, element_size: int, device: torch.device
) -> Tile | DigitTile | LaneTile | PairTile:
    """Return the measured tile of a layer, or the one that the rule gives."""
    tile = measured.find(problem, num_tokens)
    if isinstance(tile, DigitTile | LaneTile | PairTile) or (tile is not None and element_size == 2):
        return tile
    layout = layout_of(problem)
    num_blocks = -(-problem.in_features // layout.block_k)
    num_processors, has_warpgroups = processors(device)
    if takes_bytes(problem, num_tokens, element_size, has_warpgroups):
        return choose_bytes_tile(problem, layout, num_blocks, num_processors, num_tokens)
    return choose_tile(
        num_tokens, problem.out_features, layout, num_blocks, num_processors, has_warpgroups, element_size
    )


def is_decoded(x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> bool:
    """Return whether the library multiplies: for many tokens, where it takes and returns these dtypes."""
    dtypes = {x.dtype, out_dtype} | ({bias.dtype} if bias is not None else set())
    return x.shape[0] >= DECODED_FROM and dtypes in ({torch.float16}, {torch.bfloat16})


class Triton(Implementation):
    """Plain Triton: codes unpacked in registers, scaled after the product of each group."""

    name = "triton"
    layout = "fields"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        reason = reason_against_triton(problem)
        if reason is not None:
            return reason
        if layout_of(problem).plane_k < MIN_PLANE:
            return f"needs a group size that is a multiple of {MIN_PLANE}, not {problem.group_size}"
        return None

    def remark(self, problem: LinearProblem, tokens: TokenRange) -> str:
        if tokens.last is not None and tokens.last < DECODED_FROM:
            return ""
        return (
            f"from {DECODED_FROM} tokens of 16 bits on, the weight is decoded to them in each call and multiplied "
            "by the library"
        )

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tensors(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.w4a16_linear.decode_kernel import launch_decode
        from quattuor.kernels.w4a16_linear.digits import launch_digits
        from quattuor.kernels.w4a16_linear.lanes import launch_lanes
        from quattuor.kernels.w4a16_linear.pairs import launch_pairs
        from quattuor.kernels.w4a16_linear.triton_kernel import launch as launch_tiles

        (x,) = inputs
        num_tokens = x.shape[0]
        out_features, in_features = problem.out_features, problem.in_features
        if num_tokens == 0:
            return torch.empty(0, out_features, dtype=out_dtype, device=x.device)
        weight = (operand["packed"], operand["scale"], operand.get("zero_point", operand.get("offset")))
        kind = {"layout": layout_of(problem), "group_size": problem.group_size}
        with torch.cuda.device_of(x):
            if is_decoded(x, bias, out_dtype):
                decoded = torch.empty(out_features, in_features, dtype=x.dtype, device=x.device)
                launch_decode(*weight, decoded, **kind)
                return torch.nn.functional.linear(x, decoded, bias)
            out = torch.empty(num_tokens, out_features, dtype=out_dtype, device=x.device)
            x = x if x.stride(1) == 1 else x.contiguous()
            bias = bias if bias is None else bias.contiguous()
            tile = tile_for(problem, num_tokens, x.element_size(), x.device)
            if isinstance(tile, LaneTile):
                launch_lanes(x, *weight, bias, out, tile=tile, **kind)
            elif isinstance(tile, PairTile):
                launch_pairs(x, *weight, bias, out, tile=tile, **kind)
            elif isinstance(tile, DigitTile):
                launch_digits(x, *weight, operand["arrivals"], bias, out, tile=tile, **kind)
            else:
                launch_tiles(x, *weight, operand["arrivals"], bias, out, tile=tile, **kind)
        return out
