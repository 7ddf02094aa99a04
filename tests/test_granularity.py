# SPDX-License-Identifier: Apache-2.0
"""Granularities: which elements land in one group, and sizes that do not divide."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken

MATRIX = torch.arange(24).reshape(4, 6)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), (1, 1, 24)),
        (PerChannel(), (4, 1, 6)),
        (PerToken(), (4, 1, 6)),
        (PerGroup(1), (4, 6, 1)),
        (PerGroup(3), (4, 2, 3)),
        (PerGroup(6), (4, 1, 6)),
    ],
    ids=str,
)
def test_split_and_merge(granularity: Granularity, shape: tuple[int, int, int]) -> None:
    grouped = granularity.split(MATRIX)
    assert grouped.shape == shape
    assert granularity.num_groups(6) == shape[1]
    # Row-major order is the definition: groups are runs along the input dimension.
    assert grouped.reshape(-1).tolist() == list(range(24))
    assert torch.equal(granularity.merge(grouped, (4, 6)), MATRIX)


def test_a_group_is_a_run_of_inputs_of_one_row() -> None:
    assert PerGroup(3).split(MATRIX)[2, 1].tolist() == [15, 16, 17]


def test_transposed_matrix() -> None:
    assert PerGroup(2).split(MATRIX.T)[1, 1].tolist() == [13, 19]
    assert torch.equal(PerGroup(2).merge(PerGroup(2).split(MATRIX.T), (6, 4)), MATRIX.T)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(1)], ids=str)
def test_one_by_one(granularity: Granularity) -> None:
    assert granularity.split(torch.ones(1, 1)).shape == (1, 1, 1)


def test_size_that_does_not_divide_offers_sizes_that_do() -> None:
    with pytest.raises(InputError, match=r"group_size=128 does not divide in_features=576; use 64 or 32 or 16"):
        PerGroup(128).num_groups(576)
    with pytest.raises(InputError, match=r"does not divide in_features=9; use PerChannel\(\)"):
        PerGroup(2).split(torch.zeros(2, 9))


@pytest.mark.parametrize("group_size", [0, -32, True])
def test_size_that_does_not_exist(group_size: int) -> None:
    with pytest.raises(InputError, match=r"PerGroup: group_size=.* is not a positive integer; use 32, 64 or 128"):
        PerGroup(group_size)
