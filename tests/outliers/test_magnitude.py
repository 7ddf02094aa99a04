# SPDX-License-Identifier: Apache-2.0
"""Sensitive and large entries: exact counts, disjoint sets, the threshold of the paper."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import CalibrationError, InputError
from quattuor.formats import Codebook
from quattuor.granularity import PerChannel
from quattuor.outliers import SensitiveAndLarge
from quattuor.outliers.magnitude import threshold
from quattuor.scales import Grid, WeightedKMeans

GRID = Grid(number_format=Codebook(3), granularity=PerChannel(), scales=WeightedKMeans())


def select(rule: SensitiveAndLarge, weight: Tensor, fisher: Tensor | None = None) -> Tensor:
    elements = rule.select(weight, GRID, {} if fisher is None else {"fisher": fisher}).elements
    assert elements is not None
    return elements


@pytest.mark.parametrize("shape", [(40, 50), (33, 61), (1, 7)])
def test_shares_are_met_to_within_one_entry(shape: tuple[int, int], generator: torch.Generator) -> None:
    weight, fisher = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
    for sensitive, large in ((0.01, 0.03), (0.0005, 0.004), (0.0, 0.1), (0.1, 0.0)):
        rule = SensitiveAndLarge(sensitive_share=sensitive, large_share=large)
        kept = int(select(rule, weight, fisher).sum())
        assert abs(kept - (sensitive + large) * weight.numel()) <= 1.5  # each of the two counts is rounded


def test_sets_are_disjoint_and_each_holds_the_largest(generator: torch.Generator) -> None:
    weight = torch.randn(20, 50, generator=generator)
    fisher = weight.abs()  # the most sensitive entries are the largest
    kept = select(SensitiveAndLarge(sensitive_share=0.02, large_share=0.03), weight, fisher)
    assert int(kept.sum()) == 50
    assert torch.equal(
        kept.flatten().nonzero().squeeze(1).sort().values, weight.abs().flatten().topk(50).indices.sort().values
    )
    independent = torch.rand(weight.shape, generator=generator)
    kept = select(SensitiveAndLarge(sensitive_share=0.02, large_share=0.03), weight, independent)
    assert bool((kept.flatten()[independent.flatten().topk(20).indices]).all())
    assert int(kept.sum()) == 50


def test_entries_that_stay_dense_are_within_the_threshold(generator: torch.Generator) -> None:
    weight = torch.randn(30, 40, generator=generator).pow(3)
    rule = SensitiveAndLarge(sensitive_share=0.0, rho=1.5)
    kept, limit = select(rule, weight), threshold(weight, 1.5)
    quartiles = torch.quantile(weight, torch.tensor([0.25, 0.75]))
    spread = quartiles[1] - quartiles[0]
    expected = torch.maximum((quartiles[0] - 1.5 * spread).abs(), (quartiles[1] + 1.5 * spread).abs())
    torch.testing.assert_close(limit, expected)
    assert 0 < int(kept.sum()) < weight.numel() // 2
    assert weight[~kept].abs().max() < limit <= weight[kept].abs().min()


def test_ties_and_silent_gradients_still_give_the_count() -> None:
    kept = select(SensitiveAndLarge(sensitive_share=0.1, large_share=0.1), torch.ones(10, 10), torch.zeros(10, 10))
    assert kept.flatten().nonzero().squeeze(1).tolist() == list(range(20))


def test_needs() -> None:
    assert SensitiveAndLarge().needs == {"fisher"}
    assert SensitiveAndLarge(sensitive_share=0.0).needs == frozenset()


def test_refusals(generator: torch.Generator) -> None:
    weight = torch.randn(20, 50, generator=generator)
    with pytest.raises(CalibrationError, match="fisher=missing does not fit"):
        select(SensitiveAndLarge(sensitive_share=0.01), weight)
    with pytest.raises(CalibrationError, match=r"fisher=\(50, 20\) does not fit"):
        select(SensitiveAndLarge(sensitive_share=0.01), weight, weight.T)
    for wrong in ({"sensitive_share": -0.1}, {"large_share": 0.5}, {"rho": -1.0}):
        with pytest.raises(InputError, match="do not select a small part of a matrix"):
            SensitiveAndLarge(**wrong)
