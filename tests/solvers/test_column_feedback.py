# SPDX-License-Identifier: Apache-2.0
"""GPTQ against an independent float64 implementation, its exact identities, and the claim of its paper."""

import hashlib
from dataclasses import replace

import pytest
import torch
from reference_gptq import column_feedback, damp
from reference_ldlq import ldlq
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, UnsupportedError
from quattuor.formats import Format, Integer, TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.scales import AbsMax, ClipSearch, Grid, TwoLevel
from quattuor.solvers import GPTQ, Nearest, Solver, hessian_error

TWO_LEVEL = TwoLevel(inner=ClipSearch(num_steps=5, smallest=0.6))
GRIDS = {
    "channel": Grid(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax()),
    "group": Grid(number_format=Integer(3), granularity=PerGroup(8), scales=AbsMax(choose_sign=True)),
    "asymmetric": Grid(number_format=Integer(4, symmetric=False), granularity=PerGroup(16), scales=AbsMax()),
    "float16": Grid(number_format=Integer(4), granularity=PerGroup(8), scales=AbsMax(scale_dtype="float16")),
    "tensor": Grid(number_format=Integer(5), granularity=PerTensor(), scales=AbsMax()),
    "clip": Grid(number_format=Integer(4), granularity=PerChannel(), scales=ClipSearch(num_steps=10)),
    "two level": Grid(number_format=TwoLevelInteger(4), granularity=PerGroup(8), scales=TWO_LEVEL),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def problem(
    num_rows: int = 12, num_columns: int = 32, *, tokens: int = 400, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight and the Hessian of correlated inputs with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator)
    mixing = torch.eye(num_columns) + 0.4 * torch.randn(num_columns, num_columns, generator=generator)
    x = torch.randn(tokens, num_columns, generator=generator) @ mixing
    x *= torch.exp(0.5 * torch.randn(num_columns, generator=generator))
    return weight, {"hessian": x.T @ x / tokens}


def nearest_on(grid: Grid, weight: Tensor, hessian: Tensor):
    """Return the rounding of one column on the grid that the solver will use."""
    parameters = grid.fit(weight, hessian.diagonal())
    group_size = weight.shape[1] // grid.granularity.num_groups(weight.shape[1])

    def round_column(values: Tensor, column: int) -> Tensor:
        group = parameters.group(column // group_size)
        codes = grid.number_format.encode(values.to(weight.dtype)[:, None, None], group)
        return grid.number_format.decode(codes, group).view(-1)

    return round_column


@every_grid
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_agrees_with_the_plain_algorithm(grid: Grid, order: str) -> None:
    weight, statistics = problem()
    hessian = statistics["hessian"]
    columns = list(range(32))
    if order == "activation":
        columns = sorted(columns, key=lambda k: -float(hessian[k, k]))
    assert order == "natural" or columns != list(range(32))
    damped = damp(hessian, 0.01)
    expected, loss = column_feedback(weight, damped, columns, nearest_on(grid, weight, hessian))
    solution = GPTQ(order=order, column_block=8).solve(weight, grid, statistics)
    decoded = solution.tensor.decode().double()
    assert torch.equal(decoded, expected)
    # The sum of squared errors is the whole output error: tr(D H D^T), on the damped Hessian.
    difference = weight.double() - decoded
    assert float((difference @ damped * difference).sum()) == pytest.approx(loss, rel=1e-10)
    total = float((weight.double() @ hessian.double() * weight.double()).sum())
    plain = float((difference @ hessian.double() * difference).sum())
    assert solution.error == pytest.approx(plain / total, rel=1e-4)


@every_grid
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_diagonal_hessian_is_rounding_to_nearest(grid: Grid, order: str) -> None:
    weight, _ = problem()
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.1
    statistics = {"hessian": diagonal.diag()}
    solved = GPTQ(order=order).solve(weight, grid, statistics)
    rounded = Nearest(weighted=True).solve(weight, grid, statistics)
    assert torch.equal(solved.tensor.codes, rounded.tensor.codes)
    assert torch.equal(solved.tensor.decode(), rounded.tensor.decode())


@every_grid
def test_column_block_changes_nothing(grid: Grid) -> None:
    weight, statistics = problem(num_columns=48)
    codes = [GPTQ(column_block=block).solve(weight, grid, statistics).tensor.codes for block in (1, 7, 48, 128)]
    for other in codes[1:]:
        assert torch.equal(codes[0], other)


@pytest.mark.parametrize("grid", [GRIDS["channel"], GRIDS["group"], GRIDS["two level"]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_worse_in_weights_and_better_in_outputs(grid: Grid, seed: int) -> None:
    weight, statistics = problem(num_rows=32, num_columns=64, seed=seed)

    def errors(solver: Solver) -> tuple[float, float]:
        decoded = solver.solve(weight, grid, statistics).tensor.decode()
        return hessian_error(weight, decoded, None), hessian_error(weight, decoded, statistics["hessian"])

    (solved_weight, solved_output), (rounded_weight, rounded_output) = (
        errors(GPTQ()),
        errors(Nearest(weighted=True)),
    )
    assert solved_weight > 1.1 * rounded_weight
    assert solved_output < 0.7 * rounded_output


@pytest.mark.parametrize("name", ["channel", "group", "asymmetric", "tensor"])
def test_weights_on_the_grid_stay(name: str) -> None:
    # Rules whose second fit finds the same grid: those that read the extremes and round nothing afterwards.
    grid = GRIDS[name]
    weight, statistics = problem()
    on_grid = Nearest(weighted=True).solve(weight, grid, statistics).tensor
    again = GPTQ().solve(on_grid.decode(), grid, statistics)
    assert torch.allclose(again.tensor.decode(), on_grid.decode(), rtol=1e-5, atol=1e-6)
    assert again.error < 1e-9


@every_grid
def test_codes_come_back_in_the_original_order(grid: Grid) -> None:
    # Permuting the inputs within each group permutes the codes: static groups keep their columns.
    weight, statistics = problem()
    hessian = statistics["hessian"]
    within = torch.cat(
        [start + torch.randperm(8, generator=torch.Generator().manual_seed(start)) for start in range(0, 32, 8)]
    )
    solved = GPTQ().solve(weight, grid, statistics).tensor.codes
    permuted = GPTQ().solve(weight[:, within], grid, {"hessian": hessian[within][:, within]}).tensor.codes
    assert torch.equal(permuted, solved[:, within])


def test_hessian_scale_is_irrelevant() -> None:
    weight, statistics = problem()
    statistics["hessian"][5] = statistics["hessian"][:, 5] = 0  # one dead column must not change that
    small = {"hessian": statistics["hessian"] * 2.0**-20}
    first, second = (GPTQ().solve(weight, GRIDS["group"], given) for given in (statistics, small))
    assert torch.equal(first.tensor.codes, second.tensor.codes)


def test_dead_columns_become_zero_and_are_reported() -> None:
    weight, statistics = problem()
    dead = [0, 9, 31]
    hessian = statistics["hessian"].clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight[3, 9] = 1e4  # must not widen the scale of its row
    alive = [k for k in range(32) if k not in dead]
    for grid in (GRIDS["channel"], GRIDS["asymmetric"], GRIDS["two level"]):
        solution = GPTQ().solve(weight, grid, {"hessian": hessian})
        decoded = solution.tensor.decode()
        assert (decoded[:, dead] == 0).all()
        assert solution.notes == ("3 dead input columns set to zero",)
        assert (decoded[3, alive] != 0).any()
        assert solution.error < 0.05
    # Dead columns carry no information, so the others are solved as if they were not there.
    alone = GPTQ().solve(weight[:, alive], GRIDS["channel"], {"hessian": hessian[alive][:, alive]})
    together = GPTQ().solve(weight, GRIDS["channel"], {"hessian": hessian})
    assert torch.equal(together.tensor.codes[:, alive], alone.tensor.codes)
    assert alone.notes == ()


def test_damping_is_added() -> None:
    # Fewer tokens than columns: singular without damping, solvable with it.
    weight, statistics = problem(tokens=10)
    assert GPTQ(damping=0.1).solve(weight, GRIDS["channel"], statistics).error < 0.1
    with pytest.raises(CalibrationError, match=r"not positive definite with damping=1e-12"):
        GPTQ(damping=1e-12).solve(weight, GRIDS["channel"], statistics)
    # Much damping makes the Hessian diagonal, which is rounding.
    codes = GPTQ(damping=999.0).solve(weight, GRIDS["channel"], statistics).tensor.codes
    rounded = Nearest(weighted=True).solve(weight, GRIDS["channel"], statistics).tensor.codes
    assert (codes != rounded).float().mean() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite(bad: float) -> None:
    weight, statistics = problem()
    statistics["hessian"][2, 7] = bad
    with pytest.raises(
        CalibrationError, match=r"GPTQ: hessian=1 entries are NaN or infinite; look for the first layer"
    ):
        GPTQ().solve(weight, GRIDS["channel"], statistics)


def test_hessian_that_is_not_positive_definite() -> None:
    weight, statistics = problem()
    statistics["hessian"] -= 1e3 * torch.eye(32)
    with pytest.raises(CalibrationError, match=r"GPTQ: hessian=.* is not positive definite.*raise damping to 0.1"):
        GPTQ().solve(weight, GRIDS["channel"], statistics)


def test_hessian_of_no_input() -> None:
    weight, _ = problem()
    with pytest.raises(CalibrationError, match=r"is zero: every calibration token is zero.*skip rule"):
        GPTQ().solve(weight, GRIDS["channel"], {"hessian": torch.zeros(32, 32)})


def test_hessian_of_another_layer() -> None:
    weight, _ = problem()
    with pytest.raises(InputError, match=r"GPTQ: hessian=\(16, 16\) is not the \[32, 32\] of a weight \(12, 32\)"):
        GPTQ().solve(weight, GRIDS["channel"], {"hessian": torch.eye(16)})
    with pytest.raises(InputError, match=r"GPTQ: hessian=missing is not"):
        GPTQ().solve(weight, GRIDS["channel"], {})


def test_weight_that_is_not_finite() -> None:
    weight, statistics = problem()
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"weights that are not finite=1"):
        GPTQ().solve(weight, GRIDS["channel"], statistics)


@pytest.mark.parametrize(
    "options", [{"damping": 0.0}, {"damping": float("nan")}, {"column_block": 0}], ids=lambda options: str(options)
)
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(
        InputError, match=r"GPTQ: damping, order, column_block=.* are out of range; use damping > 0"
    ):
        GPTQ(**options)


def test_order_is_checked() -> None:
    assert GPTQ().order == "activation"
    with pytest.raises(Exception, match=r"order"):
        replace(GPTQ(), order="descending")


@pytest.mark.parametrize(
    ("number_format", "granularity"), [(Integer(4), PerChannel()), (Integer(4), PerGroup(1))], ids=str
)
def test_one_column_and_one_row(number_format: Format, granularity: Granularity) -> None:
    grid = Grid(number_format=number_format, granularity=granularity, scales=AbsMax())
    one_column = GPTQ().solve(torch.tensor([[0.5], [-2.0]]), grid, {"hessian": torch.tensor([[3.0]])})
    assert one_column.tensor.decode().tolist() == [[pytest.approx(0.5)], [pytest.approx(-2.0)]]
    weight, statistics = problem(num_rows=1, num_columns=5)
    assert GPTQ().solve(weight, grid, statistics).tensor.shape == (1, 5)


# Codes before the loop learnt about fresh groups and outliers, in float64, where no machine rounds differently.
CODES = {
    ("channel", "natural"): "fe4b604629439806",
    ("channel", "activation"): "430b5d69a607a17a",
    ("group", "natural"): "d224055bd103637c",
    ("group", "activation"): "241b8029196fd645",
    ("asymmetric", "natural"): "5c16fdd7733242a1",
    ("asymmetric", "activation"): "8df6685579f6a8bf",
    ("float16", "natural"): "4508616086a3a205",
    ("float16", "activation"): "d3012740a33fa585",
    ("tensor", "natural"): "1db932252ba38a9c",
    ("tensor", "activation"): "60e80ec37fee021d",
    ("clip", "natural"): "c1afa913b48f3409",
    ("clip", "activation"): "b1377af2371d165b",
    ("two level", "natural"): "198efcc1279abcfa",
    ("two level", "activation"): "bc5e597fe72aa4c5",
}


@pytest.mark.parametrize(("name", "order"), CODES, ids=str)
def test_codes_are_those_of_the_first_version(name: str, order: str) -> None:
    weight, statistics = problem()
    hessian = statistics["hessian"].double()
    hessian[5] = hessian[:, 5] = 0
    solved = GPTQ(order=order, column_block=8).solve(weight.double(), GRIDS[name], {"hessian": hessian})
    codes = solved.tensor.codes.to(torch.int8).numpy().tobytes()
    assert hashlib.sha256(codes).hexdigest()[:16] == CODES[name, order]


@every_grid
def test_is_linear_feedback_with_the_factor_of_the_hessian(grid: Grid) -> None:
    # LDLQ goes from the last column to the first and never inverts anything: the same codes in reverse order.
    weight, statistics = problem()
    damped = damp(statistics["hessian"], 0.01)
    nearest = nearest_on(grid, weight.double(), statistics["hessian"].double())
    expected, loss = ldlq(weight.flip(1), damped.flip(0, 1), lambda values, i: nearest(values.double(), 31 - i))
    solved = GPTQ(order="natural").solve(weight.double(), grid, {"hessian": statistics["hessian"].double()})
    assert torch.equal(solved.tensor.decode().double(), expected.flip(1))
    difference = weight.double() - expected.flip(1)
    assert float((difference @ damped * difference).sum()) == pytest.approx(loss, rel=1e-10)


def test_groups_that_are_coupled_are_not_fitted_one_by_one() -> None:
    weight, statistics = problem()
    with pytest.raises(
        UnsupportedError, match=r'GPTQ: groups=fresh fits one group at a time, but TwoLevel .* groups="static"'
    ):
        GPTQ(groups="fresh").solve(weight, GRIDS["two level"], statistics)
    with pytest.raises(Exception, match=r"groups"):
        GPTQ(groups="late")
