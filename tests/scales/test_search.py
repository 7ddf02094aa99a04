# SPDX-License-Identifier: Apache-2.0
"""ClipSearch against a brute force written as loops over floats."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.scales import AbsMax, ClipSearch


def weighted_error(
    values: Tensor, number_format: Integer, parameters: Parameters, importance: Tensor | float
) -> Tensor:
    error = number_format.decode(number_format.encode(values, parameters), parameters) - values
    return (error.double().square() * importance).sum(-1)


@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(2, 5),
    kind=st.sampled_from(["plain", "choose_sign", "asymmetric"]),
    scale_dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=16, deadline=None, derandomize=True)
def test_never_worse_than_the_whole_range(seed: int, bits: int, kind: str, scale_dtype: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 2, 16, generator=generator) ** 3
    importance = torch.rand(1, 2, 16, generator=generator) ** 2
    number_format = Integer(bits, symmetric=kind != "asymmetric")
    options = {"choose_sign": kind == "choose_sign", "scale_dtype": scale_dtype}
    searched = ClipSearch(num_steps=20, **options).fit(values, number_format, importance)
    whole = AbsMax(**options).fit(values, number_format)
    better = weighted_error(values, number_format, searched, importance)
    assert (better <= weighted_error(values, number_format, whole, importance) * (1 + 1e-6)).all()
    assert searched["scale"].dtype == getattr(torch, scale_dtype)


def brute_force(
    values: list[float], weights: list[float], bits: int, fractions: list[float], norm: float
) -> float:
    """Return the first scale of smallest error, over plain Python floats."""
    half = 2 ** (bits - 1)
    start = max(map(abs, values)) / (half - 1)
    best_scale, best_error = start, float("inf")
    for fraction in fractions:
        scale = start * fraction
        decoded = [scale * min(max(round(value / scale), -half), half - 1) for value in values]
        error = sum(w * abs(d - v) ** norm for v, d, w in zip(values, decoded, weights, strict=True))
        if error < best_error * (1 - 1e-5):
            best_scale, best_error = scale, error
    return best_scale


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("bits", "norm"), [(2, 2.0), (4, 2.0), (3, 2.4)])
def test_equals_brute_force(bits: int, norm: float, weighted: bool, generator: torch.Generator) -> None:
    values = torch.randn(4, 3, 12, generator=generator)
    importance = torch.rand(1, 3, 12, generator=generator)
    search = ClipSearch(num_steps=50, smallest=0.3, norm=norm, weighted=weighted)
    scale = search.fit(values, Integer(bits), importance)["scale"]
    fractions = [1 - step / 50 for step in range(36)]
    for row, group in itertools.product(range(4), range(3)):
        weights = importance[0, group].tolist() if weighted else [1.0] * 12
        expected = brute_force(values[row, group].tolist(), weights, bits, fractions, norm)
        assert scale[row, group].item() == pytest.approx(expected, rel=1e-5)


def test_weights_pay_in_the_weighted_error(generator: torch.Generator) -> None:
    values = torch.randn(16, 4, 32, generator=generator)
    importance = torch.rand(1, 4, 32, generator=generator) ** 8
    errors = [
        weighted_error(
            values, Integer(3), ClipSearch(weighted=weighted).fit(values, Integer(3), importance), importance
        )
        for weighted in (True, False)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_an_unimportant_outlier_is_clipped() -> None:
    values = torch.tensor([[[10.0, 1.0, -0.7, 0.4]]])
    importance = torch.tensor([[[0.0, 1.0, 1.0, 1.0]]])
    clipped = ClipSearch(smallest=0.05).fit(values, Integer(4), importance)["scale"]
    assert clipped.item() < 1.6 / 7
    assert ClipSearch(smallest=0.05).fit(values, Integer(4))["scale"].item() > 5 / 7


@pytest.mark.parametrize("importance", [None, torch.zeros(1, 1, 4)], ids=["exact values", "zero importance"])
def test_ties_keep_the_whole_range(importance: Tensor | None) -> None:
    values = torch.tensor([[[7.0, 3.0, -1.0, 0.0]]])
    assert ClipSearch().fit(values, Integer(4), importance)["scale"].item() == 1.0


def test_both_signs_are_tried() -> None:
    # -8 needs the lowest code of a positive scale, 8 that of a negative one; both are then exact.
    values = torch.tensor([[[-8.0, 3.0]], [[8.0, 3.0]]])
    parameters = ClipSearch(choose_sign=True).fit(values, Integer(4))
    assert parameters["scale"].tolist() == [[1.0], [-1.0]]
    # The extreme alone does not decide: here the other sign serves the rest better.
    values = torch.tensor([[[-1.0, 0.98, 0.98, 0.98, 0.98]]])
    scale = ClipSearch(choose_sign=True).fit(values, Integer(2))["scale"]
    assert scale.item() < 0


@pytest.mark.parametrize(
    ("num_steps", "smallest", "expected"),
    [
        (10, 0.5, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (10, 0.25, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]),
        (1, 1.0, [1.0]),
        (1, 0.001, [1.0]),
        (2, 1e-9, [1.0, 0.5]),
    ],
)
def test_fractions_stay_within_the_search(num_steps: int, smallest: float, expected: list[float]) -> None:
    assert ClipSearch(num_steps=num_steps, smallest=smallest).fractions() == pytest.approx(expected)


def test_default_fractions() -> None:
    fractions = ClipSearch().fractions()
    assert len(fractions) == 41
    assert fractions[-1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"smallest": 0.0}, {"smallest": 1.5}, {"norm": 0.0}], ids=str
)
def test_searches_that_do_not_exist(options: dict[str, float]) -> None:
    with pytest.raises(
        InputError, match=r"ClipSearch: num_steps, smallest, norm=.* do not describe a search; use"
    ):
        ClipSearch(**options)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r"ClipSearch: format=.* is not a uniform integer"):
        ClipSearch().fit(torch.ones(1, 1, 4), TwoLevelInteger(4))
    with pytest.raises(UnsupportedError, match=r"ClipSearch: choose_sign=True gains nothing"):
        ClipSearch(choose_sign=True).fit(torch.ones(1, 1, 4), Integer(4, narrow=True))
