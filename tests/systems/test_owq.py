# SPDX-License-Identifier: Apache-2.0
"""OWQ's recipe: which part each option is, its budget on a whole model, its limits (2306.02272)."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from quattuor.deltas import ColumnDelta
from quattuor.formats import Integer
from quattuor.granularity import PerChannel
from quattuor.nn.linear import QuantizedLinear
from quattuor.outliers import WeakColumns
from quattuor.quantize import quantize
from quattuor.scales import MinMax, WindowSearch
from quattuor.solvers import GPTQ, WeightToQuantize
from quattuor.systems import gptq, owq

TOKENS = torch.randint(0, 255, (4, 48), generator=torch.Generator().manual_seed(5))


def packed(model: PreTrainedModel) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def test_defaults() -> None:
    weights = owq().weights
    assert weights is not None
    assert weights.number_format == Integer(3, symmetric=False)
    assert weights.granularity == PerChannel()
    assert weights.scales == WindowSearch()
    assert weights.solver == GPTQ(damping=0.01, order="natural")
    assert weights.outliers == WeakColumns(target_bits=3.1)
    assert not owq().sequential


def test_options() -> None:
    weights = owq(4, num_columns=6, weighted_by_error=False, clip="plain", act_order=True).weights
    assert weights is not None
    assert weights.outliers == WeakColumns(num_columns=6, weighted_by_error=False)
    assert weights.scales == WindowSearch(norm=2.4, weighted=False)
    assert weights.solver == GPTQ(damping=0.01)
    assert owq(clip="none").weights.scales == MinMax()


def test_without_columns_it_is_gptq(tiny: Callable[[str], PreTrainedModel]) -> None:
    first, second = tiny("llama"), tiny("llama")
    quantize(first, owq(3, 32, target_bits=3.0, clip="none"), TOKENS)
    quantize(second, gptq(3, 32, act_order=False, sequential=False), TOKENS)
    for name, module in packed(first).items():
        assert torch.equal(module.tensor.packed, packed(second)[name].tensor.packed)
        assert torch.equal(module.tensor.decode(), packed(second)[name].tensor.decode())


@pytest.mark.parametrize("target", [4.0])
def test_budget_of_a_model_is_spent(target: float, tiny: Callable[[str], PreTrainedModel]) -> None:
    model = tiny("llama")
    quantize(model, owq(3, target_bits=target), TOKENS)
    spent, weights, parameters = 0.0, 0, {}
    for name, module in packed(model).items():
        tensor = module.tensor
        statistics = sum(value.nbytes for value in tensor.parameters.values())
        spent += 8 * (tensor.nbytes - statistics)
        weights += tensor.shape[0] * tensor.shape[1]
        assert isinstance(tensor.delta, ColumnDelta)
        parameters[name] = tensor.delta.values.numel()
        assert (tensor.decode_codes()[:, tensor.delta.indices.long()] == 0).all()
    # A whole number of columns per linear: half a column of 192 rows is 1 % of such a small weight.
    assert spent / weights == pytest.approx(target, abs=0.1)
    assert max(parameters.values()) < 2 * min(parameters.values())


def test_measured_bits_of_a_large_layer_meet_the_target() -> None:
    recipe = owq(3, target_bits=3.1)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(256, 2048, generator=generator), torch.randn(256, 2048, generator=generator)
    hessian = x.T @ x / 256 + 0.1 * torch.eye(2048)
    assert recipe.weights is not None
    tensor = recipe.weights.solve([WeightToQuantize(name="w", weight=weight)], {"hessian": hessian})[0].tensor
    assert tensor.bits_per_weight == pytest.approx(3.1, abs=0.02)


def test_loud_channels_are_kept_and_pay() -> None:
    # The paper's condition: a few input channels with large activations.
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(512, 128, generator=generator)
    x[:, [7, 70]] *= 50
    statistics = {"hessian": x.T @ x / 512}
    item = WeightToQuantize(name="w", weight=weight)
    kept = owq(3, num_columns=2).weights.solve([item], statistics)[0]
    assert kept.tensor.delta.indices.tolist() == [7, 70]
    plain = gptq(3, None, clip="weighted", act_order=False).weights.solve([item], statistics)[0]
    assert kept.error < 0.3 * plain.error
    # Two columns of float16 are worth more than a whole bit for all.
    assert kept.error < gptq(4, None, clip="weighted").weights.solve([item], statistics)[0].error
