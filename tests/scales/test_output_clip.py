# SPDX-License-Identifier: Apache-2.0
"""OutputClip against a search written from its formula, one group at a time (2306.00978)."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, UnsupportedError
from quattuor.formats import Integer, MidRise, TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, Grid, MinMax, OutputClip, TwoLevel
from quattuor.scales.base import ScaleRule

ASYMMETRIC = Integer(3, symmetric=False)


def problem(num_columns: int = 32, *, num_tokens: int = 100) -> tuple[Tensor, Tensor]:
    """Return a heavy-tailed weight, which clipping serves, and inputs with correlated channels."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, num_columns, generator=generator).pow(3)
    mixing = torch.eye(num_columns) + 0.3 * torch.randn(num_columns, num_columns, generator=generator)
    return weight, torch.randn(num_tokens, num_columns, generator=generator) @ mixing


def group_errors(weight: Tensor, inputs: Tensor, granularity: Granularity, rule: ScaleRule) -> Tensor:
    """Return the mean squared output error of each row and group under a rule."""
    values = granularity.split(weight)
    rounded = ASYMMETRIC.fake_quantize(values, rule.fit(values, ASYMMETRIC))
    x = inputs.unflatten(1, values.shape[1:])
    return torch.einsum("tgs,rgs->trg", x, rounded - values).square().mean(dim=0)


@pytest.mark.parametrize("granularity", [PerGroup(8), PerChannel()], ids=str)
@pytest.mark.parametrize("num_tokens", [5, 100])
def test_search_agrees_with_brute_force(granularity: Granularity, num_tokens: int) -> None:
    weight, inputs = problem(num_tokens=num_tokens)
    rule = OutputClip(inner=MinMax(include_zero=False))
    values = granularity.split(weight)
    x = inputs.unflatten(1, values.shape[1:])
    found = rule.given({"inputs": inputs}, granularity).fit(values, ASYMMETRIC)
    for row in range(values.shape[0]):
        for group in range(values.shape[1]):
            w = values[row : row + 1, group : group + 1]
            errors, scales = [], []
            for step in range(10):
                limit = (1 - step / 20) * float(w.abs().max())
                parameters = MinMax(include_zero=False).fit(w.clamp(-limit, limit), ASYMMETRIC)
                change = (ASYMMETRIC.fake_quantize(w, parameters) - w).flatten()
                errors.append(float((x[:, group] @ change).square().mean()))
                scales.append(parameters["scale"])
            best = min(errors)
            chosen = next(i for i, scale in enumerate(scales) if scale == found["scale"][row, group])
            assert errors[chosen] <= best * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("granularity", [PerGroup(8), PerChannel()], ids=str)
def test_no_group_is_worse_than_unclipped_and_most_are_better(granularity: Granularity) -> None:
    weight, inputs = problem()
    rule = OutputClip()
    assert rule.fractions()[0] == 1
    plain = group_errors(weight, inputs, granularity, rule.inner)
    clipped = group_errors(weight, inputs, granularity, rule.given({"inputs": inputs}, granularity))
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < 0.97 * plain.sum()


def test_fractions_are_those_of_the_authors() -> None:
    assert OutputClip().fractions() == pytest.approx([1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55])
    assert OutputClip(num_steps=1).fractions() == [1.0]


def test_importance_zero_leaves_entries_out_of_the_range() -> None:
    weight, inputs = problem(8)
    weight[:, 3] = 1000.0
    importance = torch.ones(8)
    importance[3] = 0
    rule = OutputClip(num_steps=1).given({"inputs": inputs}, PerChannel())
    grid = Grid(number_format=ASYMMETRIC, granularity=PerChannel(), scales=rule)
    assert (grid.fit(weight, importance)["scale"] < grid.fit(weight)["scale"] / 5).all()


def test_grid_hands_statistics_to_the_rule() -> None:
    weight, inputs = problem()
    grid = Grid(number_format=ASYMMETRIC, granularity=PerGroup(8), scales=OutputClip())
    given = grid.given({"inputs": inputs})
    expected = OutputClip().given({"inputs": inputs}, PerGroup(8)).fit(PerGroup(8).split(weight), ASYMMETRIC)
    assert torch.equal(given.fit(weight)["scale"], expected["scale"])
    plain = Grid(number_format=ASYMMETRIC, granularity=PerGroup(8), scales=MinMax())
    assert plain.given({}) == plain


def test_what_cannot_be_searched_is_refused() -> None:
    weight, inputs = problem()
    with pytest.raises(InputError, match=r"OutputClip.fit: inputs=None were not given"):
        Grid(number_format=ASYMMETRIC, granularity=PerGroup(8), scales=OutputClip()).fit(weight)
    with pytest.raises(UnsupportedError, match=r"OutputClip: groups=\(1, 1, 384\) are not the 1 groups of 32"):
        Grid(number_format=ASYMMETRIC, granularity=PerTensor(), scales=OutputClip()).given({"inputs": inputs}).fit(
            weight
        )
    with pytest.raises(CalibrationError, match=r"OutputClip: inputs=\(0, 32\) hold no finite sample"):
        OutputClip().given({"inputs": inputs[:0]}, PerChannel())
    with pytest.raises(CalibrationError, match="hold no finite sample"):
        OutputClip().given({"inputs": inputs * torch.inf}, PerChannel())
    with pytest.raises(UnsupportedError, match="MinMax: format="):
        OutputClip().check(Integer(4))
    with pytest.raises(UnsupportedError, match="AbsMax: format="):
        OutputClip(inner=AbsMax()).check(MidRise(2))
    for options in ({"num_steps": 0}, {"max_shrink": 0.0}, {"max_shrink": 1.5}):
        with pytest.raises(InputError, match=r"OutputClip: num_steps, max_shrink=.* do not describe a search"):
            OutputClip(**options)


def test_rules_that_tie_groups_are_refused() -> None:
    if not TwoLevel().couples_groups:
        pytest.fail("TwoLevel shares a channel scale over the groups of a row")
    with pytest.raises(UnsupportedError, match=r"OutputClip: inner=.* ties the groups of a row together"):
        OutputClip(inner=TwoLevel()).check(TwoLevelInteger(4))
