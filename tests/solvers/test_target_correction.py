# SPDX-License-Identifier: Apache-2.0
"""TargetCorrection: the least-squares weight for changed inputs."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import CalibrationError, InputError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.outliers import WeakColumns
from quattuor.scales import AbsMax, Grid
from quattuor.solvers import GPTQ, OBQ, Nearest, TargetCorrection

GRID = Grid(number_format=Integer(8), granularity=PerChannel(), scales=AbsMax())


@pytest.fixture
def drift(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, original inputs, and inputs that earlier layers have bent."""
    weight = torch.randn(6, 16, generator=generator)
    original = torch.randn(500, 16, generator=generator)
    seen = original @ (torch.eye(16) + 0.15 * torch.randn(16, 16, generator=generator))
    return weight, original, seen


def statistics_of(original: Tensor, seen: Tensor) -> dict[str, Tensor]:
    return {"hessian": seen.T @ seen / len(seen), "cross": original.T @ seen / len(seen)}


@pytest.mark.parametrize("inner", [Nearest(), GPTQ()], ids=["Nearest", "GPTQ"])
def test_original_outputs_come_back(inner: Nearest | GPTQ, drift: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, original, seen = drift
    statistics, wanted = statistics_of(original, seen), original @ weight.T

    def output_error(solver: Nearest | GPTQ | TargetCorrection) -> float:
        decoded = solver.solve(weight, GRID, statistics).tensor.decode()
        return float((seen @ decoded.T - wanted).square().sum() / wanted.square().sum())

    plain = output_error(inner)
    full = output_error(TargetCorrection(inner=inner, damping=1e-4))
    half = output_error(TargetCorrection(inner=inner, damping=1e-4, strength=0.5))
    assert plain > 0.1
    assert full < 1e-3 * plain
    # The drift is linear, so half of the correction leaves half of the deviation.
    assert half == pytest.approx(plain / 4, rel=0.05)


def test_target_is_the_least_squares_solution(drift: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, original, seen = drift
    tensor = (
        TargetCorrection(inner=Nearest(), damping=1e-6).solve(weight, GRID, statistics_of(original, seen)).tensor
    )
    expected = torch.linalg.lstsq(seen.double(), (original @ weight.T).double()).solution.T
    assert (tensor.decode() - expected).abs().max() <= 0.51 * tensor.parameters["scale"].max()


@pytest.mark.parametrize("same", ["inputs", "strength"])
def test_nothing_to_correct(same: str, drift: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, original, seen = drift
    statistics = statistics_of(seen if same == "inputs" else original, seen)
    solver = TargetCorrection(strength=1.0 if same == "inputs" else 0.0)
    corrected, plain = (s.solve(weight, GRID, statistics) for s in (solver, GPTQ()))
    assert torch.equal(corrected.tensor.codes, plain.tensor.codes)
    assert corrected.error == pytest.approx(plain.error)


def test_refusals(drift: tuple[Tensor, Tensor, Tensor]) -> None:
    weight = drift[0]
    assert TargetCorrection().needs == {"hessian", "cross"}
    with pytest.raises(InputError, match=r"TargetCorrection: cross=missing is not the \[16, 16\]"):
        TargetCorrection().solve(weight, GRID, {"hessian": torch.eye(16)})
    with pytest.raises(CalibrationError, match=r"TargetCorrection: hessian=.* is not positive definite"):
        TargetCorrection().solve(weight, GRID, {"hessian": -torch.eye(16), "cross": torch.eye(16)})
    for options in ({"strength": 1.5}, {"strength": -0.1}, {"damping": 0.0}):
        with pytest.raises(InputError, match=r"TargetCorrection: strength, damping=.* are out of range"):
            TargetCorrection(**options)


def test_outliers_are_the_inner_solvers(drift: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, original, seen = drift
    statistics, rule = statistics_of(original, seen), WeakColumns(num_columns=16)
    solver = TargetCorrection(inner=GPTQ(), damping=1e-4)
    assert solver.reason_against(rule) is None
    assert TargetCorrection(inner=OBQ()).reason_against(rule) is not None
    assert TargetCorrection(inner=GPTQ(groups="fresh")).rows_interact
    # With all columns kept, the stored weight is the target itself, which gives the original outputs back.
    decoded = solver.solve(weight, GRID, statistics, rule).tensor.decode()
    wanted = original @ weight.T
    kept = float((seen @ decoded.T - wanted).square().sum() / wanted.square().sum())
    without = float((seen @ weight.T - wanted).square().sum() / wanted.square().sum())
    assert kept < 0.05 * without
