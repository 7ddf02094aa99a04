# SPDX-License-Identifier: Apache-2.0
"""RTN's recipe: which grid each choice gives."""

import pytest
import torch

from quattuor.errors import UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.scales import AbsMax, TwoLevel
from quattuor.solvers import Nearest, WeightToQuantize
from quattuor.systems import rtn


def test_defaults() -> None:
    weights = rtn().weights
    assert weights is not None
    assert weights.number_format == Integer(4)
    assert weights.granularity == PerGroup(128)
    assert weights.scales == AbsMax(scale_dtype="float16")
    assert weights.solver == Nearest()
    assert rtn().activations is None
    assert rtn().transforms == ()


def test_channel_and_zero_point() -> None:
    weights = rtn(3, None, symmetric=False).weights
    assert weights is not None
    assert weights.number_format == Integer(3, symmetric=False)
    assert weights.granularity == PerChannel()
    assert weights.scales == AbsMax()


def test_needs_no_data() -> None:
    for options in ({}, {"activation_bits": 8}, {"activation_bits": 8, "group_size": None}):
        weights = rtn(**options).weights
        assert weights is not None
        assert weights.solver.needs == frozenset()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_and_quantized_activations_meet_on_an_int8_grid(bits: int, generator: torch.Generator) -> None:
    recipe = rtn(bits, 32, activation_bits=8)
    assert recipe.weights is not None
    assert recipe.weights.number_format == TwoLevelInteger(bits)
    assert isinstance(recipe.weights.scales, TwoLevel)
    weight = torch.randn(4, 64, generator=generator)
    tensor = recipe.weights.solve([WeightToQuantize(name="linear", weight=weight)], {})[0].tensor
    # Without refinement and clipping the step of a group is its largest weight over the highest code.
    step = tensor.parameters["group_scale"].float() * tensor.parameters["channel_scale"]
    expected = weight.view(4, 2, 32).abs().amax(-1) / (2 ** (bits - 1) - 1)
    assert torch.allclose(step, expected, rtol=1e-3)


def test_refusals() -> None:
    with pytest.raises(
        UnsupportedError, match=r"rtn: symmetric=False has no integer product with 8-bit activations"
    ):
        rtn(symmetric=False, activation_bits=8)
    with pytest.raises(UnsupportedError, match=r"DynamicQuantizer: .* use Integer\(8, narrow=True\)"):
        rtn(activation_bits=4)
