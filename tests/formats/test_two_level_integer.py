# SPDX-License-Identifier: Apache-2.0
"""TwoLevelInteger: the int8 level, checked with exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quattuor.errors import InputError
from quattuor.formats import Parameters, TwoLevelInteger


def parameters_of(
    group_scale: float, dtype: torch.dtype = torch.float16, channel_scale: float = 1.0
) -> Parameters:
    return Parameters(
        group_scale=torch.tensor([[group_scale]], dtype=dtype), channel_scale=torch.tensor([[channel_scale]])
    )


def all_codes(number_format: TwoLevelInteger) -> torch.Tensor:
    lowest, highest = number_format.code_range
    return torch.arange(lowest, highest + 1, dtype=torch.int8).view(1, 1, -1)


@given(bits=st.integers(2, 8), group_scale=st.floats(-300, 300, width=16).filter(lambda value: value != 0))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_level8_rounds_the_exact_product_once(bits: int, group_scale: float) -> None:
    codes = all_codes(TwoLevelInteger(bits))
    level8 = TwoLevelInteger(bits).level8(codes, parameters_of(group_scale))
    exact = [round(code * Fraction(group_scale)) for code in codes.view(-1).tolist()]
    assert level8.dtype == torch.int8
    assert level8.view(-1).tolist() == [min(max(level, -128), 127) for level in exact]


@pytest.mark.parametrize("group_scale", [1, 3, 15, -7])
def test_integer_group_scales_leave_nothing_to_round(group_scale: int) -> None:
    codes = all_codes(TwoLevelInteger(4))
    level8 = TwoLevelInteger(4).level8(codes, parameters_of(group_scale, torch.int8))
    assert torch.equal(level8.int(), codes.int() * group_scale)


def test_the_same_numbers_from_int8_and_float16_scales() -> None:
    codes = all_codes(TwoLevelInteger(4))
    decoded = [
        TwoLevelInteger(4).decode(codes, parameters_of(-11, dtype, 0.03)) for dtype in (torch.int8, torch.float16)
    ]
    assert torch.equal(*decoded)
    assert decoded[0].dtype == torch.float32


@given(
    bits=st.integers(2, 8),
    group_scale=st.floats(-128, 128, width=16).filter(lambda value: abs(value) > 1e-3),
    targets=st.lists(st.floats(-140, 140, width=32), min_size=1, max_size=8),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_encode_is_nearest_on_the_final_grid(bits: int, group_scale: float, targets: list[float]) -> None:
    number_format, parameters = TwoLevelInteger(bits), parameters_of(group_scale)
    levels = number_format.level8(all_codes(number_format), parameters).view(-1).tolist()
    values = torch.tensor([[targets]])
    chosen = number_format.level8(number_format.encode(values, parameters), parameters).view(-1).tolist()
    for target, level in zip(targets, chosen, strict=True):
        assert abs(level - Fraction(target)) == min(abs(other - Fraction(target)) for other in levels)


def test_the_quotient_alone_would_pick_a_worse_code() -> None:
    # 1.4 / 0.3 = 4.67 rounds to code 5, level rne(1.5) = 2; code 4 has level 1, which is nearer.
    encoded = TwoLevelInteger(4).encode(torch.tensor([[[1.4]]]), parameters_of(0.3))
    assert encoded.item() == 4


def test_channel_scale_scales_the_numbers() -> None:
    number_format = TwoLevelInteger(4)
    values = torch.linspace(-90, 90, 41).view(1, 1, -1)
    codes = number_format.encode(values, parameters_of(11.5))
    assert torch.equal(number_format.encode(values * 0.25, parameters_of(11.5, channel_scale=0.25)), codes)
    decoded = number_format.decode(codes, parameters_of(11.5, channel_scale=0.25))
    assert torch.equal(decoded, 0.25 * number_format.level8(codes, parameters_of(11.5)).float())


@pytest.mark.parametrize("bits", [1, 9])
def test_width_that_does_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=r"TwoLevelInteger: bits=. is not an integer from 2 to 8"):
        TwoLevelInteger(bits)
