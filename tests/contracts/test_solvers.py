# SPDX-License-Identifier: Apache-2.0
"""What every solver promises on every format and granularity. A new solver is a row of `SOLVERS`."""

import itertools

import pytest
import torch
from torch import Tensor

from quattuor.errors import UnsupportedError
from quattuor.formats import Integer, MidRise, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, ClipSearch, Grid, RootMeanSquare, TwoLevel
from quattuor.solvers import (
    GPTQ,
    OBQ,
    CoordinateDescent,
    Nearest,
    Solver,
    TargetCorrection,
    hessian_error,
)

QUICK = ClipSearch(num_steps=5, smallest=0.6)

SOLVERS: dict[str, Solver] = {
    "Nearest": Nearest(),
    "Nearest weighted": Nearest(weighted=True),
    "GPTQ": GPTQ(),
    "GPTQ natural": GPTQ(order="natural", column_block=5),
    "CoordinateDescent": CoordinateDescent(),
    "CoordinateDescent from Nearest": CoordinateDescent(start=Nearest(), num_passes=1),
    "TargetCorrection": TargetCorrection(),
    "GPTQ fresh": GPTQ(groups="fresh"),
    "GPTQ fresh natural": GPTQ(order="natural", groups="fresh", column_block=5),
    "OBQ": OBQ(),
}
GRIDS: dict[str, Grid] = {
    f"{kind} {granularity}": Grid(number_format=number_format, granularity=granularity, scales=rule)
    for (kind, number_format, rule), granularity in itertools.product(
        (
            ("symmetric", Integer(4), AbsMax()),
            ("signed", Integer(3), AbsMax(choose_sign=True)),
            ("asymmetric", Integer(4, symmetric=False), AbsMax(scale_dtype="float16")),
            ("mid-rise", MidRise(4), RootMeanSquare()),
            ("two level", TwoLevelInteger(4), TwoLevel(inner=QUICK)),
            ("two level half", TwoLevelInteger(5), TwoLevel(inner=QUICK, integer=False)),
        ),
        (PerTensor(), PerChannel(), PerGroup(8)),
    )
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def can_fit(solver: Solver, grid: Grid) -> bool:
    """Tell whether groups that are fitted while rounding exist on the grid."""
    is_apart = isinstance(solver, GPTQ) and solver.groups != "static" and isinstance(grid.granularity, PerGroup)
    return not (is_apart and grid.scales.couples_groups)


def make_problem(num_rows: int, num_columns: int) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    mixing = torch.eye(num_columns) + 0.5 * torch.randn(num_columns, num_columns, generator=generator)
    x = torch.randn(400, num_columns, generator=generator) @ mixing
    hessian = x.T @ x / 400
    return weight, {"hessian": hessian, "cross": hessian.clone()}


@every_grid
@every_solver
def test_grid_error_and_purity(solver: Solver, grid: Grid) -> None:
    weight, statistics = make_problem(16, 24)
    if not can_fit(solver, grid):
        with pytest.raises(UnsupportedError, match=r"fits one group at a time"):
            solver.solve(weight, grid, statistics)
        return
    kept = weight.clone(), {name: tensor.clone() for name, tensor in statistics.items()}
    solution = solver.solve(weight, grid, {name: statistics[name] for name in solver.needs})
    tensor = solution.tensor
    assert tensor.shape == (16, 24)
    assert tensor.number_format == grid.number_format
    assert tensor.granularity == grid.granularity
    assert solution.notes == ()
    # Codes are legal, and the decoded weight is a fixed point of the grid.
    lowest, highest = grid.number_format.code_range
    assert int(tensor.codes.min()) >= lowest
    assert int(tensor.codes.max()) <= highest
    values = grid.granularity.split(tensor.decode_codes())
    assert torch.equal(grid.number_format.fake_quantize(values, tensor.parameters), values)
    # The reported error is the one its definition gives.
    hessian = statistics["hessian"] if "hessian" in solver.needs else None
    assert solution.error == pytest.approx(hessian_error(weight, tensor.decode(), hessian), rel=1e-5)
    assert 0 < solution.error < 0.1
    # Nothing that was given has changed.
    assert torch.equal(weight, kept[0])
    assert all(torch.equal(statistics[name], kept[1][name]) for name in statistics)


@pytest.mark.parametrize("granularity", ["PerChannel()", "PerGroup(group_size=8)"])
@pytest.mark.parametrize("name", ["GPTQ", "GPTQ natural", "CoordinateDescent", "TargetCorrection"])
def test_beats_nearest_in_the_hessian_norm(name: str, granularity: str) -> None:
    weight, statistics = make_problem(32, 48)
    for kind in ("symmetric", "asymmetric", "two level"):
        grid = GRIDS[f"{kind} {granularity}"]
        rounded = Nearest(weighted=True).solve(weight, grid, statistics)
        assert SOLVERS[name].solve(weight, grid, statistics).error < 0.8 * rounded.error


@every_solver
def test_same_input_same_bytes(solver: Solver) -> None:
    weight, statistics = make_problem(8, 16)
    grid = GRIDS["symmetric PerGroup(group_size=8)"]
    first, second = (solver.solve(weight, grid, statistics).tensor.packed for _ in range(2))
    assert torch.equal(first, second)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_the_weight(solver: Solver, dtype: torch.dtype) -> None:
    weight, statistics = make_problem(8, 16)
    grid = GRIDS["symmetric PerChannel()"]
    solution = solver.solve(weight.to(dtype), grid, statistics)
    exact = solver.solve(weight.to(dtype).float(), grid, statistics)
    assert (solution.tensor.codes != exact.tensor.codes).float().mean() <= (0.02 if dtype == torch.float64 else 0)
    assert solution.error == pytest.approx(exact.error, rel=0.05)


@every_solver
def test_rows_do_not_interact(solver: Solver) -> None:
    weight, statistics = make_problem(8, 16)
    grid = GRIDS["signed PerGroup(group_size=8)"]
    codes = solver.solve(weight, grid, statistics).tensor.codes
    flipped = solver.solve(weight.flip(0), grid, statistics).tensor.codes
    assert torch.equal(flipped.flip(0), codes)


@every_solver
def test_a_weight_of_zeros(solver: Solver) -> None:
    _, statistics = make_problem(4, 16)
    for grid in (GRIDS["asymmetric PerGroup(group_size=8)"], GRIDS["two level PerGroup(group_size=8)"]):
        if not can_fit(solver, grid):
            continue
        solution = solver.solve(torch.zeros(4, 16), grid, statistics)
        assert torch.equal(solution.tensor.decode(), torch.zeros(4, 16))
        assert solution.error == 0


@every_solver
@pytest.mark.parametrize("shape", [(1, 8), (3, 1), (1, 1)])
def test_smallest_shapes(solver: Solver, shape: tuple[int, int]) -> None:
    weight, statistics = make_problem(*shape)
    solution = solver.solve(weight, GRIDS["symmetric PerChannel()"], statistics)
    assert solution.tensor.shape == shape
    assert solution.error < 0.05
