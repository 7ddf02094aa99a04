# SPDX-License-Identifier: Apache-2.0
"""Nearest: every weight on its nearest number, and what the importance may change."""

import pytest
import torch

from quattuor.errors import CalibrationError, InputError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, ClipSearch, Grid
from quattuor.solvers import Nearest, hessian_error

GRID = Grid(number_format=Integer(3), granularity=PerGroup(8), scales=ClipSearch(num_steps=20))


def test_every_weight_is_on_its_nearest_number(generator: torch.Generator) -> None:
    weight = torch.randn(5, 16, generator=generator)
    tensor = Nearest().solve(weight, GRID, {}).tensor
    scale = GRID.fit(weight)["scale"]
    for row in range(5):
        for column in range(16):
            numbers = [code * float(scale[row, column // 8]) for code in range(-4, 4)]
            nearest = min(numbers, key=lambda number: abs(number - float(weight[row, column])))
            assert tensor.decode()[row, column].item() == pytest.approx(nearest, rel=1e-6)


def test_error_by_hand() -> None:
    grid = Grid(number_format=Integer(4), granularity=PerTensor(), scales=AbsMax())
    weight = torch.tensor([[7.0, 1.25], [0.0, -2.5]])
    solution = Nearest().solve(weight, grid, {})
    assert solution.tensor.decode().tolist() == [[7, 1], [0, -2]]
    assert solution.error == pytest.approx((0.25**2 + 0.5**2) / (49 + 1.25**2 + 2.5**2))
    assert solution.notes == ()
    # H = diag(4, 0): the second input carries nothing.
    weighted = Nearest(weighted=True).solve(weight, grid, {"hessian": torch.tensor([[4.0, 0.0], [0.0, 0.0]])})
    assert weighted.error == 0


def test_importance_changes_only_the_scales(generator: torch.Generator) -> None:
    weight = torch.randn(5, 16, generator=generator)
    hessian = torch.rand(16, generator=generator).pow(6).diag()
    weighted = Nearest(weighted=True).solve(weight, GRID, {"hessian": hessian})
    plain = Nearest().solve(weight, GRID, {"hessian": hessian})  # not needed, so not looked at
    assert torch.equal(weighted.tensor.parameters["scale"], GRID.fit(weight, hessian.diagonal())["scale"])
    assert torch.equal(plain.tensor.parameters["scale"], GRID.fit(weight)["scale"])
    assert weighted.error < hessian_error(weight, plain.tensor.decode(), hessian)
    assert plain.error == hessian_error(weight, plain.tensor.decode(), None)


def test_hessian_error_is_a_ratio_of_output_energies(generator: torch.Generator) -> None:
    weight, other = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    outputs, difference = x @ weight.T, x @ (weight - other).T
    expected = float(difference.square().sum() / outputs.square().sum())
    assert hessian_error(weight, other, x.T @ x / 50) == pytest.approx(expected, rel=1e-12)
    assert hessian_error(torch.zeros(2, 2), torch.ones(2, 2), None) == 0


def test_needs() -> None:
    assert Nearest().needs == frozenset()
    assert Nearest(weighted=True).needs == {"hessian"}
    grid = Grid(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax())
    with pytest.raises(InputError, match=r"Nearest: hessian=missing is not the \[8, 8\]"):
        Nearest(weighted=True).solve(torch.ones(2, 8), grid, {})
    with pytest.raises(CalibrationError, match=r"Nearest: hessian=64 entries are NaN or infinite"):
        Nearest(weighted=True).solve(torch.ones(2, 8), grid, {"hessian": torch.full((8, 8), torch.nan)})
