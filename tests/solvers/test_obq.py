# SPDX-License-Identifier: Apache-2.0
"""OBQ against a plain row-by-row version, and beside the column feedback that it is the oracle of."""

import pytest
import torch
from reference_gptq import damp
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, UnsupportedError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.outliers import WeakColumns
from quattuor.scales import AbsMax, ClipSearch, Grid, MinMax
from quattuor.solvers import GPTQ, OBQ, Nearest, WeightQuantizer

CHANNEL = Grid(number_format=Integer(3, symmetric=False), granularity=PerChannel(), scales=MinMax())
CLIPPED = Grid(number_format=Integer(2), granularity=PerGroup(4), scales=ClipSearch(num_steps=10))
TENSOR = Grid(number_format=Integer(4), granularity=PerTensor(), scales=AbsMax())
every_grid = pytest.mark.parametrize("grid", [CHANNEL, CLIPPED, TENSOR], ids=["channel", "clipped", "tensor"])


def problem(num_rows: int, num_columns: int, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    mixing = torch.eye(num_columns) + 0.3 * torch.randn(num_columns, num_columns, generator=generator)
    x = (torch.randn(400, num_columns, generator=generator) @ mixing).double()
    return weight, {"hessian": x.T @ x / 400}


def plain_row(row: Tensor, hessian: Tensor, levels: list[list[float]]) -> list[float]:
    """Round one row greedily; after every weight move the free ones to their least-squares optimum.

    Args:
        row: float64 [K].
        hessian: Damped.
        levels: The numbers that each weight may take, ascending.
    """
    free, live = list(range(len(row))), row.clone()
    while free:
        inverse = torch.linalg.inv(hessian[free][:, free])
        nearest = {k: min(levels[k], key=lambda level, k=k: abs(level - float(live[k]))) for k in free}
        error = {k: abs(nearest[k] - float(live[k])) for k in free}
        gap = {k: max(b - a for a, b in zip(levels[k], levels[k][1:], strict=False)) for k in free}
        outside = [k for k in free if error[k] > gap[k] / 2 * (1 + 1e-6)]
        cheapest = min(free, key=lambda k: error[k] ** 2 / float(inverse[free.index(k), free.index(k)]))
        picked = max(outside, key=lambda k: error[k]) if outside else cheapest
        index = free.index(picked)
        shift = (float(live[picked]) - nearest[picked]) / float(inverse[index, index])
        live[free] -= shift * inverse[index]
        live[picked] = nearest[picked]
        free.remove(picked)
    return live.tolist()


@every_grid
def test_agrees_with_the_plain_algorithm(grid: Grid) -> None:
    weight, statistics = problem(6, 12)
    parameters = grid.fit(weight, statistics["hessian"].diagonal())
    lowest, highest = grid.number_format.code_range
    shape = grid.granularity.split(weight).shape
    codes = torch.arange(lowest, highest + 1).to(torch.int8 if lowest < 0 else torch.uint8)
    table = grid.number_format.decode(codes.expand(*shape[:2], -1), parameters).sort(dim=-1).values
    if isinstance(grid.granularity, PerTensor):
        table = table.expand(6, -1, -1)
    group_size = 12 // table.shape[1]
    damped = damp(statistics["hessian"], 0.01)
    expected = [
        plain_row(weight[row], damped, [table[row, k // group_size].tolist() for k in range(12)])
        for row in range(6)
    ]
    decoded = OBQ().solve(weight, grid, statistics).tensor.decode()
    assert torch.equal(decoded, torch.tensor(expected))


def test_is_about_as_good_as_column_feedback() -> None:
    # The order of rounding matters little: the claim on which GPTQ rests.
    ratios = []
    for seed in range(6):
        weight, statistics = problem(32, 48, seed=seed)
        obq = OBQ().solve(weight, CHANNEL, statistics).error
        gptq = GPTQ().solve(weight, CHANNEL, statistics).error
        assert obq < 0.6 * Nearest().solve(weight, CHANNEL, statistics).error
        ratios.append(obq / gptq)
    assert sum(ratios) / len(ratios) < 1.05


@every_grid
def test_diagonal_hessian_is_rounding_to_nearest(grid: Grid) -> None:
    weight, _ = problem(6, 12)
    statistics = {"hessian": (torch.rand(12, generator=torch.Generator().manual_seed(3)).double() + 0.1).diag()}
    solved = OBQ().solve(weight, grid, statistics)
    rounded = Nearest(weighted=True).solve(weight, grid, statistics)
    assert torch.equal(solved.tensor.codes, rounded.tensor.codes)


def test_dead_columns() -> None:
    weight, statistics = problem(6, 12)
    hessian = statistics["hessian"].clone()
    hessian[5] = hessian[:, 5] = 0
    solution = OBQ().solve(weight, CHANNEL, {"hessian": hessian})
    assert (solution.tensor.decode()[:, 5] == 0).all()
    assert solution.notes == ("1 dead input columns set to zero",)


def test_refusals() -> None:
    weight, statistics = problem(2, 12)
    with pytest.raises(UnsupportedError, match=r"OBQ: in_features=260 is above 256.*; use GPTQ\(\)"):
        OBQ().solve(torch.zeros(2, 260), CHANNEL, {"hessian": torch.eye(260)})
    with pytest.raises(InputError, match=r"OBQ: damping=0.0 is out of range; use damping > 0"):
        OBQ(damping=0.0)
    with pytest.raises(CalibrationError, match=r"OBQ: hessian=.* is not positive definite with damping=0.01"):
        OBQ().solve(weight, CHANNEL, {"hessian": statistics["hessian"] - 100 * torch.eye(12)})
    with pytest.raises(CalibrationError, match=r"OBQ: hessian=.* is not positive definite"):
        OBQ().solve(weight, CHANNEL, {"hessian": torch.zeros(12, 12)})
    with pytest.raises(UnsupportedError, match=r"cannot be kept by OBQ: OBQ rounds every entry"):
        WeightQuantizer(
            number_format=Integer(3, symmetric=False),
            granularity=PerChannel(),
            scales=MinMax(),
            solver=OBQ(),
            outliers=WeakColumns(num_columns=1),
        )
