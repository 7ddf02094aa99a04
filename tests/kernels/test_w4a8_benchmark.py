# SPDX-License-Identifier: Apache-2.0
"""What the benchmark computes without a GPU: floors, copies, and the weights that it quantizes."""

import pytest
import torch

from benchmarks.kernels.contenders import quantized_rows
from benchmarks.kernels.timing import COLD_BYTES, floor_us, num_copies
from benchmarks.shapes import LINEAR_SHAPES, TOKEN_COUNTS


@pytest.mark.parametrize(
    ("num_tokens", "expected_us"), [(1, 27.3), (16, 27.6), (128, 37.6), (1024, 301), (4096, 1203)]
)
def test_floor_is_memory_then_arithmetic(num_tokens, expected_us):
    assert floor_us(num_tokens, 28672, 8192) == pytest.approx(expected_us, rel=0.005)


def test_copies_exceed_the_cache():
    for nbytes in (1, 10**6, 10**9):
        assert num_copies(nbytes) >= 2
        assert num_copies(nbytes) * nbytes >= COLD_BYTES


@pytest.mark.parametrize("group_size", [None, 128])
def test_quantized_weight_is_close_and_legal(group_size):
    weight = torch.randn(64, 512)
    codes, scale, group_scale = quantized_rows(weight, group_size)
    assert codes.dtype == torch.int8
    assert codes.min() >= -8
    assert codes.max() <= 7
    step = scale[:, None]
    if group_size is not None:
        assert ((group_scale >= 1) & (group_scale <= 16) & (group_scale == group_scale.round())).all()
        step = step * group_scale.float().repeat_interleave(group_size, dim=1)
    error = (codes * step - weight).norm() / weight.norm()
    assert error < 0.15


def test_shapes_are_unique_and_bulk_copies_can_read_them():
    assert len(set(LINEAR_SHAPES.values())) == len(LINEAR_SHAPES)
    assert all(
        in_features % 16 == 0 and out_features % 8 == 0 for out_features, in_features in LINEAR_SHAPES.values()
    )
    assert list(TOKEN_COUNTS) == sorted(set(TOKEN_COUNTS))
