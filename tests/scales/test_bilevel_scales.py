# SPDX-License-Identifier: Apache-2.0
"""Statistics rounded to a few bits between the extremes of the rows that share them."""

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import BilevelInteger, Integer
from quattuor.granularity import PerGroup
from quattuor.scales import Bilevel, ClipSearch, Grid


def test_statistics_are_within_half_a_step_of_the_first_level(generator: torch.Generator) -> None:
    values = torch.randn(32, 5, 16, generator=generator) * torch.rand(32, 5, 1, generator=generator)
    plain = BilevelInteger(3, None, None)
    first = Bilevel().fit(values, plain)
    high, low = values.amax(-1), values.amin(-1)
    assert torch.equal(first["scale"], ((high - low) / 7).half())
    assert torch.equal(first["zero_point"], (-low / ((high - low) / 7)).half())
    number_format = BilevelInteger(3, scale_bits=3, zero_bits=4)
    fitted = Bilevel().fit(values, number_format)
    scale, zero_point = number_format.statistics(fitted)
    assert fitted["scale_step"].shape == (2, 5)
    # Half a step of the second level, and what float16 loses of step and base.
    for rounded, exact, name in (
        (scale, first["scale"], "scale_step"),
        (zero_point, first["zero_point"], "zero_step"),
    ):
        step = fitted[name].float().repeat_interleave(16, dim=0)
        assert ((rounded - exact.float()).abs() <= 0.501 * step + 2**-9 * exact.float().abs()).all()
        assert ((rounded - exact.float()).abs() > 0.1 * step).any()
    assert (scale > 0).all()


def test_more_bits_come_closer(generator: torch.Generator) -> None:
    values = torch.randn(32, 4, 16, generator=generator)
    errors = []
    for bits in (1, 2, 3, 5, 8, None):
        number_format = BilevelInteger(3, bits, bits)
        decoded = number_format.fake_quantize(values, Bilevel().fit(values, number_format))
        errors.append(float((decoded - values).square().sum()))
    assert errors[:4] == sorted(errors[:4], reverse=True)
    assert errors[4] == pytest.approx(errors[5], rel=0.02)


def test_entries_without_importance_do_not_count(generator: torch.Generator) -> None:
    weight = torch.randn(16, 32, generator=generator)
    grid = Grid(number_format=BilevelInteger(3), granularity=PerGroup(16), scales=Bilevel())
    importance = torch.ones(16, 32)
    importance[3, 20] = 0
    expected = grid.fit(weight.clone(), importance)
    weight[3, 20] = 1e3
    fitted = grid.fit(weight, importance)
    assert all(torch.equal(fitted[name], expected[name]) for name in expected)


def test_groups_without_a_range_do_not_spoil_their_neighbours(generator: torch.Generator) -> None:
    values = 0.01 * torch.randn(16, 1, 16, generator=generator)
    values[5] = 0.0
    values[6] = 0.02
    number_format = BilevelInteger(3)
    fitted = Bilevel().fit(values, number_format)
    scale, _ = number_format.statistics(fitted)
    assert scale.max() < 0.02
    decoded = number_format.fake_quantize(values, fitted)
    rest = [row for row in range(16) if row not in (5, 6)]
    assert (decoded[rest] - values[rest]).abs().max() < 0.008
    alone = Bilevel().fit(torch.zeros(2, 1, 4), number_format)
    assert torch.equal(number_format.fake_quantize(torch.zeros(2, 1, 4), alone), torch.zeros(2, 1, 4))


def test_search_shrinks_the_range(generator: torch.Generator) -> None:
    values, importance = (
        torch.randn(16, 8, 32, generator=generator) ** 3,
        torch.rand(1, 8, 32, generator=generator),
    )
    number_format = BilevelInteger(2, None, None)
    errors = []
    for search in (None, ClipSearch(num_steps=1, smallest=1.0), ClipSearch(num_steps=20, smallest=0.3)):
        fitted = Bilevel(search=search).fit(values, number_format, importance)
        errors.append(float(((number_format.fake_quantize(values, fitted) - values).square() * importance).sum()))
    assert errors[0] == errors[1]
    assert errors[2] < 0.7 * errors[0]


def test_refusals() -> None:
    with pytest.raises(
        InputError, match=r"Bilevel: row_group=16 does not divide the 24 rows of the weight; use a row"
    ):
        Bilevel().fit(torch.randn(24, 1, 8), BilevelInteger(3))
    with pytest.raises(
        UnsupportedError, match=r"Bilevel: format=.* has no statistics of two levels; use BilevelInte"
    ):
        Bilevel().check(Integer(4))
