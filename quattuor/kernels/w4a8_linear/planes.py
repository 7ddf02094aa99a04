# SPDX-License-Identifier: Apache-2.0
"""K-plane nibble packing: the weight layout of the GPU kernels. Drawn in README.md."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.lane_scales import pack_lane_scales, pad_rows, reason_against_groups
from quattuor.kernels.w4a8_linear.reference import int8_weight

__all__ = [
    "BLOCK_K",
    "MAX_SPLIT_TILES",
    "PLANE_K",
    "ROW_TILE",
    "STORED_BITS",
    "TILE_ROWS",
    "HopperTile",
    "LanesTile",
    "Tile",
    "group_scale_of",
    "mode_of",
    "pack_planes",
    "pack_words",
    "pad_weight",
    "prepare_planes",
    "remark_on_clamps",
    "stays_in_int8",
    "tile_rows",
    "unpack_planes",
]

#: Elements of K in one block: two planes of `PLANE_K`, one in the low and one in the high nibbles.
BLOCK_K = 256
PLANE_K = 128
#: Rows of one contiguous tile of the packed weight.
TILE_ROWS = 128
#: Rows of the packed weight are padded to a multiple of this, so that kernels need no row mask.
ROW_TILE = 256
#: Memory of one code by its width: nibbles, then bytes.
STORED_BITS = {2: 4, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
#: Arrival counters per layer: tiles whose sums are split along K, at most one for each 64 rows and 16 tokens.
MAX_SPLIT_TILES = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """The work of one program: `rows` output features by `tokens`, K cut in `split` parts, and its resources.

    `overlap` says when the next kernel of the stream may start its programs: "none" after this one, "early" at
    once, "late" when every program of this one has multiplied; the last two need compute capability 9.0. `columns`
    is how many bytes of a row are loaded at once: 128, or 64 for shorter stages.
    """

    rows: int
    tokens: int
    split: int
    num_warps: int
    num_stages: int
    overlap: str = "none"
    columns: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LanesTile:
    """The work of one program for one token: `rows` of the weight over the whole of K, four blocks in a step.

    Each warp takes every `num_warps`-th row, and loads `ahead` steps before it needs them. `max_registers` is the
    cap for a thread, None for what the compiler takes.
    """

    rows: int
    num_warps: int
    ahead: int
    max_registers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperTile:
    """A tile of consumers * blocks * 64 rows by `tokens`, with a ring of `stages` K blocks.

    `registers` is what a thread of the second consumer may use, `max_registers` the cap at launch, None for what
    the compiler takes; the first consumer gets what the others leave. `per_processor` programs share each
    multiprocessor. `spans` cuts the tokens in parts of 128 at most. `cut` says what becomes of the tiles that fill
    no wave of programs (`hopper.CUTS`). `unroll` K blocks are multiplied before a consumer waits for them.
    """

    blocks: int
    tokens: int
    stages: int
    spans: int = 1
    cut: str = "even"
    unroll: int = 1
    consumers: int = 2
    registers: int = 232
    max_registers: int | None = None
    per_processor: int = 1

    @property
    def rows(self) -> int:
        """Output features of the tile."""
        return self.consumers * self.blocks * 64

    @property
    def shared_limit(self) -> int:
        """Shared memory that a program may take; with a cap on registers two programs are meant to fit."""
        return 232_448 if self.max_registers is None else 115_712

    def shared_bytes(self, mode: str) -> int:
        """Shared memory of the ring, its barriers and the output tile."""
        group_bytes = {"channel": 0, "integer": 2, "half": 4, "unclamped": 4}[mode] * self.rows
        stage = self.rows * PLANE_K + self.tokens * BLOCK_K + group_bytes + 16
        return self.stages * stage + self.consumers * 2 * 64 * self.tokens // self.spans

    def has_room_for_scales(self, mode: str) -> bool:
        """Whether token scales that were fetched early can be spread over threads through shared memory."""
        spread = self.consumers * 4 * self.tokens // self.spans + 32
        return self.shared_bytes(mode) + spread <= self.shared_limit


def mode_of(problem: LinearProblem) -> str:
    """Return how a kernel turns stored bytes into int8 operands.

    "channel", "integer" and "half" store nibbles and differ in the group scale: none, an integer, a float16.
    "byte" stores the int8 operands themselves, which is how codes of more than 4 bits are kept.
    """
    if problem.weight_bits > 4:
        return "byte"
    if problem.group_size is None:
        return "channel"
    return "integer" if problem.integer_group_scale else "half"


def group_scale_of(problem: LinearProblem, operand: Mapping[str, Tensor]) -> tuple[str, Tensor | None]:
    """Return the mode in which the Hopper kernel takes prepared tensors, and their group scales.

    "half" becomes "unclamped" where `prepare_planes` found that no product of a code and its scale leaves int8.
    """
    if "unclamped_group_scale" in operand:
        return "unclamped", operand["unclamped_group_scale"]
    return mode_of(problem), operand.get("group_scale")


def remark_on_clamps(problem: LinearProblem) -> str:
    """Return what is said of an implementation that clamps only where it must; nothing without float16 scales."""
    if mode_of(problem) != "half":
        return ""
    return "products of codes and scales are clamped only where `prepare` finds one beyond int8"


def stays_in_int8(group_scale: Tensor, max_code: int) -> bool:
    """Whether rne(code * s) is an int8 for all codes from -max_code; -128.5 rounds to -128, but 127.5 to 128."""
    low, high = (float(bound) for bound in group_scale.aminmax())
    return low > -127.5 / max_code and high <= 128.5 / max_code


def tile_rows(matrix: Tensor) -> Tensor:
    """Cut bytes [N', B] into tiles [N' / 128, B / 128, 128, 128], each contiguous: 16 KB that one copy brings."""
    rows, columns = matrix.shape
    tiles = matrix.view(rows // TILE_ROWS, TILE_ROWS, columns // PLANE_K, PLANE_K)
    return tiles.transpose(1, 2).contiguous()


def pad_weight(codes: Tensor) -> Tensor:
    """Pad [N, K] with zeros to whole row tiles and K blocks."""
    out_features, in_features = codes.shape
    return pad(codes, (0, -in_features % BLOCK_K, 0, -out_features % ROW_TILE))


def pack_planes(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes [N, K] into int8 tiles [N' / 128, K' / 256, 128, 128], padded with zero codes.

    Byte j of row n of tile (t, b) holds element 256 b + j of row 128 t + n in its low nibble and element
    256 b + 128 + j in its high nibble.
    """
    codes = pad_weight(codes)
    low, high = codes.view(codes.shape[0], -1, 2, PLANE_K).unbind(dim=2)
    return tile_rows(((low & 0x0F) | (high << 4)).reshape(codes.shape[0], -1))


def unpack_planes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the int8 codes [N, K] of `pack_planes`."""
    planes = packed.transpose(1, 2).reshape(packed.shape[0] * TILE_ROWS, -1, PLANE_K)
    codes = torch.stack(((planes << 4) >> 4, planes >> 4), dim=2)
    return codes.reshape(planes.shape[0], -1)[:out_features, :in_features]


def pack_words(group_scale: Tensor, group_size: int, planes: int, in_features: int) -> Tensor:
    """Return the scale of each plane, four planes of a block to an int32, low byte first.

    Args:
        group_scale: int8 [G', N'].
        group_size: A multiple of a plane.
        planes: Planes in a block: 2, 4 or 8.
        in_features: K', whole blocks.

    Returns:
        int32 [B * words, N'], with one word for a block of up to four planes, two for eight.
    """
    by_plane = group_scale.repeat_interleave(group_size // PLANE_K, dim=0)[: in_features // PLANE_K]
    words = by_plane.view(-1, min(planes, 4), group_scale.shape[1]).to(torch.int32) & 0xFF
    shift = torch.arange(words.shape[1], dtype=torch.int32, device=words.device) * 8
    return (words << shift[:, None]).sum(dim=1, dtype=torch.int32)


def prepare_planes(
    problem: LinearProblem, codes: Tensor, scale: Tensor, group_scale: Tensor | None
) -> dict[str, Tensor]:
    """Return the padded tensors that the GPU kernels share.

    packed       int8 tiles [N' / 128, K' / 256, 128, 128] of nibbles, or [N' / 128, K' / 128, 128, 128] of bytes
    scale        float32 [N']; divided by 16 in channel mode, whose operands are 16 * code (exact: a power of two)
    group_scale  int8 (integer mode) or float16 (half mode) [G', N']: a warp reads one group of many rows; named
                 unclamped_group_scale where the float16 scales take no product with a code out of int8
    group_words  int32 [B, N'], the two scales of each block; integer mode with groups of whole planes only
    lane_scales  int32 [N', 4 P, W], the group scales as the kernel for one token takes them, where it does
    arrivals     int32 zeros: counters of programs that share a tile, zero again after every launch
    weight_sum   int32 [N'], sums of the operands over K; only where activations have zero points
    """
    mode = mode_of(problem)
    row_padding = -problem.out_features % ROW_TILE
    if mode == "byte":
        packed = tile_rows(pad_weight(int8_weight(problem, codes, group_scale)))
    else:
        packed = pack_planes(codes)
    named = {
        "packed": packed,
        "scale": pad(scale / 16 if mode == "channel" else scale, (0, row_padding)),
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if problem.activation_zero_point:
        sums = int8_weight(problem, codes, group_scale).sum(dim=1, dtype=torch.int32)
        named["weight_sum"] = pad(sums * 16 if mode == "channel" else sums, (0, row_padding))
    if mode in ("integer", "half"):
        padded_features = problem.in_features + -problem.in_features % BLOCK_K
        groups = -(-padded_features // problem.group_size)
        padding = (0, row_padding, 0, groups - problem.num_groups)
        padded = pad(group_scale.T, padding, value=1).contiguous()
        if mode == "integer":
            named["group_scale"] = padded.to(torch.int8)
        elif stays_in_int8(group_scale, problem.max_code):
            named["unclamped_group_scale"] = padded
        else:
            named["group_scale"] = padded
        if mode == "integer" and problem.group_size % PLANE_K == 0:
            named["group_words"] = pack_words(named["group_scale"], problem.group_size, 2, padded_features)
        if not problem.activation_zero_point and reason_against_groups(problem) is None:
            words = pack_lane_scales(
                group_scale, problem.group_size, problem.in_features, is_integer=mode == "integer"
            )
            named["lane_scales"] = pad_rows(words, problem.out_features + row_padding)
    return named
