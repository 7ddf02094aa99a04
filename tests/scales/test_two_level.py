# SPDX-License-Identifier: Apache-2.0
"""TwoLevel: nothing wraps, whatever the weights; integers where promised; the refinement never hurts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.scales import ClipSearch, TwoLevel

QUICK = ClipSearch(num_steps=5, smallest=0.6)


def all_levels(number_format: TwoLevelInteger, parameters: Parameters) -> Tensor:
    """Return the exact, unclamped int8 level of every code in every group, [R, G, C]."""
    lowest, highest = number_format.code_range
    codes = torch.arange(lowest, highest + 1, dtype=torch.float64)
    return (codes * parameters["group_scale"].double()[..., None]).round()


@given(
    bits=st.integers(2, 8),
    integer=st.booleans(),
    choose_sign=st.booleans(),
    refine=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 4.0, 12.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_no_code_ever_leaves_int8(
    bits: int, integer: bool, choose_sign: bool, refine: bool, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp(spread * torch.randn(5, 4, 1, generator=generator))
    values = torch.randn(5, 4, 8, generator=generator) * magnitudes
    values[0] = 0
    values[1, 2] = 0
    integer = integer and bits < 8
    inner = ClipSearch(num_steps=5, smallest=0.6, choose_sign=choose_sign)
    number_format = TwoLevelInteger(bits)
    parameters = TwoLevel(inner=inner, integer=integer, refine=refine).fit(values, number_format)
    group_scale, channel_scale = parameters["group_scale"], parameters["channel_scale"]
    assert group_scale.dtype == (torch.int8 if integer else torch.float16)
    assert group_scale.shape == (5, 4)
    assert channel_scale.dtype == torch.float32
    assert channel_scale.shape == (5, 1)
    assert (group_scale != 0).all()
    assert (channel_scale > 0).all()
    assert all_levels(number_format, parameters).abs().max() <= 127
    decoded = number_format.fake_quantize(values, parameters)
    assert torch.isfinite(decoded).all()
    assert (decoded[0] == 0).all()
    assert (decoded[1, 2] == 0).all()


def test_formula() -> None:
    # Steps 7/7 = 1 and 1.75/7 = 0.25; 4 bits have L = 127/8 int8 steps a code, 15 when whole.
    values = torch.tensor([[[7.0, 1.0], [-1.75, 1.0]]])
    whole_range = ClipSearch(num_steps=1, smallest=1.0)
    exact = TwoLevel(inner=whole_range, integer=False, refine=False).fit(values, TwoLevelInteger(4))
    assert exact["group_scale"].tolist() == [[15.875, 3.96875]]
    assert exact["channel_scale"].item() == pytest.approx(1 / 15.875)
    whole = TwoLevel(inner=whole_range, integer=True, refine=False).fit(values, TwoLevelInteger(4))
    assert whole["group_scale"].tolist() == [[15, 4]]
    assert whole["channel_scale"].item() == pytest.approx(1 / 15)


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_refining_never_hurts(integer: bool, weighted: bool, generator: torch.Generator) -> None:
    values = torch.randn(8, 6, 16, generator=generator) * torch.rand(8, 6, 1, generator=generator)
    importance = torch.rand(1, 6, 16, generator=generator) ** 3
    number_format, errors = TwoLevelInteger(4), []
    inner = ClipSearch(weighted=weighted)
    for refine in (True, False):
        parameters = TwoLevel(inner=inner, integer=integer, refine=refine).fit(values, number_format, importance)
        error = (number_format.fake_quantize(values, parameters) - values).square()
        errors.append((error * importance if weighted else error).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < errors[1].sum()


def test_refined_integers_are_the_best_of_all_integers(generator: torch.Generator) -> None:
    values = torch.randn(4, 3, 16, generator=generator)
    number_format = TwoLevelInteger(4)
    inner = ClipSearch(num_steps=20, choose_sign=True)
    parameters = TwoLevel(inner=inner).fit(values, number_format)
    chosen = (number_format.fake_quantize(values, parameters) - values).square().sum(-1)
    for candidate in (sign * size for size in range(1, 16) for sign in (1, -1)):
        group_scale = torch.full((4, 3), candidate, dtype=torch.int8)
        other = Parameters(group_scale=group_scale, channel_scale=parameters["channel_scale"])
        error = (number_format.fake_quantize(values, other) - values).square().sum(-1)
        assert (chosen <= error * (1 + 1e-6)).all()


def test_a_tiny_group_beside_a_large_one() -> None:
    values = torch.tensor([[[1e-6, -1e-6], [100.0, -50.0]]])
    for integer in (True, False):
        parameters = TwoLevel(inner=QUICK, integer=integer).fit(values, TwoLevelInteger(4))
        decoded = TwoLevelInteger(4).fake_quantize(values, parameters)
        # The int8 grid of the row is 100 / 105 wide, so nothing but zero is near.
        assert decoded[0, 0].tolist() == [0.0, 0.0]
        assert decoded[0, 1, 0].item() == pytest.approx(100, rel=0.05)


def test_integer_group_scales_do_not_exist_at_8_bits() -> None:
    values = torch.ones(1, 1, 4)
    with pytest.raises(
        UnsupportedError, match=r"TwoLevel: bits=8 leaves less than one int8 step.*use integer=False"
    ):
        TwoLevel(inner=QUICK).fit(values, TwoLevelInteger(8))
    assert TwoLevel(inner=QUICK).fit(values, TwoLevelInteger(7))["group_scale"].abs().tolist() == [[1]]
    parameters = TwoLevel(inner=QUICK, integer=False).fit(values, TwoLevelInteger(8))
    assert parameters["group_scale"].item() <= 127 / 128


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r"TwoLevel: format=.* has no second level; use TwoLevelInteger"):
        TwoLevel().fit(torch.ones(1, 1, 4), Integer(4))
    with pytest.raises(
        InputError, match=r"TwoLevel: inner\.scale_dtype=float16 would round the group scale twice"
    ):
        TwoLevel(inner=ClipSearch(scale_dtype="float16"))
