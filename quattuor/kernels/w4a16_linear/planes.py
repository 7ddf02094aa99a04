# SPDX-License-Identifier: Apache-2.0
"""The weight layout of the GPU kernels: fields of 16-bit words, each field a run of K. Drawn in README.md."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.planes import MAX_SPLIT_TILES

__all__ = [
    "MAX_BYTES_FEATURES",
    "MIN_BYTES_PLANE",
    "MIN_PLANE",
    "STORED_BITS",
    "TILE_ROWS",
    "DigitTile",
    "LaneTile",
    "Layout",
    "PairTile",
    "Tile",
    "layout_of",
    "pack",
    "prepare_tensors",
    "unpack",
]

#: Bits that a code takes in memory, by its width.
STORED_BITS = {2: 2, 3: 3, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
#: Planes of a block, and the 16-bit words that hold one code of each, by the bits stored.
PLANES = {2: 8, 3: 16, 4: 4, 8: 2}
WORDS = {2: 1, 3: 3, 4: 1, 8: 1}
#: The longest plane: 128 bytes of a row; half of it where a block would else be longer than most groups.
MAX_PLANE = {2: 64, 3: 32, 4: 64, 8: 64}
#: What one tensor-core product takes along K.
MIN_PLANE = 16
#: Rows that lie together in memory; the packed weight is padded to whole tiles of rows.
TILE_ROWS = 128
#: The shortest plane of the kernel for few tokens, whose products take 32 elements of K.
MIN_BYTES_PLANE = 32
#: The largest K whose int32 sum of products of bytes cannot overflow.
MAX_BYTES_FEATURES = 2**17 - 1
#: Integer zero points of the stored codes up to this are kept in a byte and subtracted before the product.
MAX_ZERO = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The work of one program: `rows` output features by `tokens`, K cut in `split` parts, and its resources."""

    rows: int
    tokens: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitTile:
    """The work of one program of `digits`, as in `Tile`; it brings `before` blocks to L2 before it waits.

    With `is_direct` lanes load the scales of groups that they need, without an exchange through shared memory.

    `overlap` says which kernels of the stream run at the same time, for compute capability 9.0: "none"; "own" for
    the product beside the kernel that writes the bytes; "early" and "late" for the kernel after the product as
    well, which may start its programs at once, or when every program of this one has multiplied.
    """

    rows: int
    tokens: int
    split: int
    num_warps: int
    num_stages: int
    overlap: str
    before: int
    is_direct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneTile:
    """The work of one program of `lanes`: 16 rows, whose blocks of K `num_warps` take in turn.

    A warp has loaded `depth` blocks ahead; with `holds`, the next one before it multiplies this one. The program
    brings to L2 what its warps take in the first `before` turns. `overlap` is as in `DigitTile`.
    """

    num_warps: int
    depth: int
    holds: bool
    before: int
    overlap: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTile:
    """The work of one program of `pairs`: 16 rows, whose blocks of K `num_warps` take in turn.

    A warp loads the next block before it multiplies this one if `is_early`, else after. `overlap` is as in
    `DigitTile`.
    """

    num_warps: int
    is_early: bool
    overlap: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How the codes of a layer lie in 16-bit words.

    A block of K holds `planes` planes of `plane_k` consecutive elements. Element j of every plane is a field of
    the same word (of the same three words with 3 bits), so that a mask on words yields runs of K.

    Args:
        bits: Bits stored per code: 2, 3, 4 or 8.
        plane_k: A power of two from 16 on; no plane crosses a group.
    """

    bits: int
    plane_k: int

    @property
    def planes(self) -> int:
        """Planes of a block."""
        return PLANES[self.bits]

    @property
    def words(self) -> int:
        """Words that hold one element of each plane."""
        return WORDS[self.bits]

    @property
    def block_k(self) -> int:
        """Elements of K in a block."""
        return self.planes * self.plane_k

    def pieces(self, group_size: int | None) -> int:
        """Return the equal pieces of a block, runs of planes, such that none crosses a group."""
        if group_size is None or group_size % self.block_k == 0:
            return 1
        return self.block_k // group_size if self.block_k % group_size == 0 else self.planes


def layout_of(problem: LinearProblem) -> Layout:
    """Return the layout of a layer; its planes are shorter than 16 where groups leave no other way."""
    bits = STORED_BITS[problem.weight_bits]
    longest = MAX_PLANE[bits]
    return Layout(bits, math.gcd(problem.group_size, longest) if problem.group_size else longest)


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """Pack unsigned codes [N', K'], whole tiles and blocks, into int16 [N' / 128, blocks, words, 128, plane_k].

    With b bits, plane p is the field of bits p b .. p b + b - 1. With 3 bits, planes 5 w .. 5 w + 4 are fields of
    word w at bits 0, 3, ... 12, and bit w of plane 15 is bit 15 of word w.
    """
    rows, columns = codes.shape
    shape = (rows // TILE_ROWS, TILE_ROWS, columns // layout.block_k, layout.planes, layout.plane_k)
    planes = codes.view(shape).permute(3, 0, 2, 1, 4)
    per_word = 5 if layout.bits == 3 else layout.planes
    words = []
    for word in range(layout.words):
        fields = torch.zeros(planes.shape[1:], dtype=torch.int32, device=codes.device)
        for field in range(per_word):
            fields |= planes[word * per_word + field].int() << field * layout.bits
        if layout.bits == 3:
            fields |= (planes[15].int() >> word & 1) << 15
        words.append(fields.to(torch.int16))
    return torch.stack(words, dim=2)


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """Return the uint8 codes [N', K'] of `pack`."""
    words = packed.int() & 0xFFFF
    per_word = 5 if layout.bits == 3 else layout.planes
    mask = 2**layout.bits - 1
    planes = [
        words[:, :, plane // per_word] >> plane % per_word * layout.bits & mask
        for plane in range(per_word * layout.words)
    ]
    if layout.bits == 3:
        planes.append(sum((words[:, :, word] >> 15 & 1) << word for word in range(3)))
    codes = torch.stack(planes, dim=2).permute(0, 3, 1, 2, 4)
    return codes.reshape(codes.shape[0] * TILE_ROWS, -1).to(torch.uint8)


def prepare_tensors(
    problem: LinearProblem, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> dict[str, Tensor]:
    """Return the padded tensors of the kernels.

    packed      the words of `pack`; a signed code is stored plus 2^(bits stored - 1), padding decodes to zero
    scale       [G', N'], float16 where that holds every scale exactly, else float32; padded with 1
    zero_point  uint8 [G', N'], in the frame of the stored codes, where all are integers from 0 to 255
    offset      float32 [G', N'], less 2^(bits stored - 1), where they are not
    arrivals    int32 zeros: counters of programs that share a tile, zero again after every launch

    Neither zero_point nor offset exists for signed codes without zero points.
    """
    layout = layout_of(problem)
    middle = 2 ** (layout.bits - 1)
    shift = middle - (problem.max_code if codes.dtype == torch.uint8 else 0)
    row_padding = -problem.out_features % TILE_ROWS
    k_padding = -problem.in_features % layout.block_k
    stored = (codes.to(torch.int16) + shift).to(torch.uint8)
    stored = pad(stored, (0, k_padding, 0, row_padding), value=middle)
    groups = -(-(problem.in_features + k_padding) // (problem.group_size or problem.in_features + k_padding))
    padding = (0, row_padding, 0, groups - problem.num_groups)
    half = scale.half()
    exact = half if torch.equal(half.float(), scale.float()) else scale.float()
    named = {
        "packed": pack(stored, layout),
        "scale": pad(exact.T, padding, value=1).contiguous(),
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if zero_point is not None or codes.dtype == torch.uint8:
        zero = torch.zeros_like(scale, dtype=torch.float32) if zero_point is None else zero_point.float()
        zero = pad((zero + shift).T, padding, value=middle)
        if torch.equal(zero, zero.round().clamp(0, MAX_ZERO)):
            named["zero_point"] = zero.to(torch.uint8).contiguous()
        else:
            named["offset"] = (zero - middle).contiguous()
    return named
