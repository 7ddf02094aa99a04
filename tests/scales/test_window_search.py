# SPDX-License-Identifier: Apache-2.0
"""The search over scale and zero point: against trying every candidate, and against smaller searches."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, Parameters
from quattuor.granularity import PerChannel, PerGroup
from quattuor.scales import ClipSearch, Grid, MinMax, WindowSearch, window_search
from quattuor.scales.base import round_scale


def best_by_trying(row: Tensor, weights: Tensor, bits: int, num_steps: int, norm: float) -> tuple[float, float]:
    """Return the smallest error, and its scale, of one group; the search as its docstring defines it."""
    counted = row[weights > 0]
    low, high = min(float(counted.min()), 0.0), max(float(counted.max()), 0.0)
    number_format, best = Integer(bits, symmetric=False), (float("inf"), 0.0)
    for step in range(num_steps, 0, -1):
        scale = round_scale(torch.tensor([[(high - low) * (step / num_steps) / (2**bits - 1)]]), "float16")
        for zero in range(2**bits):
            parameters = Parameters(scale=scale, zero_point=torch.tensor([[zero]], dtype=torch.uint8))
            decoded = number_format.fake_quantize(row.view(1, 1, -1), parameters).view(-1)
            error = float(((decoded.double() - row).abs() ** norm * weights).sum())
            best = min(best, (error, float(scale)), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("batch", [1, 10**6])
@pytest.mark.parametrize(("bits", "norm"), [(2, 2.0), (3, 2.0), (4, 2.0), (3, 2.4)])
def test_finds_the_best_of_all_candidates(
    bits: int, norm: float, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_search, "BATCH_ELEMENTS", batch)
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(3, 2, 24, generator=generator)
    values[1] += 0.8
    values[2, 0, 5] = 9.0
    importance = torch.rand(1, 2, 24, generator=generator)
    importance[:, :, [3, 5]] = 0
    number_format = Integer(bits, symmetric=False)
    fitted = WindowSearch(num_steps=7, norm=norm).fit(values, number_format, importance)
    decoded = number_format.fake_quantize(values, fitted).double()
    error = ((decoded - values).abs() ** norm * importance).sum(dim=-1)
    for row in range(3):
        for group in range(2):
            expected, scale = best_by_trying(values[row, group], importance[0, group], bits, 7, norm)
            assert float(error[row, group]) == pytest.approx(expected, rel=1e-5)
            assert float(fitted["scale"][row, group]) == scale


def test_weights_may_be_left_out_of_the_error(generator: torch.Generator) -> None:
    values, importance = torch.randn(3, 1, 64, generator=generator), torch.rand(1, 1, 64, generator=generator)
    importance[..., 7] = 0
    number_format = Integer(3, symmetric=False)
    unweighted = WindowSearch(weighted=False).fit(values, number_format, importance)
    counted = WindowSearch().fit(values, number_format, (importance > 0).float())
    assert torch.equal(unweighted["scale"], counted["scale"])
    weighted = WindowSearch().fit(values, number_format, importance)
    assert not torch.equal(unweighted["scale"], weighted["scale"])


def test_is_never_worse_than_smaller_searches(generator: torch.Generator) -> None:
    weight, importance = torch.randn(32, 64, generator=generator) ** 3, torch.rand(64, generator=generator)
    number_format = Integer(3, symmetric=False)

    def error(rule: WindowSearch | ClipSearch | MinMax) -> Tensor:
        grid = Grid(number_format=number_format, granularity=PerGroup(32), scales=rule)
        decoded = number_format.fake_quantize(grid.granularity.split(weight), grid.fit(weight, importance))
        return ((decoded - weight.view(32, 2, 32)).square() * importance.view(2, 32)).sum(dim=-1)

    window = error(WindowSearch(scale_dtype="float32"))
    # The clip search keeps the zero point that the whole range has, so its candidates are among the window's.
    assert (window <= error(ClipSearch(num_steps=100, smallest=0.01)) * (1 + 1e-5)).all()
    assert window.sum() < 0.95 * error(MinMax()).sum()


def test_scale_of_zeros_and_of_many_rows(generator: torch.Generator) -> None:
    number_format = Integer(4, symmetric=False)
    grid = Grid(number_format=number_format, granularity=PerChannel(), scales=WindowSearch(num_steps=4))
    weight = torch.randn(300, 512, generator=generator)
    weight[7] = 0
    fitted = grid.fit(weight)
    assert fitted["scale"][7] == 1
    assert torch.equal(grid.fit(weight[100:103])["scale"], fitted["scale"][100:103])


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"WindowSearch: num_steps, norm=\(0, 2.0\) do not describe a search"):
        WindowSearch(num_steps=0)
    with pytest.raises(UnsupportedError, match=r"WindowSearch: format=.* has no zero point"):
        WindowSearch().check(Integer(4))
