# SPDX-License-Identifier: Apache-2.0
"""Planes of 2- and 3-bit codes for the Triton kernel: more planes in a block. Drawn in README.md."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.planes import MAX_SPLIT_TILES, PLANE_K, ROW_TILE, mode_of, pack_words, tile_rows
from quattuor.kernels.w4a8_linear.reference import int8_weight

__all__ = ["BLOCKS", "Block", "pack_narrow", "prepare_narrow", "width_of"]


@dataclass(frozen=True, slots=True)
class Block:
    """What one block of K holds: `planes` of 128 elements in `chunks` of 128 bytes per row."""

    planes: int
    chunks: int

    @property
    def elements(self) -> int:
        """Elements of K in the block."""
        return self.planes * PLANE_K


#: The block of each width of stored codes.
BLOCKS = {2: Block(4, 1), 3: Block(8, 3), 4: Block(2, 1), 8: Block(2, 2)}


def width_of(problem: LinearProblem) -> int:
    """Return the bits in which the Triton kernel stores a code: 2, 3, 4 or 8.

    2 and 3 bits where codes are not scaled before they are multiplied: one scale per channel, or integer scales of
    groups that are multiples of a plane, which scale sums. Other groups scale nibbles.
    """
    if problem.weight_bits > 4:
        return 8
    is_whole = problem.group_size is None or (problem.integer_group_scale and problem.group_size % PLANE_K == 0)
    return problem.weight_bits if is_whole else 4


def pack_narrow(codes: Tensor, bits: int) -> Tensor:
    """Pack signed 2- or 3-bit codes [N, K] into int8 tiles [N' / 128, B * chunks, 128, 128] of B blocks of K.

    With 2 bits byte j of a row of a block holds element 128 p + j in bits 2 p and 2 p + 1. With 3 bits its three
    chunks hold planes 0, 2, 4 in bits 5-7 and planes 1, 3, 5 in bits 2-4; of planes 6 and 7 the upper two bits are
    bits 0-1 of the first and last chunk, the lowest bits are bits 1 and 0 of the middle chunk.
    """
    block = BLOCKS[bits]
    codes = pad(codes, (0, -codes.shape[1] % block.elements, 0, -codes.shape[0] % ROW_TILE))
    plane = (codes & (1 << bits) - 1).view(codes.shape[0], -1, block.planes, PLANE_K).unbind(dim=2)
    if bits == 2:
        chunks = [plane[0] | plane[1] << 2 | plane[2] << 4 | plane[3] << 6]
    else:
        chunks = [
            plane[0] << 5 | plane[1] << 2 | plane[6] >> 1,
            plane[2] << 5 | plane[3] << 2 | (plane[6] & 1) << 1 | plane[7] & 1,
            plane[4] << 5 | plane[5] << 2 | plane[7] >> 1,
        ]
    return tile_rows(torch.stack(chunks, dim=2).view(codes.shape[0], -1))


def prepare_narrow(
    problem: LinearProblem, codes: Tensor, scale: Tensor, group_scale: Tensor | None
) -> dict[str, Tensor]:
    """Return the tensors of `planes.prepare_planes` with codes in 2 or 3 bits.

    scale is divided by 2^(8 - bits) in channel mode, whose operands are codes at the top of a byte. Group scales
    are in `group_words` alone.
    """
    bits = problem.weight_bits
    row_padding = -problem.out_features % ROW_TILE
    is_channel = mode_of(problem) == "channel"
    factor = 2 ** (8 - bits) if is_channel else 1
    named = {
        "packed": pack_narrow(codes, bits),
        "scale": pad(scale / factor, (0, row_padding)),
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if problem.activation_zero_point:
        sums = int8_weight(problem, codes, group_scale).sum(dim=1, dtype=torch.int32)
        named["weight_sum"] = pad(sums * factor, (0, row_padding))
    if not is_channel:
        padded_features = problem.in_features + -problem.in_features % BLOCKS[bits].elements
        groups = -(-padded_features // problem.group_size)
        padding = (0, row_padding, 0, groups - problem.num_groups)
        padded = pad(group_scale.T, padding, value=1).contiguous().to(torch.int8)
        named["group_words"] = pack_words(padded, problem.group_size, BLOCKS[bits].planes, padded_features)
    return named
