# SPDX-License-Identifier: Apache-2.0
"""Random packed weights, and a served linear behind a norm."""

import torch
from torch import Tensor, nn

from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, Parameters, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import QuantizedLinear
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.serving import packed_linear


def channel(out_features: int, in_features: int, generator: torch.Generator, bits: int = 4) -> QuantizedTensor:
    """Return a symmetric weight with one scale per channel."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (out_features, in_features), generator=generator, dtype=torch.int8)
    scale = 0.01 + torch.rand(out_features, 1, generator=generator)
    return QuantizedTensor.from_codes(codes, Parameters(scale=scale), Integer(bits), PerChannel())


def grouped(out_features: int, in_features: int, generator: torch.Generator, size: int = 128) -> QuantizedTensor:
    """Return a weight on two levels."""
    codes = torch.randint(-8, 8, (out_features, in_features), generator=generator, dtype=torch.int8)
    group = torch.randint(1, 16, (out_features, in_features // size), generator=generator).to(torch.float16)
    scale = 0.01 + torch.rand(out_features, 1, generator=generator)
    parameters = Parameters(group_scale=group, channel_scale=scale)
    return QuantizedTensor.from_codes(codes, parameters, TwoLevelInteger(4), PerGroup(size))


def asymmetric(out_features: int, in_features: int, generator: torch.Generator) -> QuantizedTensor:
    """Return a weight of 3 bits with zero points per group."""
    codes = torch.randint(0, 8, (out_features, in_features), generator=generator).to(torch.uint8)
    shape = (out_features, in_features // 32)
    zero_point = torch.randint(0, 8, shape, generator=generator).to(torch.uint8)
    parameters = Parameters(scale=0.01 + torch.rand(shape, generator=generator), zero_point=zero_point)
    return QuantizedTensor.from_codes(codes, parameters, Integer(3, symmetric=False), PerGroup(32))


CASES = {
    "channel": (channel, DynamicQuantizer()),
    "group": (grouped, DynamicQuantizer()),
    "weights only": (asymmetric, None),
    "weights only, symmetric": (channel, None),
}


class Served(nn.Module):
    """A norm and the linear that reads it, as a serving engine holds them, beside what transformers runs."""

    def __init__(self, case: str, generator: torch.Generator, *, is_traced: bool = True) -> None:
        """Draw the weight."""
        super().__init__()
        make, activations = CASES[case]
        tensor = make(96, 256, generator)
        self.reference = QuantizedLinear.from_tensor(tensor, None, activations, dtype=torch.float32, name="linear")
        self.norm = nn.RMSNorm(256, eps=1e-5)
        self.facts, operand = packed_linear.prepare(tensor, activations, torch.float32, is_traced=is_traced)
        self.names = tuple(f"operand_{index}" for index in range(len(operand)))
        for name, value in zip(self.names, operand.values(), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Return the linear of the norm."""
        operand = [self.get_buffer(name) for name in self.names]
        return packed_linear.linear(self.facts, operand, self.norm(x), None)
