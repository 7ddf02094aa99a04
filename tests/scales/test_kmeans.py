# SPDX-License-Identifier: Apache-2.0
"""Weighted k-means codebooks: never above a uniform grid, indifferent to scale, exact where it can be."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Codebook, Format, Integer, Parameters
from quattuor.scales import AbsMax, ScaleRule, WeightedKMeans


def error(values: Tensor, number_format: Format, rule: ScaleRule, importance: Tensor) -> Tensor:
    decoded = number_format.fake_quantize(values, rule.fit(values, number_format, importance))
    return ((decoded - values).double().square() * importance.double()).sum(dim=-1)


def make(generator: torch.Generator, rows: int = 16, size: int = 200) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, 1, size, generator=generator)
    return values, torch.rand(rows, 1, size, generator=generator).pow(-1.2) * 1e-14


@pytest.mark.parametrize("method", ["search", "exact"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_never_above_rounding_to_nearest(
    method: str, bits: int, symmetric: bool, generator: torch.Generator
) -> None:
    values, importance = make(generator)
    ours = error(values, Codebook(bits), WeightedKMeans(method=method, scale_dtype="float32"), importance)
    theirs = error(values, Integer(bits, symmetric=symmetric), AbsMax(), importance)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.9 * theirs.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_exact_is_never_above_search(bits: int, generator: torch.Generator) -> None:
    values, importance = make(generator)
    found = [
        error(values, Codebook(bits), WeightedKMeans(method=method, scale_dtype="float32"), importance)
        for method in ("exact", "search")
    ]
    assert (found[0] <= found[1] * (1 + 1e-5)).all()


def test_exact_error_falls_with_every_bit(generator: torch.Generator) -> None:
    values, importance = make(generator, rows=4)
    rule = WeightedKMeans(method="exact", scale_dtype="float32")
    errors = torch.stack([error(values, Codebook(bits), rule, importance) for bits in range(1, 6)])
    assert (errors.diff(dim=0) < 0).all()


def test_uniform_importance_is_plain_clustering(generator: torch.Generator) -> None:
    values, _ = make(generator)
    plain = WeightedKMeans().fit(values, Codebook(3))["codebook"]
    weighted = WeightedKMeans().fit(values, Codebook(3), torch.full_like(values, 3e-9))["codebook"]
    assert torch.equal(plain, weighted)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_scaling_the_importance_changes_nothing(factor: float, generator: torch.Generator) -> None:
    values, importance = make(generator)
    rule = WeightedKMeans()
    expected = rule.fit(values, Codebook(4), importance)["codebook"]
    assert torch.equal(rule.fit(values, Codebook(4), importance * factor)["codebook"], expected)


def test_elements_of_no_importance_never_matter(generator: torch.Generator) -> None:
    values, importance = make(generator)
    importance[..., ::5] = 0
    moved = values.clone()
    moved[..., ::5] = 1000.0
    for method in ("search", "exact"):
        rule = WeightedKMeans(method=method, scale_dtype="float32")
        books = [rule.fit(item, Codebook(3), importance)["codebook"] for item in (values, moved)]
        assert books[1].abs().max() < 5
        kept = torch.arange(values.shape[-1]) % 5 != 0
        errors = [
            ((Codebook(3).fake_quantize(values, Parameters(codebook=book)) - values).square() * importance)[
                ..., kept
            ].sum()
            for book in books
        ]
        assert float(errors[1]) == pytest.approx(float(errors[0]), rel=1e-3 if method == "search" else 1e-6)


def test_a_group_without_importance_counts_every_element(generator: torch.Generator) -> None:
    values, _ = make(generator)
    rule = WeightedKMeans()
    silent = rule.fit(values, Codebook(3), torch.zeros_like(values))["codebook"]
    assert torch.equal(silent, rule.fit(values, Codebook(3))["codebook"])


@pytest.mark.parametrize("method", ["search", "exact"])
def test_rows_with_few_distinct_values_are_reproduced(method: str, generator: torch.Generator) -> None:
    numbers = torch.randn(6, 1, 8, generator=generator).half().float()
    choice = torch.randint(0, 8, (6, 1, 100), generator=generator)
    values = numbers.gather(-1, choice)
    decoded = Codebook(3).fake_quantize(values, WeightedKMeans(method=method).fit(values, Codebook(3)))
    assert torch.equal(decoded, values)


def test_fewer_elements_than_entries() -> None:
    values = torch.tensor([[[0.5, -0.25, 4.0]]])
    parameters = WeightedKMeans().fit(values, Codebook(4))
    assert parameters["codebook"].shape == (1, 1, 16)
    assert torch.equal(Codebook(4).fake_quantize(values, parameters), values)


def test_codebooks_ascend_in_the_stored_dtype(generator: torch.Generator) -> None:
    values, importance = make(generator)
    book = WeightedKMeans().fit(values, Codebook(4), importance)["codebook"]
    assert book.dtype == torch.float16
    assert book.shape == (16, 1, 16)
    assert (book.float().diff(dim=-1) >= 0).all()


def test_refusals(generator: torch.Generator) -> None:
    values, importance = make(generator)
    with pytest.raises(UnsupportedError, match=r"use Codebook\(bits\)"):
        WeightedKMeans().check(Integer(4))
    with pytest.raises(InputError, match="is negative or not finite; pass squared gradients"):
        WeightedKMeans().fit(values, Codebook(4), -importance)
    with pytest.raises(InputError, match="is negative or not finite"):
        WeightedKMeans().fit(values, Codebook(4), importance * torch.nan)
    with pytest.raises(UnsupportedError, match='use scale_dtype="float32"'):
        WeightedKMeans().fit(values * 1e6, Codebook(4))
    for wrong in ({"num_rounds": 0}, {"num_rounds": -3}):
        with pytest.raises(InputError, match="do not describe a clustering"):
            WeightedKMeans(**wrong)
