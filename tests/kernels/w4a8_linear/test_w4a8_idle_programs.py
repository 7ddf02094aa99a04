# SPDX-License-Identifier: Apache-2.0
"""Layers of small models on a CUDA device, where a launch has less work than the device has multiprocessors."""

import dataclasses

import pytest
import torch

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import describe_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Layers of SmolLM2-135M and of smaller models still: few tiles, few blocks along K.
SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576), (2048, 256), (17024, 128)]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("group_size", [None, 64])
def test_every_launch_ends_with_the_bits_of_the_reference(layer, inputs, out_features, in_features, group_size):
    made = layer(out_features, in_features, group_size=group_size, integer=group_size is not None, device="cuda")
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    plans = [w4a8_linear.plan(problem, force=name) for name in (None, "reference")]
    operands = [plan.prepare(made.codes, made.scale, made.group_scale) for plan in plans]
    for num_tokens in (2, 30, 90, 128, 190, 400):
        x_codes, x_scale = inputs(num_tokens, in_features, seed=num_tokens, device="cuda")
        found, expected = (
            plan.linear(x_codes, x_scale, operand) for plan, operand in zip(plans, operands, strict=True)
        )
        assert torch.equal(found, expected)
