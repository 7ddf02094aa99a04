# SPDX-License-Identifier: Apache-2.0
"""What tuning tries and how it chooses, without a GPU."""

import itertools

import pytest

from benchmarks.kernels.tune import GROUPS, TIMED, candidates, choose, compile_jobs, others
from benchmarks.shapes import LINEAR_SHAPES
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.planes import HopperTile, Tile


@pytest.mark.parametrize("mode", list(GROUPS))
def test_candidates_are_distinct_and_fit_the_layer(mode):
    for shape, max_tokens in itertools.product(LINEAR_SHAPES.values(), TIMED):
        tiles = candidates(shape, max_tokens, mode)
        assert len(tiles) == len(set(tiles)) >= 2
        assert any(isinstance(tile, HopperTile) for tile in tiles)
        for tile in tiles:
            if isinstance(tile, Tile):
                assert 1 <= tile.split <= max(1, shape[1] // 256 // 4)


def test_a_shortlist_holds_the_present_choice():
    for shape, max_tokens, mode in itertools.product(LINEAR_SHAPES.values(), (64, 256, 8192), GROUPS):
        tiles = candidates(shape, max_tokens, mode, top=3)
        assert 3 <= len(tiles) == len(set(tiles)) <= 4
        sizes = {"out_features": shape[0], "in_features": shape[1], "group_size": GROUPS[mode]}
        problem = LinearProblem(
            **sizes, integer_group_scale=mode == "integer", device_type="cuda", compute_capability=(9, 0)
        )
        present = measured.find(problem, max_tokens)
        assert present is None or present.tile in tiles


def test_every_kernel_is_compiled_once():
    jobs = compile_jobs(list(LINEAR_SHAPES.values()), list(GROUPS), list(TIMED))
    assert len(jobs) == len(set(jobs))
    assert len(jobs) < 110 * len(GROUPS)


def test_a_new_choice_replaces_that_of_its_place_alone():
    place = {"n": 64, "k": 256, "mode": "channel", "max_tokens": 8}
    rows = [place, place | {"bits": 2}, place | {"mode": "integer"}, place | {"max_tokens": 16}]
    assert others(rows, place) == rows[1:]


def test_one_implementation_is_chosen_for_a_range_of_token_counts():
    wide = HopperTile(blocks=2, tokens=128, stages=3)
    few = [HopperTile(blocks=1, tokens=tokens, stages=8) for tokens in (8, 16)]
    small = [Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=4) for split in (1, 2)]
    found = [
        (8, "gluon", 9.0, few[0]),
        (8, "triton", 10.0, small[0]),
        (8, "triton", 8.0, small[1]),
        (16, "gluon", 10.0, few[1]),
        (16, "triton", 10.0, small[0]),
        (256, "gluon", 50.0, wide),
    ]
    assert choose(found) == {
        8: ("triton", 8.0, small[1]),
        16: ("triton", 10.0, small[0]),
        256: ("gluon", 50.0, wide),
    }


def test_an_implementation_that_was_not_timed_everywhere_is_not_chosen():
    tile = HopperTile(blocks=1, tokens=8, stages=8)
    other = Tile(rows=64, tokens=16, split=1, num_warps=4, num_stages=4)
    found = [(8, "gluon", 1.0, tile), (8, "triton", 5.0, other), (16, "triton", 5.0, other)]
    assert {name for name, *_ in choose(found).values()} == {"triton"}
