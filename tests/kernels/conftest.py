# SPDX-License-Identifier: Apache-2.0
"""Random layers for the kernel tests."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quattuor.kernels.dispatch import LinearProblem


@dataclass(frozen=True)
class Layer:
    """The tensors of one 8-bit-activation layer and the problem that describes it."""

    problem: LinearProblem
    codes: Tensor
    scale: Tensor
    group_scale: Tensor | None


def make_layer(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int | None = None,
    integer: bool = False,
    clamps: bool = True,
    seed: int = 0,
    device: str = "cpu",
    **fields: object,
) -> Layer:
    """Random codes over the whole range, scales of both signs, group scales that round, and clamp unless told."""
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = torch.randn(out_features, generator=generator) * 0.01
    group_scale = None
    if group_size is not None:
        shape = (out_features, -(-in_features // group_size))
        if integer:
            size = torch.randint(1, max(127 // half, 1) + 1, shape, generator=generator)
            sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1 if bits < 8 else 1
            group_scale = (size * sign).half()
            group_scale.view(-1)[0] = 2 ** (8 - bits)  # the largest, legal only when positive
        else:
            group_scale = (torch.randn(shape, generator=generator) * 127 / half).half()
            if not clamps:
                group_scale = group_scale.clamp(-127 / half, 128 / half)
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        integer_group_scale=integer,
        device_type=device,
        **fields,
    )
    tensors = [None if t is None else t.to(device) for t in (codes, scale, group_scale)]
    return Layer(problem, *tensors)


def make_inputs(num_tokens: int, in_features: int, *, seed: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random int8 tokens over the whole range and positive scales."""
    generator = torch.Generator().manual_seed(seed)
    x_codes = torch.randint(-127, 128, (num_tokens, in_features), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(num_tokens, generator=generator) * 0.02
    return x_codes.to(device), x_scale.to(device)


@pytest.fixture
def layer():
    """Return the function that makes a random layer."""
    return make_layer


@pytest.fixture
def inputs():
    """Return the function that makes random quantized tokens."""
    return make_inputs
