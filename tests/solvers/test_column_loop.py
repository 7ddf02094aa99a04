# SPDX-License-Identifier: Apache-2.0
"""Groups that are fitted while rounding, columns and entries that are kept: against plain float64 algorithms."""

import math

import pytest
import torch
from reference_gptq import damp
from reference_spqr import spqr
from torch import Tensor

from quattuor.deltas import ColumnDelta, ElementDelta
from quattuor.errors import InputError
from quattuor.formats import BilevelInteger, Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.outliers import ErrorThreshold, OutlierRule, Selection, WeakColumns
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales import AbsMax, Bilevel, ClipSearch, Grid, MinMax
from quattuor.solvers import GPTQ, Nearest

CHANNEL = Grid(number_format=Integer(3, symmetric=False), granularity=PerChannel(), scales=MinMax())
GROUPS = Grid(number_format=Integer(3, symmetric=False), granularity=PerGroup(8), scales=MinMax())
SIGNED = Grid(number_format=Integer(3), granularity=PerGroup(8), scales=AbsMax(choose_sign=True))
SEARCHED = Grid(number_format=Integer(4), granularity=PerGroup(4), scales=ClipSearch(num_steps=5))
GRIDS = {"asymmetric": GROUPS, "signed": SIGNED, "searched": SEARCHED}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


def problem(num_rows: int = 16, num_columns: int = 32, *, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weight and the Hessian of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    mixing = torch.eye(num_columns) + 0.3 * torch.randn(num_columns, num_columns, generator=generator)
    x = (torch.randn(500, num_columns, generator=generator) @ mixing).double()
    x *= torch.exp(0.5 * torch.randn(num_columns, generator=generator))
    return weight, {"hessian": x.T @ x / 500}


class Fixed(OutlierRule):
    """A rule that is told what to select."""

    def __init__(self, *, columns: Tensor | None = None, elements: Tensor | None = None) -> None:
        """Keep the selection."""
        self.selection = Selection(columns=columns, elements=elements)

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def select(self, weight: Tensor, grid: Grid, statistics: object) -> Selection:
        """Return it."""
        return self.selection


def loss_of(weight: Tensor, tensor: QuantizedTensor, damped: Tensor) -> float:
    """Return tr(D H D^T)."""
    difference = weight - tensor.decode().double()
    return float((difference @ damped * difference).sum())


def plain_groups(
    weight: Tensor, hessian: Tensor, grid: Grid, *, block: int = 1, weak: tuple[int, ...] = ()
) -> tuple[Tensor, float]:
    """Column feedback in natural order with one inverse per column; a group is fitted at its first column.

    Args:
        weight: float64.
        hessian: Not damped.
        grid: Groups are runs of columns.
        block: Fit to the weight as it was when the block of so many columns began (more than 1: the authors'
            code).
        weak: Columns that are never rounded.

    Returns:
        The weight in the end, and the sum of the losses of its rounded columns.
    """
    group_size = weight.shape[1] // grid.granularity.num_groups(weight.shape[1])
    order = [k for k in range(weight.shape[1]) if k not in weak] + list(weak)
    damped, live, final, fitted, loss = damp(hessian, 0.01), weight.clone(), weight.clone(), {}, 0.0
    for position, k in enumerate(order[: len(order) - len(weak)]):
        group = k // group_size
        if position % block == 0:
            snapshot = live.clone()
        if group not in fitted:
            members = [j for j in range(group * group_size, (group + 1) * group_size) if j not in weak]
            importance = hessian.diagonal()[members].view(1, 1, -1)
            fitted[group] = grid.scales.fit(snapshot[:, members][:, None], grid.number_format, importance)
        codes = grid.number_format.encode(live[:, k, None, None], fitted[group])
        final[:, k] = grid.number_format.decode(codes, fitted[group]).view(-1)
        free = order[position:]
        inverse = torch.linalg.inv(damped[free][:, free])
        loss += float((live[:, k] - final[:, k]).square().sum() / inverse[0, 0])
        live[:, free] -= torch.outer((live[:, k] - final[:, k]) / inverse[0, 0], inverse[0])
    final[:, list(weak)] = live[:, list(weak)]
    return final, loss


@every_grid
@pytest.mark.parametrize("column_block", [1, 3, 8, 16, 128])
def test_fresh_groups_agree_with_the_plain_algorithm(grid: Grid, column_block: int) -> None:
    weight, statistics = problem()
    expected, loss = plain_groups(weight, statistics["hessian"], grid)
    solver = GPTQ(order="natural", groups="fresh", column_block=column_block)
    tensor = solver.solve(weight, grid, statistics).tensor
    assert torch.equal(tensor.decode().double(), expected)
    assert tensor.input_map is None
    assert loss_of(weight, tensor, damp(statistics["hessian"], 0.01)) == pytest.approx(loss, rel=1e-9)


@every_grid
@pytest.mark.parametrize("column_block", [6, 8, 12, 32])
def test_stale_groups_miss_the_errors_of_their_block(grid: Grid, column_block: int) -> None:
    weight, statistics = problem()
    expected, _ = plain_groups(weight, statistics["hessian"], grid, block=column_block)
    solver = GPTQ(order="natural", groups="stale", column_block=column_block)
    tensor = solver.solve(weight, grid, statistics).tensor
    assert torch.equal(tensor.decode().double(), expected)
    fresh = GPTQ(order="natural", groups="fresh").solve(weight, grid, statistics).tensor
    is_aligned = column_block == 8 and grid is not SEARCHED
    assert torch.equal(fresh.decode(), tensor.decode()) == is_aligned


@every_grid
def test_fresh_groups_in_the_order_of_activations_permute_the_input(grid: Grid) -> None:
    weight, statistics = problem()
    hessian = statistics["hessian"]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    solution = GPTQ(groups="fresh").solve(weight, grid, statistics)
    alone = GPTQ(order="natural", groups="fresh").solve(
        weight[:, order], grid, {"hessian": hessian[order][:, order]}
    )
    assert torch.equal(solution.tensor.input_map.indices.long(), order)
    assert torch.equal(solution.tensor.codes, alone.tensor.codes)
    assert torch.equal(solution.tensor.decode()[:, order], alone.tensor.decode())
    assert solution.error == pytest.approx(alone.error, rel=1e-6)
    assert not torch.equal(order, torch.arange(32))


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
def test_diagonal_hessian_is_rounding_for_every_way_to_fit(groups: str) -> None:
    weight, _ = problem()
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(3)).double() + 0.1
    statistics = {"hessian": diagonal.diag()}
    solved = GPTQ(order="natural", groups=groups).solve(weight, GROUPS, statistics)
    rounded = Nearest().solve(weight, GROUPS, statistics)
    assert torch.equal(solved.tensor.codes, rounded.tensor.codes)
    assert torch.equal(solved.tensor.decode(), rounded.tensor.decode())


def test_fresh_groups_of_one_scale_per_row_are_static_ones() -> None:
    weight, statistics = problem()
    codes = [GPTQ(groups=groups).solve(weight, CHANNEL, statistics).tensor for groups in ("static", "fresh")]
    assert torch.equal(codes[0].codes, codes[1].codes)
    assert codes[1].input_map is None


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("grid", [CHANNEL, GROUPS], ids=str)
def test_columns_that_are_kept_absorb_all_errors(grid: Grid, order: str, groups: str) -> None:
    weight, statistics = problem()
    damped = damp(statistics["hessian"], 0.01)
    weak = torch.tensor([3, 8, 9, 30])
    solver = GPTQ(order=order, groups=groups)
    tensor = solver.solve(weight, grid, statistics, Fixed(columns=weak)).tensor
    assert isinstance(tensor.delta, ColumnDelta)
    stored = weak if tensor.input_map is None else torch.arange(28, 32)
    assert torch.equal(tensor.delta.indices.long(), stored)
    assert (tensor.decode_codes()[:, stored] == 0).all()
    # The kept columns are the least-squares optimum given the rounded part, up to float16.
    gradient = (weight - tensor.decode().double()) @ damped
    rest = [k for k in range(32) if k not in weak.tolist()]
    assert gradient[:, weak].abs().max() < 2e-3 * gradient[:, rest].abs().max()
    # Adding to the codes and replacing columns are the same.
    replaced = tensor.decode_codes()
    replaced[:, stored] = tensor.delta.values.float()
    if tensor.input_map is None:
        assert torch.equal(replaced, tensor.decode())
        if order == "natural":
            plain, loss = plain_groups(weight, statistics["hessian"], grid, weak=tuple(weak.tolist()))
            if groups == "fresh" or grid is CHANNEL:
                assert torch.equal(tensor.decode()[:, rest].double(), plain[:, rest])
                assert torch.equal(tensor.decode()[:, weak], plain[:, weak].half().float())
                # Sum of all e^2 = tr(D H D^T), but for what float16 loses.
                assert loss_of(weight, tensor, damped) == pytest.approx(loss, rel=1e-4)


def test_kept_columns_do_not_stretch_the_grid() -> None:
    weight, statistics = problem()
    weak = torch.tensor([5])
    expected = GPTQ().solve(weight, GROUPS, statistics, Fixed(columns=weak)).tensor
    weight[:, 5] *= 1000
    tensor = GPTQ().solve(weight, GROUPS, statistics, Fixed(columns=weak)).tensor
    for name in ("scale", "zero_point"):
        assert torch.equal(tensor.parameters[name], expected.parameters[name])


@pytest.mark.parametrize("groups", ["static", "fresh"])
def test_keeping_all_columns_keeps_the_weight(groups: str) -> None:
    weight, statistics = problem()
    rule = WeakColumns(num_columns=32)
    solution = GPTQ(groups=groups).solve(weight, GROUPS, statistics, rule)
    assert torch.allclose(solution.tensor.decode().double(), weight, rtol=2**-11, atol=0)
    assert solution.error < 1e-7
    none = GPTQ(groups=groups).solve(weight, GROUPS, statistics, WeakColumns(num_columns=0)).tensor
    alone = GPTQ(groups=groups).solve(weight, GROUPS, statistics).tensor
    assert torch.equal(none.packed, alone.packed)
    assert none.delta is None


def test_more_columns_kept_means_less_error() -> None:
    counts = (0, 2, 4, 8, 16)
    errors = torch.zeros(len(counts))
    for seed in range(4):
        weight, statistics = problem(seed=seed)
        for index, k in enumerate(counts):
            errors[index] += GPTQ().solve(weight, CHANNEL, statistics, WeakColumns(num_columns=k)).error
    assert (errors.diff() < 0).all()


def test_kept_column_beyond_float16() -> None:
    weight, statistics = problem()
    weight[2, 7] = 1e6
    with pytest.raises(InputError, match=r"GPTQ: weight of a column that is kept=.* beyond the range of float16"):
        GPTQ().solve(weight, CHANNEL, statistics, Fixed(columns=torch.tensor([7])))


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_entries_that_are_kept_hold_what_they_held(order: str, groups: str) -> None:
    weight, statistics = problem()
    damped = damp(statistics["hessian"], 0.01)
    elements = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) < 0.05
    weight[elements] *= 30
    tensor = GPTQ(order=order, groups=groups).solve(weight, GROUPS, statistics, Fixed(elements=elements)).tensor
    assert isinstance(tensor.delta, ElementDelta)
    dense = tensor.delta.dense((16, 32)) != 0
    dense = dense if tensor.input_map is None else dense[:, tensor.input_map.indices.long().argsort()]
    assert not (dense & ~elements).any()
    # They do not stretch their group, and they cost less than if they did.
    plain = GPTQ(order=order, groups=groups).solve(weight, GROUPS, statistics).tensor
    assert loss_of(weight, tensor, damped) < 0.2 * loss_of(weight, plain, damped)


@pytest.mark.parametrize(
    "number_format", [BilevelInteger(3, None, None), BilevelInteger(2, 3, 3, row_group=8)], ids=str
)
@pytest.mark.parametrize("column_block", [1, 8, 128])
def test_threshold_agrees_with_the_plain_algorithm(number_format: BilevelInteger, column_block: int) -> None:
    weight, statistics = problem()
    weight[3, 17] = 9.0
    grid = Grid(number_format=number_format, granularity=PerGroup(8), scales=Bilevel())
    damped = damp(statistics["hessian"], 0.01)
    expected, kept, loss = spqr(weight, damped, number_format, 8, relative=0.05)
    solver = GPTQ(order="natural", groups="fresh", column_block=column_block)
    tensor = solver.solve(weight, grid, statistics, ErrorThreshold(relative=0.05)).tensor
    assert isinstance(tensor.delta, ElementDelta)
    assert torch.equal(tensor.delta.dense((16, 32)) != 0, kept)
    assert kept[3, 17]
    assert 0.005 < kept.double().mean() < 0.3
    assert torch.allclose(tensor.decode().double(), expected, rtol=0, atol=1e-6)
    assert loss_of(weight, tensor, damped) == pytest.approx(loss, rel=1e-5)


def test_threshold_without_outliers_is_the_plain_solver() -> None:
    weight, statistics = problem()
    grid = Grid(number_format=BilevelInteger(3, None, None), granularity=PerGroup(8), scales=Bilevel())
    for groups in ("static", "fresh"):
        plain = GPTQ(groups=groups).solve(weight, grid, statistics).tensor
        kept = GPTQ(groups=groups).solve(weight, grid, statistics, ErrorThreshold(relative=math.inf)).tensor
        assert torch.equal(plain.packed, kept.packed)
        assert torch.equal(plain.decode(), kept.decode())
        assert kept.delta is None


@pytest.mark.parametrize("groups", ["static", "fresh"])
def test_share_of_outliers_falls_with_the_threshold(groups: str) -> None:
    weight, statistics = problem()
    grid = Grid(number_format=BilevelInteger(3, row_group=8), granularity=PerGroup(8), scales=Bilevel())
    shares = []
    for relative in (0.0, 0.01, 0.05, 0.2, 1.0, math.inf):
        solution = GPTQ(groups=groups).solve(weight, grid, statistics, ErrorThreshold(relative=relative))
        tensor = solution.tensor
        shares.append(0.0 if tensor.delta is None else tensor.delta.values.numel() / weight.numel())
        if relative == 0:
            # What float16 loses is taken back by later columns, so single weights move by more than that.
            assert torch.allclose(tensor.decode().double(), weight, rtol=0, atol=1e-2)
            assert solution.error < 1e-7
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.98  # all but entries that are on the grid, or nearer to it than float16 can say
    assert shares[-1] == 0
    assert len(set(shares)) >= 5


def test_outliers_do_not_depend_on_the_scale_of_the_hessian() -> None:
    weight, statistics = problem()
    grid = Grid(number_format=BilevelInteger(3, row_group=8), granularity=PerGroup(8), scales=Bilevel())
    for factor in (2.0**-20, 64.0):
        first, second = (
            GPTQ(groups="fresh").solve(weight, grid, given, ErrorThreshold()).tensor
            for given in (statistics, {"hessian": statistics["hessian"] * factor})
        )
        assert torch.equal(first.packed, second.packed)
        assert torch.equal(first.delta.columns, second.delta.columns)
        assert torch.equal(first.delta.values, second.delta.values)


@pytest.mark.parametrize("groups", ["static", "fresh"])
def test_huge_weight_is_selected_and_its_group_shrinks_to_the_rest(groups: str) -> None:
    weight, statistics = problem()
    grid = Grid(number_format=BilevelInteger(3, None, None), granularity=PerGroup(8), scales=Bilevel())
    solver, rule = GPTQ(order="natural", groups=groups), ErrorThreshold(relative=1.0)
    before = solver.solve(weight, grid, statistics, rule).tensor.parameters["scale"]
    weight[4, 10] = 40.0
    tensor = solver.solve(weight, grid, statistics, rule).tensor
    assert tensor.delta.dense((16, 32))[4, 10] > 30
    assert tensor.decode()[4, 10] == pytest.approx(40, abs=2.0)
    after = tensor.parameters["scale"]
    assert after[4, 1] < 1.3 * before[4, 1]
    # Without the look at each entry's absence the group keeps its stretched range.
    simple = solver.solve(weight, grid, statistics, ErrorThreshold(relative=1.0, leave_one_out=False)).tensor
    assert simple.parameters["scale"][4, 1] > 5 * after[4, 1]


def test_outliers_and_packed_statistics_buy_more_than_plain_groups() -> None:
    # The claim of the paper at equal measured bits, under its condition: heavy tails.
    generator = torch.Generator().manual_seed(5)
    weight, statistics = problem(64, 256)
    weight[torch.rand(64, 256, generator=generator) < 0.004] *= 6
    bilevel = Grid(number_format=BilevelInteger(3), granularity=PerGroup(16), scales=Bilevel())
    spqr_solution = GPTQ(groups="fresh").solve(weight, bilevel, statistics, ErrorThreshold(relative=1.0))
    bits = spqr_solution.tensor.bits_per_weight
    plain = Grid(number_format=Integer(3, symmetric=False), granularity=PerGroup(32), scales=MinMax())
    gptq_solution = GPTQ(groups="fresh").solve(weight, plain, statistics)
    assert bits < 1.02 * gptq_solution.tensor.bits_per_weight
    assert spqr_solution.error < 0.6 * gptq_solution.error


def test_dead_columns_do_not_disturb_outliers() -> None:
    weight, statistics = problem()
    hessian = statistics["hessian"].clone()
    hessian[[4, 20]] = hessian[:, [4, 20]] = 0
    grid = Grid(number_format=BilevelInteger(3, row_group=8), granularity=PerGroup(8), scales=Bilevel())
    solution = GPTQ(groups="fresh").solve(weight, grid, {"hessian": hessian}, ErrorThreshold())
    assert solution.notes == ("2 dead input columns set to zero",)
    assert solution.error < 0.02
    assert torch.isfinite(solution.tensor.decode()).all()
