# SPDX-License-Identifier: Apache-2.0
"""GPTQ's recipe: which part each option is, and that it beats rounding at equal measured bits (2210.17323)."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.scales import AbsMax, ClipSearch, MinMax, ScaleRule, WindowSearch
from quattuor.solvers import GPTQ
from quattuor.systems import gptq, rtn

TOKENS = torch.randint(0, 255, (4, 48), generator=torch.Generator().manual_seed(5))


def test_defaults() -> None:
    weights = gptq().weights
    assert weights is not None
    assert weights.number_format == Integer(4, symmetric=False)
    assert weights.granularity == PerGroup(128)
    assert weights.scales == MinMax(scale_dtype="float16")
    assert weights.solver == GPTQ(damping=0.01, order="activation", groups="static")
    assert weights.outliers is None
    assert gptq().sequential
    assert gptq().inputs == "quantized"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"symmetric": True}, AbsMax(choose_sign=True, scale_dtype="float16")),
        ({"clip": "weighted"}, WindowSearch()),
        ({"clip": "plain"}, ClipSearch(num_steps=100, norm=2.4, weighted=False, scale_dtype="float16")),
        (
            {"clip": "weighted", "symmetric": True},
            ClipSearch(num_steps=100, choose_sign=True, scale_dtype="float16"),
        ),
    ],
)
def test_scales(options: dict[str, object], rule: ScaleRule) -> None:
    weights = gptq(group_size=None, **options).weights
    assert weights is not None
    assert weights.scales == rule
    assert weights.granularity == PerChannel()
    assert weights.number_format.symmetric == options.get("symmetric", False)


def error_of(model: PreTrainedModel, recipe: Recipe) -> tuple[float, float]:
    """Quantize in place; return measured bits per weight and the relative squared error of the logits."""
    with torch.no_grad():
        expected = model(TOKENS).logits
        report = quantize(model, recipe, TOKENS)
        error = (model(TOKENS).logits - expected).square().sum() / expected.square().sum()
    total = sum(layer.num_weights for layer in report.layers)
    return sum(layer.bits_per_weight * layer.num_weights for layer in report.layers) / total, float(error)


def test_beats_rounding_at_equal_bits(tiny: Callable[[str], PreTrainedModel]) -> None:
    plain_bits, plain = error_of(tiny("llama"), rtn(3, 32, symmetric=False))
    for options in ({}, {"groups": "fresh", "act_order": False}):
        solved_bits, solved = error_of(tiny("llama"), gptq(3, 32, **options))
        assert solved_bits == plain_bits
        assert solved < 0.8 * plain
