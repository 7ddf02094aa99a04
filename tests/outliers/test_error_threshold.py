# SPDX-License-Identifier: Apache-2.0
"""Which entries spoil the range of their group, against leaving out each in turn."""

import math

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import BilevelInteger, Integer
from quattuor.outliers import ErrorThreshold


def brute_force(values: list[float], inv: list[float], j: int, num_steps: int) -> float:
    """Return the gain of leaving out entry j: grids and errors of all entries, and of all but j."""

    def error(kept: list[int]) -> float:
        low, high = min(values[i] for i in kept), max(values[i] for i in kept)
        scale = (high - low) / num_steps or 1.0
        codes = [min(max(round((values[i] - low) / scale), 0), num_steps) for i in kept]
        return sum(((code * scale + low - values[i]) * inv[i]) ** 2 for i, code in zip(kept, codes, strict=True))

    everything = list(range(len(values)))
    return error(everything) - error([i for i in everything if i != j])


@pytest.mark.parametrize("bits", [2, 3])
def test_candidates_are_those_whose_absence_gains_more_than_the_limit(
    bits: int, generator: torch.Generator
) -> None:
    values = torch.randn(12, 3, 9, generator=generator, dtype=torch.float64)
    values[0, 0, 4] = 12.0
    values[1, 1, 2] = values[1, 1, 5] = 6.0  # two equal extremes: leaving out one changes no range
    values[2, 2] = 0.5
    inv = (0.5 + torch.rand(12, 3, 9, generator=generator)).double()
    limit = torch.tensor(0.08, dtype=torch.float64)
    found = ErrorThreshold().candidates(values, inv, limit, BilevelInteger(bits))
    for row in range(12):
        for group in range(3):
            gains = [
                brute_force(values[row, group].tolist(), inv[row, group].tolist(), j, 2**bits - 1)
                for j in range(9)
            ]
            assert found[row, group].tolist() == [gain > float(limit) for gain in gains]
    assert found[0, 0, 4]
    assert not found[2, 2].any()
    assert 0.01 < found.float().mean() < 0.7


def test_limit_is_relative_to_the_mean_column(generator: torch.Generator) -> None:
    weight, sensitivity = torch.randn(40, 6, generator=generator), 0.5 + torch.rand(6, generator=generator)
    expected = sum(weight[:, j].double().var() / float(sensitivity[j]) ** 2 for j in range(6)) / 6
    assert float(ErrorThreshold(relative=0.2).limit(weight, sensitivity)) == pytest.approx(0.2 * float(expected))
    one_row = ErrorThreshold(relative=1.0).limit(weight[:1], sensitivity)
    assert float(one_row) == pytest.approx(float((weight[0] / sensitivity).square().mean()))


def test_switches(generator: torch.Generator) -> None:
    values, inv, limit = torch.randn(2, 2, 8, generator=generator), torch.ones(2, 2, 8), torch.tensor(0.0)
    assert ErrorThreshold().candidates(values, inv, limit, Integer(4)).any()
    assert not ErrorThreshold(leave_one_out=False).candidates(values, inv, limit, Integer(4)).any()
    assert not ErrorThreshold().candidates(values, inv, torch.tensor(math.inf), Integer(4)).any()
    assert ErrorThreshold().needs == {"hessian"}
    for relative in (-0.1, math.nan):
        with pytest.raises(InputError, match=r"ErrorThreshold: relative=.* is not a threshold; use 0.2"):
            ErrorThreshold(relative=relative)
