# SPDX-License-Identifier: Apache-2.0
"""The measured choices: legal, complete for the benchmark's layers, and what the plan follows."""

import json

import pytest

from benchmarks.shapes import LINEAR_SHAPES
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import TOKEN_RANGES, LinearProblem
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.lanes import MAX_TOKENS
from quattuor.kernels.w4a8_linear.planes import HopperTile, LanesTile, Tile


def hopper(shape, **fields):
    """Describe a layer on an H200."""
    sizes = {"out_features": shape[0], "in_features": shape[1]}
    return LinearProblem(**sizes, device_type="cuda", compute_capability=(9, 0), **fields)


KEYS = ("n", "k", "mode", "bits")
MODES = [{}, {"group_size": 128, "integer_group_scale": True}]


@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values())
def test_every_benchmarked_layer_has_choices_that_the_plan_follows(shape, fields):
    problem = hopper(shape, **fields)
    plan = w4a8_linear.plan(problem)
    for tokens in TOKEN_RANGES:
        choice = measured.find(problem, tokens.last)
        assert choice is not None
        assert plan.implementation(tokens.last or 10**6) == choice.implementation
        assert (
            type(choice.tile) is {"triton": Tile, "gluon": HopperTile, "lanes": LanesTile}[choice.implementation]
        )


def test_within_a_range_one_implementation_is_chosen():
    rows = json.loads(measured.FILE.read_text())["choices"]
    for row in rows:
        tokens = next(item for item in TOKEN_RANGES if row["max_tokens"] in item)
        same = [
            other["implementation"]
            for other in rows
            if other["max_tokens"] in tokens and all(other.get(key) == row.get(key) for key in KEYS)
        ]
        assert set(same) == {row["implementation"]}


def test_tiles_hold_the_tokens_they_are_chosen_for():
    for row in json.loads(measured.FILE.read_text())["choices"]:
        assert row["latency_us"] > 0
        if row["implementation"] == "lanes":
            assert row["max_tokens"] == MAX_TOKENS
            assert row["tile"]["rows"] % row["tile"]["num_warps"] == 128 % row["tile"]["rows"] == 0
            continue
        assert row["tile"]["tokens"] <= max(16, row["max_tokens"])
        if row["implementation"] == "triton":
            assert 1 <= row["tile"]["split"] <= -(-row["k"] // 256)


def test_other_layers_and_devices_follow_the_rules():
    assert measured.find(hopper((4096, 4000)), 1) is None
    assert measured.find(hopper((4096, 4096), group_size=64), 1) is None
    assert measured.find(hopper((4096, 4096), group_size=64, integer_group_scale=True), 1) is None
    assert measured.find(hopper((4096, 4096), weight_bits=3), 1) is None
    assert measured.find(hopper((4096, 4096), activation_zero_point=True), 1) is None
    cpu = LinearProblem(out_features=4096, in_features=4096)
    assert measured.find(cpu, 1) is None


def test_narrow_codes_have_tiles_of_their_own():
    found = {bits: measured.find(hopper((28672, 8192), weight_bits=bits), 16).tile for bits in (2, 3, 4)}
    assert found[3] != found[4]
    for bits in (2, 3):
        plan = w4a8_linear.plan(hopper((28672, 8192), weight_bits=bits))
        assert {plan.implementation(tokens) for tokens in (1, 32, 64, 10**6)} == {"triton"}
        assert all("bits of memory" not in row.reason for row in plan.explain() if row.is_chosen)
        scaled = w4a8_linear.plan(hopper((28672, 8192), weight_bits=bits, group_size=64))
        assert all("in 4 bits of memory" in row.reason for row in scaled.explain() if row.is_chosen)
