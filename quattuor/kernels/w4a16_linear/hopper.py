# SPDX-License-Identifier: Apache-2.0
"""The tiles of the Hopper kernel: their resources, and which one a layer takes."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.hopper import CUTS, make_schedule
from quattuor.kernels.w4a16_linear.planes import Layout, layout_of

__all__ = ["SHARED_LIMIT", "SIZES", "HopperTile", "choose_hopper_tile", "estimate", "tile_of"]

#: Shared memory that a program may take.
SHARED_LIMIT = 232_448
#: Elements of the planes for which the rings of `SIZES` are made.
MAX_HOPPER_PLANE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperTile:
    """A tile of two consumers, each `blocks` * 64 rows, by `tokens`.

    The ring of words has `w_stages` blocks of K. The ring of tokens has `x_stages` times `together` planes, which
    arrive and are released together. `unroll` blocks are multiplied before a consumer waits for all its products.
    `cut` says what becomes of the tiles that fill no wave of programs, as in `w4a8_linear.hopper.CUTS`.

    `scaling` says what the scale of a group meets, in float32: "sums" over the group, or all sums so far, which
    are "carried" from group to group in units of its scale. With `lags` the sums of a group are scaled while the
    next group is multiplied.
    """

    blocks: int
    tokens: int
    w_stages: int
    x_stages: int
    together: int = 1
    unroll: int = 1
    lags: bool = False
    scaling: str = "sums"
    cut: str = "even"

    @property
    def rows(self) -> int:
        """Output features of the tile."""
        return 2 * self.blocks * 64

    def shared_bytes(self, layout: Layout, pieces: int) -> int:
        """Shared memory of both rings, the output tile and what the compiler keeps there.

        With bytes of zero points, and float16 scales but for "sums", whose scales may be float32.
        """
        scale_bytes = 4 if self.scaling == "sums" else 2
        words = self.rows * 2 * layout.plane_k + pieces * self.rows * (scale_bytes + 1) + 16
        tokens = self.together * self.tokens * 2 * layout.plane_k + 16
        return self.w_stages * words + self.x_stages * tokens + 2 * 64 * self.tokens * 2 + 512

    def num_steps(self, num_blocks: int) -> int:
        """Return the steps along K of a tile, each of `unroll` blocks."""
        return -(-num_blocks // self.unroll)


#: Tiles by name. Their rings fill shared memory with planes of 64 elements.
SIZES = {
    "slim": HopperTile(blocks=1, tokens=32, w_stages=7, x_stages=8, together=2),
    "narrow": HopperTile(blocks=1, tokens=64, w_stages=4, x_stages=7, together=2),
    "tall": HopperTile(blocks=2, tokens=64, w_stages=3, x_stages=10),
    "square": HopperTile(blocks=1, tokens=128, w_stages=2, x_stages=4, together=2),
    "wide": HopperTile(blocks=1, tokens=256, w_stages=2, x_stages=4),
}


def tile_of(problem: LinearProblem, size: str, scaling: str, cut: str) -> HopperTile:
    """Return a tile with rings that fit the planes and groups of a layer.

    A step is of two blocks where no sum has to end before, unless these have many planes.

    Args:
        problem: The layer.
        size: Of `SIZES`.
        scaling: As a tile has it, or "row" with one scale per row.
        cut: As a tile has it.
    """
    layout = layout_of(problem)
    tile = SIZES[size]
    lags = scaling == "sums" and tile.blocks * tile.tokens <= 64
    is_long = scaling == "row" or (lags and tile.tokens <= 32)
    unroll = 2 if is_long and layout.planes <= 4 else 1
    shorter = MAX_HOPPER_PLANE // layout.plane_k
    tile = replace(
        tile, w_stages=tile.w_stages * shorter, x_stages=tile.x_stages * shorter, unroll=unroll, lags=lags
    )
    tile = replace(tile, scaling="sums" if scaling == "row" else scaling, cut=cut)
    while tile.shared_bytes(layout, layout.pieces(problem.group_size)) > SHARED_LIMIT:
        tile = replace(tile, x_stages=tile.x_stages - 1)
    return tile


class Cost(NamedTuple):
    """Microseconds of a kind of tile on an H200: a block of K, the end of a tile, the sums of a cut tile."""

    block: float
    tile: float
    even: float
    aligned: float


#: Fitted to the latencies of the record kernels_w4a16_hopper; of rows, few were timed.
COSTS = {
    ("slim", "sums"): Cost(0.78, 0.3, 4.7, 2.7),
    ("narrow", "sums"): Cost(1.00, 0.2, 5.4, 5.1),
    ("tall", "sums"): Cost(1.90, 1.6, 7.0, 6.0),
    ("square", "sums"): Cost(1.70, 1.0, 6.5, 4.5),
    ("wide", "carried"): Cost(2.98, 1.0, 11.1, 7.3),
    ("slim", "row"): Cost(0.75, 0.3, 4.7, 2.7),
    ("narrow", "row"): Cost(0.95, 0.2, 5.4, 5.1),
    ("tall", "row"): Cost(1.75, 1.6, 7.0, 6.0),
    ("square", "row"): Cost(1.52, 1.0, 6.5, 4.5),
    ("wide", "row"): Cost(2.93, 1.0, 11.1, 7.3),
}


def estimate(size: str, scaling: str, cut: str, num_tokens: int, problem: LinearProblem, programs: int) -> float:
    """Return the microseconds of the longest program, less what every tile has in common."""
    tile = tile_of(problem, size, scaling, cut)
    num_tiles = -(-problem.out_features // tile.rows) * -(-num_tokens // tile.tokens)
    num_blocks = -(-problem.in_features // layout_of(problem).block_k)
    schedule = make_schedule(num_tiles, tile.num_steps(num_blocks), programs, cut)
    cost = COSTS[size, scaling]
    total = -(-schedule.whole // schedule.programs) * (num_blocks * cost.block + cost.tile)
    if schedule.whole < num_tiles:
        share = (num_tiles - schedule.whole) * num_blocks / schedule.sharers
        total += share * cost.block + cost.tile + (cost.even if cut == "even" else cost.aligned)
    return total


def scalings(problem: LinearProblem, is_half: bool) -> tuple[str, ...]:
    """Return where tiles may apply scales; sums are carried by quotients of scales, which float16 ones allow."""
    if problem.group_size is None:
        return ("row",)
    return ("sums", "carried") if is_half else ("sums",)


@functools.lru_cache(maxsize=4096)
def choose_hopper_tile(num_tokens: int, problem: LinearProblem, programs: int, is_half: bool) -> HopperTile:
    """Return the tile with the least estimate.

    Args:
        num_tokens: M.
        problem: The layer.
        programs: Multiprocessors.
        is_half: Whether its scales are kept as float16.
    """
    allowed = scalings(problem, is_half)
    # the first of equals: a tile that is not cut needs no exchange of sums
    choices = [
        (size, scaling, cut)
        for size, scaling in COSTS
        if scaling in allowed and SIZES[size].tokens < 2 * max(32, num_tokens)
        for cut in CUTS
    ]
    return tile_of(problem, *min(choices, key=lambda choice: estimate(*choice, num_tokens, problem, programs)))
