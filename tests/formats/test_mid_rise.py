# SPDX-License-Identifier: Apache-2.0
"""MidRise: levels at odd multiples of half a step."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import Parameters
from quattuor.formats.mid_rise import MidRise

STEP = Parameters(scale=torch.tensor([[0.5]]))


def test_levels_at_two_bits() -> None:
    codes = torch.arange(-2, 2, dtype=torch.int8).view(1, 1, -1)
    levels = MidRise(2).decode(codes, STEP)
    assert levels.flatten().tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert torch.equal(MidRise(2).encode(levels, STEP), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_are_symmetric_and_leave_out_zero(bits: int) -> None:
    lowest, highest = MidRise(bits).code_range
    codes = torch.arange(lowest, highest + 1, dtype=torch.int8).view(1, 1, -1)
    levels = MidRise(bits).decode(codes, STEP).flatten()
    assert levels.numel() == 2**bits
    assert torch.equal(levels, -levels.flip(0))
    assert levels.abs().min() == 0.25


def test_ties_go_to_the_even_code_and_the_rest_saturates() -> None:
    values = torch.tensor([[[0.0, 0.5, 1.0, -0.5, 9.0, -9.0]]])
    assert MidRise(3).encode(values, STEP).flatten().tolist() == [0, 0, 2, -2, 3, -4]


@pytest.mark.parametrize("bits", [1, 9, True])
def test_widths_that_do_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=r"MidRise: bits=.* is not an integer from 2 to 8"):
        MidRise(bits)
