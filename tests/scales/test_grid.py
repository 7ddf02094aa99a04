# SPDX-License-Identifier: Apache-2.0
"""Grid and round_scale: where importance goes, which weights have no scale, what is stored."""

import pytest
import torch

import quattuor.scales.base
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, ClipSearch, Grid, TwoLevel
from quattuor.scales.base import round_scale


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_importance_belongs_to_columns(
    granularity: Granularity, num_rows: int, generator: torch.Generator
) -> None:
    weight = torch.randn(num_rows, 8, generator=generator)
    importance = torch.rand(8, generator=generator) ** 4
    search = ClipSearch(num_steps=40)
    grid = Grid(number_format=Integer(3), granularity=granularity, scales=search)
    parameters = grid.fit(weight, importance)
    # The same importance written out for every element.
    everywhere = granularity.split(importance.repeat(num_rows, 1))
    expected = search.fit(granularity.split(weight), Integer(3), everywhere)
    assert torch.equal(parameters["scale"], expected["scale"])
    assert not torch.equal(grid.fit(weight)["scale"], parameters["scale"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_without_a_scale(bad: float) -> None:
    weight = torch.ones(2, 4)
    weight[1, 3] = bad
    grid = Grid(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax())
    with pytest.raises(
        InputError, match=r"not finite=1 leave a matrix \(2, 4\) without a scale; repair the model"
    ):
        grid.fit(weight)


def test_rule_and_format_must_fit_each_other() -> None:
    with pytest.raises(UnsupportedError, match=r"is not a uniform integer"):
        Grid(number_format=TwoLevelInteger(4), granularity=PerGroup(4), scales=AbsMax())
    with pytest.raises(UnsupportedError, match=r"use integer=False"):
        Grid(number_format=TwoLevelInteger(8), granularity=PerGroup(4), scales=TwoLevel())


def test_round_scale_keeps_sign_and_leaves_zero() -> None:
    scale = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 0.3, -0.3])
    assert round_scale(scale, "float32").tolist() == pytest.approx([1, 1, 1e-30, -1e-30, 0.3, -0.3])
    half = round_scale(scale, "float16")
    assert half.dtype == torch.float16
    assert half.tolist() == pytest.approx([1, 1, 2**-24, -(2**-24), 0.3, -0.3], rel=1e-3)
    assert (half != 0).all()


def test_round_scale_refuses_overflow() -> None:
    assert round_scale(torch.tensor([65504.0]), "float16").item() == 65504
    with pytest.raises(UnsupportedError, match=r"scale=70000.0 is beyond the range of float16"):
        round_scale(torch.tensor([1.0, -70000.0]), "float16")


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(4)], ids=str)
def test_rows_fitted_in_pieces_are_the_same(
    granularity: Granularity, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(7, 8, generator=generator)
    importance = torch.rand(8, generator=generator)
    grid = Grid(
        number_format=Integer(3, symmetric=False), granularity=granularity, scales=ClipSearch(num_steps=20)
    )
    whole = grid.fit(weight, importance)
    for elements in (1, 16, 24):
        monkeypatch.setattr(quattuor.scales.base, "CACHED_ELEMENTS", elements)
        pieces = grid.fit(weight, importance)
        assert all(torch.equal(pieces[name], whole[name]) for name in whole)
