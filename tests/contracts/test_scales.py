# SPDX-License-Identifier: Apache-2.0
"""What every scale rule promises on every granularity. A new rule is a row of `MEMBERS`."""

import pytest
import torch
from torch import Tensor

from quattuor.formats import (
    BilevelInteger,
    BinaryCoding,
    Codebook,
    Format,
    Integer,
    MidRise,
    TwoLevelInteger,
)
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.scales import (
    AbsMax,
    Alternating,
    Bilevel,
    ClipSearch,
    Grid,
    MinMax,
    RootMeanSquare,
    ScaleRule,
    TwoLevel,
    UniformPlanes,
    WeightedKMeans,
    WindowSearch,
)

COARSE = ClipSearch(num_steps=10, smallest=0.5)

MEMBERS: list[tuple[ScaleRule, Format]] = [
    (AbsMax(), Integer(4)),
    (AbsMax(), Integer(8, narrow=True)),
    (AbsMax(), Integer(3, symmetric=False)),
    (AbsMax(choose_sign=True), Integer(4)),
    (AbsMax(scale_dtype="float16"), Integer(4, symmetric=False)),
    (COARSE, Integer(4)),
    (COARSE, Integer(2, symmetric=False)),
    (ClipSearch(num_steps=10, smallest=0.5, choose_sign=True, scale_dtype="float16"), Integer(3)),
    (ClipSearch(num_steps=10, smallest=0.5, norm=2.4, weighted=False), Integer(4)),
    (TwoLevel(inner=COARSE), TwoLevelInteger(4)),
    (TwoLevel(inner=COARSE, integer=False), TwoLevelInteger(4)),
    (TwoLevel(inner=COARSE, integer=False), TwoLevelInteger(8)),
    (TwoLevel(inner=ClipSearch(num_steps=10, smallest=0.5, choose_sign=True)), TwoLevelInteger(3)),
    (MinMax(), Integer(4, symmetric=False)),
    (WindowSearch(num_steps=10), Integer(3, symmetric=False)),
    (WindowSearch(num_steps=5, norm=2.4, scale_dtype="float32"), Integer(4, symmetric=False)),
    (Bilevel(), BilevelInteger(3, None, None)),
    (Bilevel(search=COARSE), BilevelInteger(4, row_group=1)),
    (RootMeanSquare(multiple=4.0), MidRise(8)),
    (WeightedKMeans(scale_dtype="float32"), Codebook(3)),
    (WeightedKMeans(method="exact", scale_dtype="float32"), Codebook(4)),
    (Alternating(rounds=3, scale_dtype="float32"), BinaryCoding(3)),
    (Alternating(rounds=3, offset=False, scale_dtype="float32"), BinaryCoding(4)),
    (UniformPlanes(inner=AbsMax(scale_dtype="float16")), BinaryCoding(3)),
    (UniformPlanes(inner=AbsMax(scale_dtype="float16"), symmetric=False), BinaryCoding(4)),
]
GRANULARITIES: list[Granularity] = [PerTensor(), PerChannel(), PerGroup(4)]

every_member = pytest.mark.parametrize(
    ("rule", "number_format"),
    MEMBERS,
    ids=[f"{index}-{type(row[0]).__name__}" for index, row in enumerate(MEMBERS)],
)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)


def reconstruct(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    values = grid.granularity.split(weight)
    decoded = grid.number_format.fake_quantize(values, grid.fit(weight, importance))
    return grid.granularity.merge(decoded, (weight.shape[0], weight.shape[1]))


@every_granularity
@every_member
def test_shapes_finiteness_and_error(
    rule: ScaleRule, number_format: Format, granularity: Granularity, generator: torch.Generator
) -> None:
    weight = torch.randn(6, 12, generator=generator)
    grid = Grid(number_format=number_format, granularity=granularity, scales=rule)
    importance = torch.rand(12, generator=generator)
    importance[3] = 0
    parameters = grid.fit(weight, importance)
    values = granularity.split(weight)
    for name, tensor in parameters.items():
        assert tensor.shape[:2] in {values.shape[:2], (values.shape[0], 1)}, name
        assert torch.isfinite(tensor.float()).all(), name
    for scale in (tensor for name, tensor in parameters.items() if name.endswith("scale")):
        assert (scale != 0).all()
    error = (reconstruct(weight, grid) - weight).square().sum() / weight.square().sum()
    # A uniform grid of 2^b levels over +-3.2 sigma errs by step^2 / 12 on average; twice that is a wrong scale.
    step = 6.4 / (2**number_format.bits - 1)
    assert error < 2 * max(step**2 / 12, (6.4 / 255) ** 2 / 12)


@every_granularity
@every_member
def test_zeros_stay_zero(rule: ScaleRule, number_format: Format, granularity: Granularity) -> None:
    grid = Grid(number_format=number_format, granularity=granularity, scales=rule)
    assert reconstruct(torch.zeros(3, 8), grid).abs().max() < 1e-28
    if isinstance(rule, Alternating | Bilevel | RootMeanSquare):
        return  # zero is a sum of its planes only by chance, or between the two innermost levels
    assert torch.equal(reconstruct(torch.zeros(3, 8), grid), torch.zeros(3, 8))
    weight = torch.zeros(3, 8)
    weight[0, :4] = torch.tensor([1.0, -0.5, 0.25, 2.0])
    decoded = reconstruct(weight, grid)
    assert torch.equal(decoded[1:], weight[1:])
    assert torch.equal(decoded[0, 4:], weight[0, 4:])


@pytest.mark.parametrize("factor", [2.0**-9, 64.0])
@every_member
def test_scale_invariance(
    rule: ScaleRule, number_format: Format, factor: float, generator: torch.Generator
) -> None:
    # A power of two only shifts exponents, so the equality is exact.
    weight = torch.randn(4, 8, generator=generator)
    grid = Grid(number_format=number_format, granularity=PerGroup(4), scales=rule)
    assert torch.equal(reconstruct(weight * factor, grid), factor * reconstruct(weight, grid))


@every_member
def test_rows_and_groups_do_not_interact(
    rule: ScaleRule, number_format: Format, generator: torch.Generator
) -> None:
    weight = torch.randn(3, 8, generator=generator)
    grid = Grid(number_format=number_format, granularity=PerGroup(4), scales=rule)
    together = grid.fit(weight)
    for row in range(3):
        alone = grid.fit(weight[row : row + 1])
        for name, tensor in alone.items():
            assert torch.equal(tensor, together[name][row : row + 1]), name


@every_granularity
@every_member
def test_one_by_one(rule: ScaleRule, number_format: Format, granularity: Granularity) -> None:
    if isinstance(granularity, PerGroup):
        granularity = PerGroup(1)
    grid = Grid(number_format=number_format, granularity=granularity, scales=rule)
    for value in (0.7, -0.7):
        assert reconstruct(torch.tensor([[value]]), grid).item() == pytest.approx(value, rel=0.02)


@every_member
def test_fitting_is_repeatable_and_leaves_the_weight(
    rule: ScaleRule, number_format: Format, generator: torch.Generator
) -> None:
    weight = torch.randn(4, 8, generator=generator)
    before = weight.clone()
    grid = Grid(number_format=number_format, granularity=PerGroup(4), scales=rule)
    first, second = grid.fit(weight), grid.fit(weight)
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)
