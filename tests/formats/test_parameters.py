# SPDX-License-Identifier: Apache-2.0
"""Parameters: a mapping that can be cut by group and by row."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import Parameters


@pytest.fixture
def parameters() -> Parameters:
    return Parameters(group_scale=torch.arange(12.0).reshape(4, 3), channel_scale=torch.arange(4.0).reshape(4, 1))


def test_mapping(parameters: Parameters) -> None:
    assert list(parameters) == ["group_scale", "channel_scale"]
    assert len(parameters) == 2
    assert "group_scale" in parameters
    assert "zero_point" not in parameters
    assert set(dict(parameters)) == {"group_scale", "channel_scale"}
    assert repr(parameters) == "Parameters(group_scale: (4, 3), channel_scale: (4, 1))"
    with pytest.raises(InputError, match=r"zero_point"):
        parameters["zero_point"]


def test_group_keeps_what_all_groups_share(parameters: Parameters) -> None:
    group = parameters.group(2)
    assert group["group_scale"].tolist() == [[2.0], [5.0], [8.0], [11.0]]
    assert torch.equal(group["channel_scale"], parameters["channel_scale"])


def test_rows_keep_what_all_rows_share(parameters: Parameters) -> None:
    rows = parameters.rows(1, 3)
    assert rows["group_scale"].tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert rows["channel_scale"].tolist() == [[1.0], [2.0]]
    assert Parameters(scale=torch.ones(1, 1)).rows(1, 3)["scale"].shape == (1, 1)
