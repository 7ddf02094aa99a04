# SPDX-License-Identifier: Apache-2.0
"""A weight layout of GPU kernels: the order in which the lanes of a warp multiply it.

The weight is cut into tiles of 16 rows and blocks of 256 elements of K, a block into eight steps of 32. The tensor
cores take one step of a tile at once, and lane 4 g + t gives them four bytes for row g + 8 r at the places
32 step + 16 h + 4 t .. + 3, for r and h of 0 and 1. So the words of one lane lie together, in loads of four:

    kind, bits       words of a lane   word [h, r] or [step, r]
    planes, b        4 b               bit 8 i + s of word [plane, h, r] is the bit of place i of step s
    codebook, 4      16                nibble 4 h + i of word [s, r] is the code of place i
    codebook, 3      12                three bits of each nibble of words [s // 4, r, s % 4], s % 4 < 3; the fourth
                                       bits of the three are the bits of the codes of the fourth step
    codebook, 1, 2   4 b               the bits of b nibbles of the steps that share word [s // (4 / b), r]
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = [
    "BLOCK_K",
    "HALF_STEP_K",
    "LARGEST_ENTRY",
    "MAX_LOOK_UP_BITS",
    "ONE_GROUP",
    "STEP_K",
    "TILE_ROWS",
    "pack_codes",
    "prepare_lanes",
    "unit_of",
]

TILE_ROWS = 16
BLOCK_K = 256
STEP_K = 32
HALF_STEP_K = 16
#: Group size of a kernel where a row is one group: whole rows compile to one kernel, whatever K is.
ONE_GROUP = 1 << 30
#: Bits of the largest codebook that registers hold.
MAX_LOOK_UP_BITS = 4
STEPS = BLOCK_K // STEP_K
#: The largest entry of a codebook as an integer: two signed bytes, of which the larger leaves room for a carry.
LARGEST_ENTRY = 126 * 256


def unit_of(problem: LutProblem) -> int:
    """Return the longest run of K that lies in one group and in one block; 0 where there are no groups."""
    return math.gcd(problem.group_size, BLOCK_K) if problem.group_size else 0


def to_int32(words: Tensor) -> Tensor:
    """Return the low 32 bits of non-negative integers."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack_codes(problem: LutProblem, codes: Tensor) -> Tensor:
    """Pack codes [N, K] into int32 [N' / 16, K' / 256, b, 32, 4], padded with zero codes."""
    padded = pad(codes, (0, -problem.in_features % BLOCK_K, 0, -problem.out_features % TILE_ROWS))
    # tile, r, g, block, step, h, t, i
    places = padded.view(-1, 2, 8, padded.shape[1] // BLOCK_K, STEPS, 2, 4, 4)
    bits = problem.weight_bits
    words = plane_words(places, bits) if problem.kind == "planes" else code_words(places, bits)
    tiles, blocks = places.shape[0], places.shape[3]
    stacked = torch.stack([to_int32(word) for word in words], dim=-1)  # tile, g, block, t, word
    by_load = stacked.view(tiles, 8, blocks, 4, -1, 4).permute(0, 2, 4, 1, 3, 5)
    return by_load.reshape(tiles, blocks, -1, 32, 4).contiguous()


def row_words(places: Tensor, step: int, r: int, h: int, width: int) -> Tensor:
    """Return int64 words [tile, g, block, t] of four codes, `width` bits apart."""
    codes = places[:, r, :, :, step, h].long()
    return sum((codes[..., i] << (width * i) for i in range(1, 4)), start=codes[..., 0])


def plane_words(places: Tensor, bits: int) -> list[Tensor]:
    """Return the words [plane, h, r] of a block."""
    return [
        sum(row_words((places >> plane) & 1, step, r, h, 8) << step for step in range(STEPS))
        for plane in range(bits)
        for h in range(2)
        for r in range(2)
    ]


def code_words(places: Tensor, bits: int) -> list[Tensor]:
    """Return the words of a block with a code in each nibble, or parts of it."""
    nibbles = {
        (step, r): row_words(places, step, r, 0, 4) | (row_words(places, step, r, 1, 4) << 16)
        for step in range(STEPS)
        for r in range(2)
    }
    if bits == 3:
        return [
            nibbles[first + place, r] | (((nibbles[first + 3, r] >> place) & 0x11111111) << 3)
            for first in (0, 4)
            for r in range(2)
            for place in range(3)
        ]
    shared = 4 // bits
    return [
        sum(nibbles[first + inside, r] << (bits * inside) for inside in range(shared))
        for first in range(0, STEPS, shared)
        for r in range(2)
    ]


def carry(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes a and b of the entries 0 .. 7 and 8 .. 15 such that a + s(b) = lower and b + s(a) = upper.

    A byte permutation returns s(v) = -1 if v < 0 else 0 where the highest bit of a selector is set. So the sum of
    what the two halves of a table return for a code is its entry, with no choice between them.
    """
    both = (lower < 0) & (upper < 0)
    a = torch.where(upper < 0, lower + 1, lower)
    b = torch.where(lower < 0, upper + 1, upper)
    # where one of two negative entries is -1, it becomes 0, and the other has nothing to make up for
    b = torch.where(both & (lower == -1), upper, b)
    a = torch.where(both & (lower == -1), 0, a)
    is_upper = both & (lower < -1) & (upper == -1)
    return torch.where(is_upper, lower, a), torch.where(is_upper, 0, b)


def limb_tables(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 [N / 16, G, 8, 2, 8] and float32 [G, N]: entries [G, N, 2^b] as two signed bytes and a scale.

    The eight registers of a row are those of high and of low bytes: entries 0 .. 7 in two, 8 .. 15 in two.
    """
    groups, rows, size = table.shape
    scale = (table.double().abs().amax(dim=2).clamp_min(1e-30) / LARGEST_ENTRY).float()
    value = (table.double() / scale.double()[..., None]).round().long()
    high = (value + 128) >> 8
    low = (value - 256 * high).clamp(max=126)  # 127 leaves no room for a carry: one unit less
    registers = []
    for limb in (pad(high, (0, 16 - size)), pad(low, (0, 16 - size))):
        halves = carry(limb[..., :8], limb[..., 8:]) if size == 16 else (limb[..., :8], limb[..., 8:])
        for half in halves:
            bytes_of = (half & 255).unflatten(2, (2, 4))
            registers += [sum(bytes_of[..., j, i] << (8 * i) for i in range(4)) for j in range(2)]
    stacked = to_int32(torch.stack(registers, dim=-1))  # group, row, register
    by_tile = stacked.view(groups, rows // TILE_ROWS, 2, 8, 8).permute(1, 0, 3, 2, 4)
    return by_tile.contiguous(), scale


def byte_tables(table: Tensor) -> Tensor:
    """Split float16 entries [G, N, 2^b] into int32 [G, 8, N]: four registers of low bytes, four of high ones."""
    bits = pad(table.view(torch.int16), (0, 16 - table.shape[2])).to(torch.int32)
    halves = torch.stack((bits & 255, (bits >> 8) & 255), dim=2).unflatten(3, (4, 4))
    shifts = torch.arange(4, dtype=torch.int32, device=table.device) * 8
    return (halves << shifts).sum(dim=-1, dtype=torch.int32).flatten(2).transpose(1, 2).contiguous()


def prepare_lanes(
    problem: LutProblem,
    codes: Tensor,
    table: Tensor,
    offset: Tensor | None,
    row_offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> dict[str, Tensor]:
    """Return the padded tensors of the kernels.

    packed       int32 words, see `pack_codes`
    table        scales [b, G', N'] of planes; int32 [G', 8, N'], bytes of float16 entries
    limbs        int32 [N' / 16, G', 8, 2, 8] of a codebook: entries as integers, see `limb_tables`
    limb_scale   float32 [G', N'] of these integers
    offset       [G', N'], where there is one
    row_offsets  int32 [N' + 1]; columns; values: the single entries, where there are any
    """
    packed = pack_codes(problem, codes)
    rows = packed.shape[0] * TILE_ROWS - problem.out_features
    padded = packed.shape[1] * BLOCK_K
    groups = -(-padded // (problem.group_size or padded)) - problem.num_groups
    by_group = pad(table, (0, 0, 0, groups, 0, rows)).transpose(0, 1).contiguous()
    named = {"packed": packed, "table": by_group}
    if problem.kind == "planes":
        named["table"] = by_group.movedim(2, 0).contiguous()
    else:
        named["table"] = byte_tables(by_group)
        named["limbs"], named["limb_scale"] = limb_tables(by_group)
    if offset is not None:
        named["offset"] = pad(offset, (0, groups, 0, rows)).T.contiguous()
    if row_offsets is not None and columns is not None and values is not None:
        named["row_offsets"] = torch.cat([row_offsets, row_offsets[-1:].expand(rows)])
        named |= {"columns": columns.contiguous(), "values": values.contiguous()}
    return named
