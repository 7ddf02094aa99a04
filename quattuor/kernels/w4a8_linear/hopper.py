# SPDX-License-Identifier: Apache-2.0
"""How the work of a layer is cut for the Hopper kernel: the schedule of a launch, the tile of other layers."""

import functools
from typing import NamedTuple

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.planes import BLOCK_K, HopperTile, mode_of

__all__ = ["CUTS", "Schedule", "choose_hopper_tile", "estimate", "make_schedule"]

#: What becomes of the tiles that fill no wave: whole all the same, cut into equal shares for all programs, or each
#: cut into the same number of pieces.
CUTS = ("none", "even", "aligned")


class Schedule(NamedTuple):
    """The programs of a launch, the tiles they compute whole, and how many programs share the others."""

    programs: int
    whole: int
    sharers: int


@functools.lru_cache(maxsize=4096)
def make_schedule(num_tiles: int, num_blocks: int, programs: int, cut: str) -> Schedule:
    """Return the schedule of a layer for at most so many programs.

    No sharer is without a block: an owner would wait for it for ever.
    """
    rest = num_tiles % programs
    if cut == "none" or rest == 0 or (cut == "aligned" and 2 * rest > programs):
        return Schedule(min(programs, num_tiles), num_tiles, 1)
    sharers = min(programs, rest * num_blocks) if cut == "even" else rest * min(programs // rest, num_blocks)
    return Schedule(programs if num_tiles > programs else sharers, num_tiles - rest, sharers)


#: Stages that fit in 227 KB of shared memory for tiles of 128 rows, by tokens.
STAGES = {8: 10, 16: 9, 32: 8, 64: 6, 128: 4, 256: 2}


class Cost(NamedTuple):
    """Microseconds of a kind of tile on an H200: a block of K, the end of a tile, the sums of a cut tile."""

    block: float
    tile: float
    even: float
    aligned: float


#: Fitted to the latencies that `benchmarks/kernels/tune.py` measured, by blocks of 64 rows and tokens. With group
#: scales unpacking takes longer, most where an operand serves few tokens.
CHANNEL_COSTS = {
    (1, 64): Cost(0.46, 0.4, 3.9, 2.4),
    (1, 128): Cost(0.69, 0.6, 5.9, 4.0),
    (1, 256): Cost(1.41, 1.0, 10.5, 7.5),
    (2, 128): Cost(1.23, 3.5, 9.7, 6.9),
}
GROUP_COSTS = {
    (1, 64): Cost(0.56, 0.7, 3.8, 2.7),
    (1, 128): Cost(0.81, 1.0, 5.6, 3.9),
    (1, 256): Cost(1.46, 1.9, 10.5, 7.4),
    (2, 128): Cost(1.35, 4.5, 9.7, 6.8),
}

#: Float16 scales, without clamps: as much again where an operand serves few tokens, nothing where it serves 256.
FLOAT_COSTS = {
    (1, 64): Cost(0.72, 0.7, 3.8, 2.7),
    (1, 128): Cost(0.93, 1.2, 5.6, 3.9),
    (1, 256): Cost(1.47, 1.9, 10.5, 7.4),
    (2, 128): Cost(1.70, 4.5, 9.7, 6.8),
}
COSTS = {"channel": CHANNEL_COSTS, "integer": GROUP_COSTS, "half": FLOAT_COSTS}


def estimate(tile: HopperTile, num_tokens: int, problem: LinearProblem, programs: int) -> float:
    """Return the microseconds of the longest program, less what every tile has in common."""
    num_tiles = -(-problem.out_features // tile.rows) * -(-num_tokens // tile.tokens)
    num_blocks = -(-problem.in_features // BLOCK_K)
    schedule = make_schedule(num_tiles, num_blocks, programs * tile.per_processor, tile.cut)
    cost = COSTS[mode_of(problem)][tile.blocks, max(64, tile.tokens)]
    crowd = tile.per_processor  # programs that share a multiprocessor take turns
    whole = -(-schedule.whole // schedule.programs)
    total = whole * (num_blocks * cost.block * crowd + cost.tile)
    if schedule.whole < num_tiles:
        share = (num_tiles - schedule.whole) * num_blocks / schedule.sharers
        total += share * cost.block * crowd + cost.tile + (cost.even if tile.cut == "even" else cost.aligned)
    return total


def choose_paired_tile(num_tokens: int, problem: LinearProblem, programs: int) -> HopperTile | None:
    """Return a tile that runs twice per multiprocessor, where those were the faster ones of up to 64 tokens.

    Up to 16 tokens on layers that give each program six blocks of K; at 64 where one wave of pairs suffices. With
    float16 scales three stages of 64 tokens are too many for half the shared memory.
    """
    paired = {"blocks": 1, "registers": 96, "max_registers": 80, "per_processor": 2}
    row_tiles = -(-problem.out_features // 128)
    num_blocks = -(-problem.in_features // BLOCK_K)
    if num_tokens <= 16 and row_tiles * num_blocks >= 6 * 2 * programs:
        return HopperTile(**paired, tokens=8 if num_tokens <= 8 else 16, stages=5)
    if 32 < num_tokens <= 64 and programs < row_tiles <= 2 * programs and mode_of(problem) != "half":
        return HopperTile(**paired, tokens=64, stages=3, cut="none")
    return None


def choose_hopper_tile(num_tokens: int, problem: LinearProblem, programs: int) -> HopperTile:
    """Return the tile that should be the fastest: the least power of two of up to 64 tokens, or one of four."""
    paired = choose_paired_tile(num_tokens, problem, programs)
    if paired is not None:
        return paired
    if num_tokens <= 64:
        sizes = [(1, max(8, 1 << (num_tokens - 1).bit_length()))]
    else:
        sizes = [size for size in CHANNEL_COSTS if size[1] < 2 * num_tokens]
    is_half = mode_of(problem) == "half"
    tiles = [
        HopperTile(
            blocks=blocks,
            tokens=tokens,
            stages=STAGES[tokens] if blocks == 1 else 2 if is_half else 3,
            spans=max(1, tokens // 128),
            cut=cut,
        )
        for blocks, tokens in sizes
        for cut in CUTS
    ]
    return min(tiles, key=lambda tile: estimate(tile, num_tokens, problem, programs))
