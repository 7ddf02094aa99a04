# SPDX-License-Identifier: Apache-2.0
"""A packed linear as a serving engine holds it: an operand in a list, and a call that compiles.

The inputs are quantized by one operator, which `fusion` joins to norm and residual, or to the gated activation.
Where an engine has no hook for that, a compiled graph gets plain PyTorch instead, for its compiler to fuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quattuor.activations import ActivationQuantizer
from quattuor.formats import TwoLevelInteger
from quattuor.granularity import PerGroup
from quattuor.kernels import w4a8_linear
from quattuor.kernels.token_quantize import reference
from quattuor.nn import operators
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["FUSE_VARIABLE", "PackedLinear", "linear", "prepare", "quantize_rows"]

#: Who joins quantization to what precedes it: "operators" (`fusion`, the default), "compiler" (PyTorch's), or 0.
FUSE_VARIABLE = "QUATTUOR_FUSE"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """What a call needs to know beside the tensors: plain values, which a compiled graph holds as constants.

    Args:
        names: Of the operand's tensors, joined by commas.
        activation_bits: 8 or 16.
        out_features: N.
        in_features: K.
        weight_bits: Width of a code.
        group_size: 0 for one scale per channel.
        promise: As for `plan_of`.
        is_traced: Whether the quantization of inputs is plain PyTorch in a compiled graph.
    """

    names: str
    activation_bits: int
    out_features: int
    in_features: int
    weight_bits: int
    group_size: int
    promise: bool
    is_traced: bool = True


def prepare(
    tensor: QuantizedTensor,
    activations: ActivationQuantizer | None,
    dtype: torch.dtype,
    *,
    is_traced: bool = True,
) -> tuple[PackedLinear, dict[str, Tensor]]:
    """Lay a packed weight out for the kernels of its device.

    Args:
        tensor: The weight, on the device that will run it.
        activations: Quantizer of the inputs; None for floating point.
        dtype: Of inputs and outputs.
        is_traced: Whether a compiled graph gets the quantization of inputs as plain PyTorch, for its compiler to
            fuse; without it, as one operator, for `fusion` to replace.

    Returns:
        What `linear` needs, and the operand's tensors by name, in the order of `names`.
    """
    granularity, parameters = tensor.granularity, tensor.parameters
    bits = 16 if activations is None else 8
    promise = "zero_point" in parameters
    if bits == 8:
        promise = "group_scale" in parameters and parameters["group_scale"].dtype == torch.int8
    out_features, in_features = tensor.shape
    group_size = granularity.group_size if isinstance(granularity, PerGroup) else 0
    sizes = (out_features, in_features, tensor.number_format.bits, group_size, promise)
    plan = operators.plan_of(tensor.packed.device, dtype, bits, *sizes)
    if isinstance(plan, w4a8_linear.Plan):
        is_two_level = isinstance(tensor.number_format, TwoLevelInteger)
        group_scale = parameters["group_scale"].to(torch.float16) if is_two_level else None
        scale_N1 = parameters["channel_scale" if is_two_level else "scale"].float()
        operand = plan.prepare(tensor.codes, scale_N1.squeeze(1), group_scale)
    else:
        zero_point = parameters["zero_point"] if promise else None
        operand = plan.prepare(tensor.codes, parameters["scale"], zero_point)
    tensors = operand.tensors()
    facts = PackedLinear(
        names=",".join(tensors),
        activation_bits=bits,
        out_features=out_features,
        in_features=in_features,
        weight_bits=tensor.number_format.bits,
        group_size=group_size,
        promise=promise,
        is_traced=is_traced,
    )
    return facts, tensors


def linear(facts: PackedLinear, operand: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
    """Return y in the dtype of x; any number of leading dimensions."""
    rows = x if x.dim() == 2 else x.reshape(-1, facts.in_features)
    if facts.activation_bits == 8:
        codes, scale = quantize_rows(rows, facts.is_traced)
        y: Tensor = torch.ops.quattuor.packed_w4a8(
            codes,
            scale,
            list(operand),
            facts.names,
            bias,
            x.dtype,
            facts.out_features,
            facts.weight_bits,
            facts.group_size,
            facts.promise,
        )
    else:
        y = torch.ops.quattuor.packed_w4a16(
            rows,
            list(operand),
            facts.names,
            bias,
            facts.out_features,
            facts.weight_bits,
            facts.group_size,
            facts.promise,
        )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], facts.out_features)


def quantize_rows(rows: Tensor, is_traced: bool) -> tuple[Tensor, Tensor]:
    """Return int8 codes and the float32 scale of each row."""
    if is_traced and torch.compiler.is_compiling():
        return reference.quantize_tokens(rows)
    codes, scale = torch.ops.quattuor.token_quantize(rows)
    return codes, scale
