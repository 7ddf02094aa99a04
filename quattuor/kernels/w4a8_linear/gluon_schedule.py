# SPDX-License-Identifier: Apache-2.0
"""Which K blocks of which output tile each program of the Hopper kernel multiplies, and in which order.

`whole` tiles go to the programs in turn. The tiles that are left are cut along K: their blocks, in a row, are
shared evenly by `sharers` programs. A share that starts inside a tile leaves its sums to the program that holds
the first block of this tile, its owner. A program multiplies what it leaves to others first, then its whole tiles,
then what it owns, so that the sums of others have long arrived.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["num_items", "place", "share"]


@gluon.jit
def my_share(num_tiles, num_blocks, whole, sharers):
    """Number of this program, and its range of the blocks of cut tiles.

    Programs are numbered from the last, so that one that waits for another waits for one launched earlier.
    """
    me = gl.num_programs(0) - 1 - gl.program_id(0)
    units = (num_tiles - whole) * num_blocks
    begin = gl.minimum(me * units // sharers, units)
    end = gl.minimum((me + 1) * units // sharers, units)
    return me, begin, end


@gluon.jit
def num_left(begin, end, num_blocks):
    """1 if the program leaves the sums of its first piece to an owner, else 0."""
    return gl.where((begin < end) & (begin % num_blocks != 0), 1, 0)


@gluon.jit
def num_items(num_tiles, num_blocks, whole, sharers, IS_CUT: gl.constexpr):
    """Work items of this program: the piece it leaves, its whole tiles, the piece it owns."""
    me, begin, end = my_share(num_tiles, num_blocks, whole, sharers)
    programs = gl.num_programs(0)
    items = (whole - me + programs - 1) // programs
    if IS_CUT:
        owns = (begin < end) & ((end - 1) // num_blocks * num_blocks >= begin)
        items += num_left(begin, end, num_blocks) + gl.where(owns, 1, 0)
    return items


@gluon.jit
def share(item, num_tiles, num_blocks, whole, sharers, IS_CUT: gl.constexpr):
    """Tile, first and last K block of a work item of this program."""
    me, begin, end = my_share(num_tiles, num_blocks, whole, sharers)
    programs = gl.num_programs(0)
    tile, first, last = item * programs + me, 0, num_blocks
    if IS_CUT:
        left = num_left(begin, end, num_blocks)
        tile = (item - left) * programs + me
        is_left = item < left
        is_cut = is_left | (tile >= whole)
        cut_tile = gl.where(is_left, begin, end - 1) // num_blocks
        first = gl.where(is_left, begin - cut_tile * num_blocks, 0)
        last = gl.where(is_cut, gl.minimum(num_blocks, end - cut_tile * num_blocks), num_blocks)
        tile = gl.where(is_cut, whole + cut_tile, tile)
    return tile, first, last


@gluon.jit
def place(tile, num_row_tiles, num_token_tiles, BAND: gl.constexpr):
    """Row tile and token tile: all rows of a band of token tiles, whose activations stay in L2, then the next."""
    in_band = tile % (BAND * num_row_tiles)
    first_token_tile = tile // (BAND * num_row_tiles) * BAND
    width = gl.minimum(BAND, num_token_tiles - first_token_tile)
    return in_band // width, first_token_tile + in_band % width
