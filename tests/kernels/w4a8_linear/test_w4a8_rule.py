# SPDX-License-Identifier: Apache-2.0
"""The rule for layers that were not measured: what it costs where tiles were, and layers that are served."""

import pytest

from benchmarks import record
from benchmarks.kernels.tune_rule import costs
from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.hopper import choose_hopper_tile, make_schedule
from quattuor.kernels.w4a8_linear.lanes import choose_lanes_tile
from quattuor.kernels.w4a8_linear.planes import BLOCK_K, MAX_SPLIT_TILES, HopperTile, Tile, mode_of
from quattuor.kernels.w4a8_linear.triton import choose_tile

#: (out_features, in_features) as runtimes merge them: Llama-3-8B, Qwen3-8B, and each half of a layer of 13B.
SERVED = [
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (24576, 4096),
    (4096, 12288),
    (7680, 5120),
    (5120, 2560),
    (13824, 5120),
    (5120, 6912),
]
MODES = [{}, {"group_size": 128, "integer_group_scale": True}, {"group_size": 128}]


def test_the_rule_costs_little_where_every_tile_was_timed():
    found = [cost for cost in costs() if cost.over_fastest is not None]
    assert len(found) >= 30
    worst = max(found, key=lambda cost: cost.over_fastest)
    assert worst.over_fastest <= 1.06, worst
    assert sum(cost.over_fastest for cost in found) <= 1.02 * len(found)
    assert {cost.granularity for cost in found} == {"channel", "group128", "group128_float"}


@pytest.mark.parametrize(("variant", "run"), [("channel_one_sum", 5), ("group128", 4)])
def test_the_rule_for_one_token_costs_little_where_tiles_were_timed(variant, run):
    layers = {}
    for row in record.read("kernels_w4a8_one_token")["rows"]:
        if (row["variant"], row["run"]) == (variant, run) and row["topic"].startswith("tiles_with"):
            timed = row["latency_us"] + row["latency_with_quantization_us"]
            layers.setdefault(row["layer"], {})[row["tile"]] = timed
    over_fastest = []
    for layer, timed in layers.items():
        out_features, in_features = map(int, layer.split("x"))
        tile = choose_lanes_tile(out_features, in_features // BLOCK_K)
        latency = timed.get(f"lanes r{tile.rows} w{tile.num_warps} a{tile.ahead}")
        if latency is not None:
            over_fastest.append(latency / min(timed.values()))
    assert len(over_fastest) >= 20
    assert max(over_fastest) <= 1.15
    assert sum(over_fastest) <= 1.05 * len(over_fastest)


@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("shape", SERVED)
def test_served_layers_have_tiles_that_fit(shape, fields):
    problem = LinearProblem(
        out_features=shape[0], in_features=shape[1], device_type="cuda", compute_capability=(9, 0), **fields
    )
    plan = w4a8_linear.plan(problem)
    num_blocks = -(-shape[1] // BLOCK_K)
    for num_tokens in (1, 16, 17, 32, 33, 64, 65, 128, 129, 300, 512, 1024, 5000):
        name = plan.implementation(num_tokens)
        if name == "lanes":
            assert num_tokens == 1
            continue
        assert name in ("triton", "gluon")
        choice = measured.find(problem, num_tokens)
        if choice is not None:
            assert choice.implementation == name
            tile = choice.tile
        elif name == "gluon":
            tile = choose_hopper_tile(num_tokens, problem, 132)
        else:
            tile = choose_tile(num_tokens, shape[0], num_blocks, 132, True)
        tiles = -(-shape[0] // tile.rows) * -(-num_tokens // tile.tokens)
        if isinstance(tile, Tile):
            assert tile.split == 1 or tiles <= MAX_SPLIT_TILES
            continue
        assert isinstance(tile, HopperTile)
        assert tile.shared_bytes(mode_of(problem)) <= tile.shared_limit
        schedule = make_schedule(tiles, num_blocks, 132 * tile.per_processor, tile.cut)
        assert 1 <= schedule.programs * tile.consumers <= MAX_SPLIT_TILES
        busiest = -(-schedule.whole // schedule.programs) + (tiles - schedule.whole) / schedule.sharers
        assert busiest <= max(1.0, 2.0 * tiles / (132 * tile.per_processor))
