# SPDX-License-Identifier: Apache-2.0
"""The weight layout of the GPU kernels: contiguous tiles of 128 rows by 64 words of 16 bits.

A block of K is cut into sub-blocks of 64. Word j of a row of a tile holds bits of the codes at place j of every
sub-block of the block, so that a mask takes one sub-block out of two words at once:

    kind, bits        sub-blocks   tiles of a block
    planes, b         16           b, one bit of every sub-block each
    codebook, 1       16           1
    codebook, 2       8            1
    codebook, 3       16           3: two with the lower bits of eight sub-blocks each, one with the third bits
    codebook, 4       4            1
    codebook, 5 to 8  2            1, a byte for each code
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = [
    "MAX_LOOK_UP_BITS",
    "ONE_GROUP",
    "SUB_BLOCK",
    "block_k",
    "num_tiles",
    "pack_tiles",
    "piece_of",
    "prepare_tiles",
    "unit_of",
]

SUB_BLOCK = 64
#: Rows of a tile; the weight is padded to whole tiles.
TILE_ROWS = 128
#: Tiles of outputs and tokens that programs can share; beyond them there is enough work without splitting K.
MAX_SPLIT_TILES = 1 << 14
#: Group size of a kernel where a row is one group: whole rows compile to one kernel, whatever K is.
ONE_GROUP = 1 << 30
#: Bits of the largest codebook that registers hold.
MAX_LOOK_UP_BITS = 4


@dataclass(frozen=True, slots=True)
class Field:
    """Bits `first` .. `first + width - 1` of the codes of one sub-block, at `place` of the words of a tile."""

    sub_block: int
    first: int
    width: int
    place: int


def spread(first: int, width: int, sub_blocks: int) -> tuple[Field, ...]:
    """Return fields that fill a tile: four neighbouring sub-blocks to a bit position, one in each nibble."""
    return tuple(Field(sub, first, width, sub // 4 * width + sub % 4 * 4) for sub in range(sub_blocks))


def fields_of(problem: LutProblem) -> tuple[tuple[Field, ...], ...]:
    """Return the fields of each tile of a block."""
    bits = problem.weight_bits
    if problem.kind == "planes":
        return tuple(tuple(Field(sub, plane, 1, sub) for sub in range(16)) for plane in range(bits))
    if bits > MAX_LOOK_UP_BITS:
        return ((Field(0, 0, 8, 0), Field(1, 0, 8, 8)),)
    if bits != 3:
        return (spread(0, bits, 16 // bits),)
    lower = spread(0, 2, 8)
    upper = tuple(Field(8 + field.sub_block, 0, 2, field.place) for field in lower)
    return lower, upper, spread(2, 1, 16)


def block_k(problem: LutProblem) -> int:
    """Return the elements of K in a block."""
    return SUB_BLOCK * (1 + max(field.sub_block for tile in fields_of(problem) for field in tile))


def num_tiles(problem: LutProblem) -> int:
    """Return the tiles of a block."""
    return len(fields_of(problem))


def piece_of(problem: LutProblem) -> int:
    """Return the longest run of K, at most a sub-block, that never crosses a group."""
    return math.gcd(problem.group_size, SUB_BLOCK) if problem.group_size else SUB_BLOCK


def unit_of(problem: LutProblem) -> int:
    """Return the piece, or the sub-blocks of one block, that lie in one group; 0 where there are no groups."""
    if problem.group_size is None:
        return 0
    return piece_of(problem) if piece_of(problem) < SUB_BLOCK else math.gcd(problem.group_size, block_k(problem))


def pack_tiles(problem: LutProblem, codes: Tensor) -> Tensor:
    """Pack codes [N, K] into int16 tiles [N' / 128, blocks * tiles, 128, 64], padded with zero codes.

    In tiles of codebooks the nibbles of two neighbouring words are exchanged so that a half of a register holds
    both neighbours of two sub-blocks: a byte permutation takes its selectors from 16 bits.
    """
    padding = (0, -problem.in_features % block_k(problem), 0, -problem.out_features % TILE_ROWS)
    padded = pad(codes, padding)
    blocks = padded.view(len(padded) // TILE_ROWS, TILE_ROWS, -1, block_k(problem) // SUB_BLOCK, SUB_BLOCK)
    tiles = []
    for fields in fields_of(problem):
        words = torch.zeros(blocks[..., 0, :].shape, dtype=torch.int32, device=codes.device)
        for field in fields:
            bits = (blocks[..., field.sub_block, :] >> field.first) & ((1 << field.width) - 1)
            words |= bits.to(torch.int32) << field.place
        if problem.kind == "codebook" and problem.weight_bits <= MAX_LOOK_UP_BITS:
            words = exchange_nibbles(words)
        tiles.append(words)
    stacked = torch.stack(tiles, dim=3).flatten(2, 3).transpose(1, 2)
    return torch.where(stacked >= 2**15, stacked - 2**16, stacked).to(torch.int16).contiguous()


def exchange_nibbles(words: Tensor) -> Tensor:
    """Turn the nibbles a0 a1 a2 a3, b0 b1 b2 b3 of two neighbours into a0 b0 a1 b1, a2 b2 a3 b3, lowest first."""
    first, second = words.unflatten(-1, (-1, 2)).unbind(dim=-1)
    nibbles = [(word >> (4 * place)) & 15 for place in range(4) for word in (first, second)]
    halves = [sum(nibbles[4 * half + place] << (4 * place) for place in range(4)) for half in range(2)]
    return torch.stack(halves, dim=-1).flatten(-2)


def byte_tables(table: Tensor) -> Tensor:
    """Split float16 entries [G, N, 2^b] into int32 [G, 8, N]: four registers of low bytes, four of high ones."""
    bits = pad(table.view(torch.int16), (0, 16 - table.shape[2])).to(torch.int32)
    halves = torch.stack((bits & 255, (bits >> 8) & 255), dim=2).unflatten(3, (4, 4))
    shifts = torch.arange(4, dtype=torch.int32, device=table.device) * 8
    return (halves << shifts).sum(dim=-1, dtype=torch.int32).flatten(2).transpose(1, 2).contiguous()


def prepare_tiles(
    problem: LutProblem,
    codes: Tensor,
    table: Tensor,
    offset: Tensor | None,
    row_offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> dict[str, Tensor]:
    """Return the padded tensors of the kernels.

    packed       int16 tiles, see `pack_tiles`
    table        scales [b, G', N'] of planes; int32 [G', 8, N'], bytes of entries; above 4 bits [G', N', 2^b]
    offset       [G', N'], where there is one
    row_offsets  int32 [N' + 1]; columns; values: the single entries, where there are any
    arrivals     int32 zeros: counters of programs that share a tile, zero again after every launch
    """
    packed = pack_tiles(problem, codes)
    rows = packed.shape[0] * TILE_ROWS - problem.out_features
    padded = problem.in_features + -problem.in_features % block_k(problem)
    groups = -(-padded // (problem.group_size or padded)) - problem.num_groups
    by_group = pad(table, (0, 0, 0, groups, 0, rows)).transpose(0, 1).contiguous()
    if problem.kind == "planes":
        by_group = by_group.movedim(2, 0).contiguous()
    elif problem.weight_bits <= MAX_LOOK_UP_BITS:
        by_group = byte_tables(by_group)
    named = {
        "packed": packed,
        "table": by_group,
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if offset is not None:
        named["offset"] = pad(offset, (0, groups, 0, rows)).T.contiguous()
    if row_offsets is not None and columns is not None and values is not None:
        named["row_offsets"] = torch.cat([row_offsets, row_offsets[-1:].expand(rows)])
        named |= {"columns": columns.contiguous(), "values": values.contiguous()}
    return named
