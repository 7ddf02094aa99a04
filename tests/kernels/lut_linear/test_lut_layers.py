# SPDX-License-Identifier: Apache-2.0
"""Packed linears with codebooks and planes: every implementation computes what the packed weight decodes to."""

import pytest
import torch

from quattuor.errors import UnsupportedError
from quattuor.nn import QuantizedLinear
from quattuor.recipe import Recipe
from quattuor.solvers import WeightToQuantize
from quattuor.systems import lut_gemm, squeezellm

CASES = [
    (squeezellm(3, sensitive_share=0.01, large_share=0.02), ("float32", "reference")),
    (squeezellm(4, 32, sensitive_share=0.0, large_share=0.0), ("float32", "reference")),
    (lut_gemm(2, 32, rounds=2, rounding="nearest"), ("float32", "tables", "reference")),
    (lut_gemm(3, None, rounds=2, offset=False, rounding="nearest"), ("float32", "tables", "reference")),
    (lut_gemm(4, 32, uniform=True, rounding="nearest"), ("float32", "tables", "reference")),
]


@pytest.mark.parametrize(("recipe", "names"), CASES, ids=range(len(CASES)))
def test_every_implementation_computes_the_decoded_weight(
    recipe: Recipe, names: tuple[str, ...], generator: torch.Generator
) -> None:
    weight = torch.randn(24, 96, generator=generator)
    fisher = torch.rand(24, 96, generator=generator)
    item = WeightToQuantize(name="linear", weight=weight, statistics={"fisher": fisher})
    tensor = recipe.weights.solve([item], {})[0].tensor
    bias, x = torch.randn(24, generator=generator), torch.randn(2, 5, 96, generator=generator)
    layer = QuantizedLinear.from_tensor(tensor, bias, None, dtype=torch.float32, name="linear")
    expected = x.double() @ tensor.decode().double().T + bias
    for name in names:
        layer.use_kernel(name)
        assert {row.implementation for row in layer.explain() if row.is_chosen} == {name}
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedError, match="runs on CUDA devices"):
        layer.use_kernel("lanes")


def test_single_entries_are_added_once(generator: torch.Generator) -> None:
    weight = torch.randn(24, 96, generator=generator)
    weight[3, 5] = 40.0
    item = WeightToQuantize(name="linear", weight=weight, statistics={"fisher": weight.square()})
    tensor = CASES[0][0].weights.solve([item], {})[0].tensor
    layer = QuantizedLinear.from_tensor(tensor, None, None, dtype=torch.float32, name="linear")
    one_hot = torch.zeros(1, 96)
    one_hot[0, 5] = 1.0
    assert layer(one_hot)[0, 3].item() == pytest.approx(40.0, rel=1e-3)
