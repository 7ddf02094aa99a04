# SPDX-License-Identifier: Apache-2.0
"""QuantizedLinear: every kind of packed weight computes what it decodes to, and its layout stores it."""

import dataclasses

import pytest
import torch
from torch import nn

from quattuor.activations import DynamicQuantizer
from quattuor.checkpoints.layouts import layout_from_dict, layout_to_dict
from quattuor.deltas import ColumnDelta, ElementDelta
from quattuor.errors import InputError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import QuantizedLinear
from quattuor.online_maps import Kronecker, Permutation
from quattuor.scales import AbsMax, TwoLevel
from quattuor.solvers import WeightQuantizer, WeightToQuantize

PLAIN = WeightQuantizer(number_format=Integer(4), granularity=PerGroup(16), scales=AbsMax(scale_dtype="float16"))
CHANNEL = WeightQuantizer(number_format=Integer(4), granularity=PerChannel(), scales=AbsMax())
TWO_LEVEL = WeightQuantizer(number_format=TwoLevelInteger(4), granularity=PerGroup(16), scales=TwoLevel())


def packed(quantizer, generator):
    weight = torch.randn(24, 32, generator=generator)
    return quantizer.solve([WeightToQuantize(name="linear", weight=weight)], {})[0].tensor


def with_elements(generator):
    mask = torch.rand(24, 32, generator=generator) < 0.1
    return dataclasses.replace(
        packed(PLAIN, generator), delta=ElementDelta.from_dense(torch.randn(24, 32, generator=generator), mask)
    )


def with_columns(generator):
    values = torch.randn(24, 2, generator=generator).half()
    delta = ColumnDelta(indices=torch.tensor([3, 31], dtype=torch.int32), values=values)
    return dataclasses.replace(packed(PLAIN, generator), delta=delta)


def with_maps(generator):
    online = Kronecker(left=torch.randn(4, 4, generator=generator), right=torch.randn(8, 8, generator=generator))
    reversed_rows = Permutation(indices=torch.arange(23, -1, -1, dtype=torch.int32))
    delta = with_elements(generator).delta
    return dataclasses.replace(packed(PLAIN, generator), delta=delta, input_map=online, output_map=reversed_rows)


TENSORS = {
    "plain": lambda generator: packed(PLAIN, generator),
    "two levels": lambda generator: packed(TWO_LEVEL, generator),
    "elements": with_elements,
    "columns": with_columns,
    "maps": with_maps,
}


def linear_of(tensor, activations=None):
    bias = torch.linspace(-1, 1, 24)
    return QuantizedLinear.from_tensor(tensor, bias, activations, dtype=torch.float32, name="linear"), bias


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
def test_it_computes_what_the_weight_decodes_to(make, generator):
    tensor = make(generator)
    module, bias = linear_of(tensor)
    x = torch.randn(2, 5, 32, generator=generator)
    assert torch.allclose(module(x), nn.functional.linear(x, tensor.decode(), bias), atol=1e-4)
    module.use_kernel("reference")
    assert torch.allclose(module(x), nn.functional.linear(x, tensor.decode(), bias), atol=1e-4)
    assert any(row.is_chosen and row.implementation == "reference" for row in module.explain())


def test_a_delta_sees_inputs_that_are_not_rounded(generator):
    tensor = dataclasses.replace(packed(CHANNEL, generator), delta=with_elements(generator).delta)
    module, _ = linear_of(tensor, DynamicQuantizer())
    plain, _ = linear_of(
        packed(CHANNEL, torch.Generator().manual_seed(generator.initial_seed())), DynamicQuantizer()
    )
    x = torch.randn(5, 32, generator=generator)
    assert torch.allclose(module(x), plain(x) + tensor.delta.matmul(x), atol=1e-5)


@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
def test_a_layout_as_plain_data_makes_room_for_the_state(make, generator):
    tensor = make(generator)
    module, _ = linear_of(tensor)
    layout = layout_from_dict(layout_to_dict(module.layout), "test")
    assert layout == module.layout
    empty = QuantizedLinear(layout, in_features=32, out_features=24, bias=True, name="linear")
    empty.load_state_dict(module.state_dict())
    x = torch.randn(3, 32, generator=generator)
    assert torch.equal(empty(x), module(x))
    assert torch.equal(empty.tensor.decode(), tensor.decode())


def test_casting_the_module_leaves_the_weight_as_it_is(generator):
    module, _ = linear_of(with_maps(generator))
    before = {name: value.clone() for name, value in module.tensor.state().items()}
    module.to(torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in module.tensor.state().items())


def test_a_kernel_that_does_not_exist_is_refused_and_the_choice_stays(generator):
    module, _ = linear_of(packed(TWO_LEVEL, generator))
    with pytest.raises(InputError, match=r"force=fastest names no implementation for TwoLevelInteger"):
        module.use_kernel("fastest")
    assert module.force is None
    module(torch.ones(1, 32))
