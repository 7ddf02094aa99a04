# SPDX-License-Identifier: Apache-2.0
"""RootMeanSquare against its formula (2307.13304, algorithm 1)."""

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer
from quattuor.formats.mid_rise import MidRise
from quattuor.granularity import PerTensor
from quattuor.scales import Grid
from quattuor.scales.root_mean_square import NORMAL_MULTIPLES, RootMeanSquare


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outermost_levels_lie_at_the_multiple(bits: int, generator: torch.Generator) -> None:
    weight = torch.randn(12, 20, generator=generator) * 3
    grid = Grid(number_format=MidRise(bits), granularity=PerTensor(), scales=RootMeanSquare())
    parameters = grid.fit(weight)
    assert parameters["scale"].shape == (1, 1)
    assert parameters["scale"].dtype == torch.float32
    highest = torch.full((1, 1, 1), MidRise(bits).code_range[1], dtype=torch.int8)
    outermost = MidRise(bits).decode(highest, parameters).item()
    assert outermost == pytest.approx(2.4 * weight.norm().item() / (12 * 20) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_multiple_is_the_least_error_of_normal_numbers(bits: int) -> None:
    """Integrated over quantiles; moving the levels either way costs more, and 2.4 at 2 bits costs 80 % more."""
    share = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values, number_format = torch.special.ndtri(share)[None, None], MidRise(bits)

    def error(multiple: float | None) -> float:
        parameters = RootMeanSquare(multiple=multiple).fit(values, number_format)
        return (number_format.fake_quantize(values, parameters) - values).square().mean().item()

    least = error(None)
    assert least == error(NORMAL_MULTIPLES[bits])
    assert all(least < error(NORMAL_MULTIPLES[bits] * factor) for factor in (0.95, 1.05))
    if bits == 2:
        assert error(2.4) > 1.8 * least


def test_authors_map_from_values_to_codes(generator: torch.Generator) -> None:
    """t = (w / s + 1) / 2 * Q, clamped to [0, Q] and rounded, counts the same levels from the lowest."""
    weight = torch.randn(1, 1, 4096, generator=generator).double()
    number_format = MidRise(3)
    codes = number_format.encode(weight, RootMeanSquare().fit(weight, number_format))
    s = 2.4 * weight.square().mean().sqrt()
    expected = torch.floor(((weight / s + 1) / 2 * 7).clamp(0, 7) + 0.5)
    assert torch.equal(codes.double() + 4, expected)


def test_one_outlier_moves_the_levels_little() -> None:
    weight = torch.ones(1, 1, 10000)
    weight[..., 0] = 10
    scale = RootMeanSquare(multiple=1.0).fit(weight, MidRise(2))["scale"]
    assert scale.item() == pytest.approx(2 / 3, rel=0.01)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
def test_zeros_come_back_as_next_to_nothing(scale_dtype) -> None:
    parameters = RootMeanSquare(scale_dtype=scale_dtype).fit(torch.zeros(1, 1, 8), MidRise(2))
    decoded = MidRise(2).fake_quantize(torch.zeros(1, 1, 8), parameters)
    assert decoded.abs().max() <= 2.0**-25


def test_values_that_do_not_exist() -> None:
    for multiple in (0.0, -2.4, 1e4, float("nan")):
        with pytest.raises(InputError, match=r"RootMeanSquare: multiple=.*; use 2.4"):
            RootMeanSquare(multiple=multiple)
    with pytest.raises(UnsupportedError, match=r"RootMeanSquare: format=.*symmetrically around zero; use MidRise"):
        Grid(number_format=Integer(2), granularity=PerTensor(), scales=RootMeanSquare())
