# SPDX-License-Identifier: Apache-2.0
"""WeightQuantizer: weights that share an input are solved together and come out as if they were alone."""

import pytest
import torch

from quattuor.errors import UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, ClipSearch, TwoLevel
from quattuor.solvers import GPTQ, CoordinateDescent, Nearest, TargetCorrection, WeightQuantizer, WeightToQuantize

SEARCH = ClipSearch(num_steps=10, smallest=0.5)
QUANTIZERS = {
    "nearest": WeightQuantizer(number_format=Integer(4), granularity=PerGroup(8), scales=AbsMax()),
    "gptq": WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=SEARCH, solver=GPTQ()),
    "two level": WeightQuantizer(
        number_format=TwoLevelInteger(4), granularity=PerGroup(8), scales=TwoLevel(inner=SEARCH), solver=GPTQ()
    ),
    "tensor": WeightQuantizer(number_format=Integer(4), granularity=PerTensor(), scales=SEARCH, solver=GPTQ()),
    "descent": WeightQuantizer(
        number_format=Integer(4), granularity=PerChannel(), scales=SEARCH, solver=CoordinateDescent()
    ),
    "target": WeightQuantizer(
        number_format=Integer(4), granularity=PerChannel(), scales=SEARCH, solver=TargetCorrection()
    ),
}


def named(weights: list[torch.Tensor]) -> list[WeightToQuantize]:
    """Give each weight the name of a linear."""
    return [WeightToQuantize(name=f"linear.{index}", weight=weight) for index, weight in enumerate(weights)]


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())
def test_together_equals_alone(quantizer: WeightQuantizer, generator: torch.Generator) -> None:
    weights = [torch.randn(rows, 32, generator=generator) * rows for rows in (8, 4, 12)]
    x = torch.randn(300, 32, generator=generator) @ (
        torch.eye(32) + 0.2 * torch.randn(32, 32, generator=generator)
    )
    original = x + 0.05 * torch.randn(300, 32, generator=generator)
    statistics = {"hessian": x.T @ x / 300, "cross": original.T @ x / 300}
    together = quantizer.solve(named(weights), statistics)
    assert len(together) == 3
    for weight, solution in zip(weights, together, strict=True):
        (alone,) = quantizer.solve(named([weight]), statistics)
        assert solution.tensor.shape == tuple(weight.shape)
        assert torch.equal(solution.tensor.packed, alone.tensor.packed)
        assert list(solution.tensor.parameters) == list(alone.tensor.parameters)
        for name, tensor in alone.tensor.parameters.items():
            # Row gains are sums over columns, whose order a matrix product may change with the number of rows.
            exact = not isinstance(quantizer.solver, CoordinateDescent)
            assert (
                torch.equal(solution.tensor.parameters[name], tensor)
                if exact
                else torch.allclose(solution.tensor.parameters[name], tensor, rtol=1e-6)
            )
        assert solution.error == pytest.approx(alone.error, rel=1e-4)
        assert 0 < solution.error < 0.1


def test_results_own_their_memory(generator: torch.Generator) -> None:
    weights = [torch.randn(4, 16, generator=generator) for _ in range(2)]
    first, second = QUANTIZERS["nearest"].solve(named(weights), {})
    assert first.tensor.packed.untyped_storage().nbytes() == first.tensor.packed.numel()
    assert first.tensor.packed.data_ptr() != second.tensor.packed.data_ptr()


def test_unneeded_statistics_do_not_change_the_error(generator: torch.Generator) -> None:
    weights = [torch.randn(4, 16, generator=generator) for _ in range(2)]
    statistics = {"hessian": torch.rand(16, generator=generator).pow(4).diag()}
    assert [s.error for s in QUANTIZERS["nearest"].solve(named(weights), statistics)] == [
        s.error for s in QUANTIZERS["nearest"].solve(named(weights), {})
    ]


def test_notes_reach_every_weight(generator: torch.Generator) -> None:
    weights = [torch.randn(4, 16, generator=generator) for _ in range(2)]
    hessian = torch.eye(16)
    hessian[3, 3] = 0
    for solution in QUANTIZERS["gptq"].solve(named(weights), {"hessian": hessian}):
        assert solution.notes == ("1 dead input columns set to zero",)


def test_parts_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(UnsupportedError, match=r"use Integer\(bits\), or TwoLevel"):
        WeightQuantizer(number_format=TwoLevelInteger(4), granularity=PerGroup(8), scales=AbsMax())
    with pytest.raises(UnsupportedError, match=r"no integer group scale exists; use integer=False"):
        WeightQuantizer(number_format=TwoLevelInteger(8), granularity=PerGroup(8), scales=TwoLevel())
    assert WeightQuantizer(number_format=Integer(4), granularity=PerGroup(8), scales=AbsMax()).solver == Nearest()
