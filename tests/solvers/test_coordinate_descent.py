# SPDX-License-Identifier: Apache-2.0
"""CoordinateDescent: the error never rises, and what is left is a minimum in every single code."""

import pytest
import torch
from reference_gptq import damp
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import BilevelInteger, Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales import AbsMax, Bilevel, ClipSearch, Grid, TwoLevel
from quattuor.solvers import GPTQ, CoordinateDescent, Nearest

CHANNEL = Grid(number_format=Integer(3), granularity=PerChannel(), scales=AbsMax())
GROUP = Grid(number_format=Integer(3, symmetric=False), granularity=PerGroup(8), scales=AbsMax())
HALF = Grid(number_format=Integer(3), granularity=PerGroup(8), scales=AbsMax(scale_dtype="float16"))
LEVELS = Grid(
    number_format=TwoLevelInteger(4),
    granularity=PerGroup(8),
    scales=TwoLevel(inner=ClipSearch(num_steps=5, smallest=0.6)),
)
BILEVEL = Grid(number_format=BilevelInteger(3, row_group=4), granularity=PerGroup(8), scales=Bilevel())


@pytest.fixture
def problem(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    weight = torch.randn(8, 24, generator=generator)
    x = torch.randn(300, 24, generator=generator) @ (
        torch.eye(24) + 0.4 * torch.randn(24, 24, generator=generator)
    )
    return weight, {"hessian": x.T @ x / 300}


def damped_errors(weight: Tensor, tensor: QuantizedTensor, statistics: dict[str, Tensor]) -> Tensor:
    difference = weight.double() - tensor.decode().double()
    return (difference @ damp(statistics["hessian"], 0.01) * difference).sum(dim=1)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    "grid",
    [CHANNEL, GROUP, HALF, LEVELS, BILEVEL],
    ids=["channel", "group", "half", "levels", "bilevel"],
)
def test_the_error_of_no_row_rises(grid: Grid, refit: bool, problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    for start, gain in ((GPTQ(), 1.0), (Nearest(weighted=True), 0.8)):
        before = damped_errors(weight, start.solve(weight, grid, statistics).tensor, statistics)
        once, thrice = (
            damped_errors(weight, solver.solve(weight, grid, statistics).tensor, statistics)
            for solver in (CoordinateDescent(start=start, num_passes=n, refit=refit) for n in (1, 3))
        )
        assert (once <= before * (1 + 1e-5)).all()
        assert (thrice <= once * (1 + 1e-5)).all()
        assert once.sum() < gain * before.sum()


def test_no_single_code_can_be_improved(problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    solver = CoordinateDescent(start=Nearest(), num_passes=15, refit=False)
    tensor = solver.solve(weight, CHANNEL, statistics).tensor
    best, codes = damped_errors(weight, tensor, statistics), tensor.codes
    for column in range(24):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column] + step).clamp(-4, 3)
            changed = QuantizedTensor.from_codes(
                other, tensor.parameters, tensor.number_format, tensor.granularity
            )
            assert (damped_errors(weight, changed, statistics) >= best * (1 - 1e-6)).all()


def test_gain_is_the_least_squares_gain(problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    solution = CoordinateDescent().solve(weight, CHANNEL, statistics).tensor
    best = damped_errors(weight, solution, statistics)
    for factor in (0.999, 1.001):
        state = solution.state()
        scaled = state | {"scale": state["scale"] * factor}
        other = QuantizedTensor.from_state(scaled, CHANNEL.number_format, CHANNEL.granularity, (8, 24))
        assert (damped_errors(weight, other, statistics) > best).all()


def test_stored_float16_scales_are_not_touched(problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    tensor = CoordinateDescent().solve(weight, HALF, statistics).tensor
    assert torch.equal(tensor.parameters["scale"], HALF.fit(weight, statistics["hessian"].diagonal())["scale"])


def test_dead_column(problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    hessian = statistics["hessian"].clone()
    hessian[4] = hessian[:, 4] = 0
    solution = CoordinateDescent().solve(weight, CHANNEL, {"hessian": hessian})
    assert torch.isfinite(solution.tensor.decode()).all()
    assert solution.error < 0.1


def test_needs_and_options() -> None:
    assert CoordinateDescent(start=Nearest()).needs == {"hessian"}
    for options in ({"num_passes": 0}, {"damping": 0.0}):
        with pytest.raises(InputError, match=r"CoordinateDescent: num_passes, damping=.* are out of range; use"):
            CoordinateDescent(**options)


def test_start_with_an_order_of_its_own_is_refused(problem: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = problem
    with pytest.raises(UnsupportedError, match=r"CoordinateDescent: start=GPTQ.* in an order of its own.*natural"):
        CoordinateDescent(start=GPTQ(groups="fresh")).solve(weight, GROUP, statistics)
    fresh = GPTQ(groups="fresh", order="natural")
    before, after = (solver.solve(weight, GROUP, statistics) for solver in (fresh, CoordinateDescent(start=fresh)))
    assert after.error < before.error
    assert CoordinateDescent(start=GPTQ(groups="fresh")).rows_interact
