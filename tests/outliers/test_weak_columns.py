# SPDX-License-Identifier: Apache-2.0
"""Which columns are weak, and how a budget of bits becomes a number of them."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.outliers import WeakColumns
from quattuor.scales import Grid, MinMax

GRID = Grid(number_format=Integer(3, symmetric=False), granularity=PerChannel(), scales=MinMax())
# The linears of one block of a model with grouped queries: q, k, v, o, gate, up, down.
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def test_columns_are_those_of_largest_sensitivity(generator: torch.Generator) -> None:
    weight, x = torch.randn(12, 20, generator=generator), torch.randn(100, 20, generator=generator)
    hessian = x.T @ x / 100
    rounded = GRID.number_format.fake_quantize(weight[:, None], GRID.fit(weight))[:, 0]
    sensitivity = [float(hessian[j, j] * (weight - rounded)[:, j].square().sum()) for j in range(20)]
    expected = sorted(sorted(range(20), key=lambda j: -sensitivity[j])[:5])
    found = WeakColumns(num_columns=5).select(weight, GRID, {"hessian": hessian}).columns
    assert found.tolist() == expected
    by_hessian = (
        WeakColumns(num_columns=5, weighted_by_error=False).select(weight, GRID, {"hessian": hessian}).columns
    )
    assert by_hessian.tolist() == sorted(sorted(range(20), key=lambda j: -float(hessian[j, j]))[:5])
    assert by_hessian.tolist() != expected


def test_loud_channel_is_weak(generator: torch.Generator) -> None:
    weight, x = torch.randn(12, 20, generator=generator), torch.randn(100, 20, generator=generator)
    x[:, 13] *= 100
    for weighted in (True, False):
        rule = WeakColumns(num_columns=1, weighted_by_error=weighted)
        assert rule.select(weight, GRID, {"hessian": x.T @ x}).columns.tolist() == [13]


def test_none_and_all(generator: torch.Generator) -> None:
    weight = torch.randn(4, 6, generator=generator)
    assert WeakColumns(num_columns=0).select(weight, GRID, {"hessian": torch.eye(6)}).columns is None
    assert WeakColumns(num_columns=99).select(weight, GRID, {"hessian": torch.eye(6)}).columns.tolist() == [
        *range(6)
    ]


@pytest.mark.parametrize("target", [3.1, 3.25, 3.5])
def test_budget_of_a_model_gives_every_linear_as_many_parameters(target: float) -> None:
    rule = WeakColumns(target_bits=target).planned(SHAPES * 30, bits=3)
    counts = [rule.count(shape, 3) for shape in SHAPES]
    assert counts[1] == pytest.approx(3 * counts[0], abs=2)
    assert counts[4] == pytest.approx(counts[0] * 576 / 1536, abs=1)
    num_weights = sum(n * k for n, k in SHAPES)
    spent = sum(k * (16 * n + 32) for (n, _), k in zip(SHAPES, counts, strict=True)) / num_weights
    assert 3 + spent == pytest.approx(target, abs=0.02)


def test_budget_of_a_large_block_is_the_published_one() -> None:
    # LLaMA-7B at 3.1 bits: 54 columns for attention, 20 for gate and up, 54 for down, by a formula that counts 13
    # bits for an entry where 16 are stored; each is as many parameters as here.
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    rule = WeakColumns(target_bits=3.1).planned(shapes, bits=3)
    assert [round(rule.count(shape, 3) * 16 / 13) for shape in (shapes[0], shapes[4], shapes[6])] == [54, 20, 54]


def test_weight_on_its_own_spends_its_own_bits() -> None:
    assert WeakColumns(target_bits=3.1).count((4096, 4096), 3) == round(0.1 * 4096 * 4096 / (16 * 4096 + 32))
    assert WeakColumns(num_columns=7).planned(SHAPES, bits=3) == WeakColumns(num_columns=7)


def test_refusals() -> None:
    for options in ({}, {"target_bits": 3.1, "num_columns": 4}, {"num_columns": -1}, {"target_bits": 17.0}):
        with pytest.raises(InputError, match=r"WeakColumns: target_bits, num_columns=.* are not one budget; give"):
            WeakColumns(**options)
    with pytest.raises(
        InputError, match=r"WeakColumns: target_bits=3.1 is less than the 4 bits of a code; use a targ"
    ):
        WeakColumns(target_bits=3.1).planned(SHAPES, bits=4)
