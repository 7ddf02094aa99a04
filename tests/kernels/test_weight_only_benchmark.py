# SPDX-License-Identifier: Apache-2.0
"""The benchmark of weight-only layers without a device: floors, bytes, candidates, measured tiles."""

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import weight_only, weight_only_tune, weight_only_uniform
from benchmarks.kernels.weight_only_uniform import Uniform
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear import measured
from quattuor.kernels.w4a16_linear.planes import DigitTile, LaneTile, PairTile, Tile, layout_of


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that there is an H200."""
    fields = {"device_type": "cuda", "compute_capability": (9, 0)}
    monkeypatch.setattr(weight_only_uniform, "describe_device", lambda device: fields)


def test_floor_is_bytes_over_bandwidth_then_operations_over_rate():
    # 1024 x 1024 codes of 4 bits are 512 KiB
    size = Uniform(bits=4).weight_bytes(1024, 1024)
    assert size == 2**19 + 2 * 1024
    assert Uniform(bits=4, group_size=128, zero_point=True).weight_bytes(1024, 1024) == 2**19 + 3 * 8 * 1024
    few = weight_only.floor_us(size, 1, 1024, 1024)
    assert few == pytest.approx((size + 4096) / 4.3e12 * 1e6)
    many = weight_only.floor_us(size, 4096, 1024, 1024)
    assert many == pytest.approx(2 * 4096 * 2**20 / 0.8e15 * 1e6)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_candidates_fit_the_device(bits):
    kind = Uniform(bits=bits, group_size=128)
    for max_tokens in weight_only_tune.TIMED:
        tiles = list(weight_only_tune.candidates((11008, 4096), max_tokens, kind))
        assert len(tiles) == len(set(tiles)) > 0
        layout = layout_of(weight_only_uniform.problem_of((11008, 4096), kind))
        for tile in tiles:
            num_blocks = -(-4096 // layout.block_k)
            assert isinstance(tile, Tile) or max_tokens <= 2
            assert (tile.num_warps if isinstance(tile, LaneTile | PairTile) else tile.split) <= num_blocks


def test_jobs_compile_each_kernel_once(hopper):
    cases = [(shape, Uniform(bits=4, group_size=128)) for shape in weight_only.SHAPES]
    jobs = weight_only_tune.compile_jobs(cases, [2, 16])
    assert len(jobs) == len(set(jobs))
    assert len(jobs) < sum(
        len(list(weight_only_tune.candidates(shape, count, kind))) for shape, kind in cases for count in (2, 16)
    )


def test_measured_tiles_are_found_by_layer_and_token_count():
    rows = json.loads(measured.FILE.read_text())["choices"]
    assert rows
    for row in rows:
        problem = LinearProblem(
            out_features=row["n"],
            in_features=row["k"],
            weight_bits=row["bits"],
            group_size=row["group_size"],
            zero_point=row["zero_point"],
            activation_bits=16,
            device_type="cuda",
            compute_capability=(9, 0),
        )
        tile = measured.find(problem, row["max_tokens"])
        assert tile is not None
        assert dataclasses.asdict(tile) == row["tile"]
        assert measured.find(problem, 1 << 20) is None
        if isinstance(tile, LaneTile | PairTile):
            assert row["max_tokens"] <= (1 if isinstance(tile, PairTile) else 2)
            continue
        assert tile.tokens <= max(16, row["max_tokens"])
        layout = layout_of(problem)
        # three words of 3-bit codes, one of others, and the tokens of a block, for each stage
        bytes_of_token = 4 if isinstance(tile, DigitTile) else 2
        words = 2 * tile.rows * layout.words * layout.plane_k
        shared = tile.num_stages * (words + bytes_of_token * tile.tokens * layout.block_k)
        assert shared <= 227 * 1024
    assert measured.find(LinearProblem(out_features=8, in_features=8, activation_bits=16), 1) is None
