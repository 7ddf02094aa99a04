# SPDX-License-Identifier: Apache-2.0
"""Linear operators that choose their kernel when they are called.

A compiled graph is traced once for every number of tokens, so the choice that a `Plan` makes between decoding and
prefill must not be traced: it would be made once, for the batch that happened to be traced. These operators are
opaque to the compiler and choose from the actual shape. Their operand is a list, which a graph can pass.
"""

import functools

import torch
from torch import Tensor

from quattuor.kernels import w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, Operand, describe_device

__all__ = ["plan_of", "w4a8", "w4a8_gated", "w4a16"]


@functools.cache
def plan_of(
    device: torch.device,
    dtype: torch.dtype,
    activation_bits: int,
    out_features: int,
    in_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> w4a8_linear.Plan | w4a16_linear.Plan:
    """Return the plan of a layer on a device.

    Args:
        device: Where it runs.
        dtype: Of its outputs.
        activation_bits: 8 or 16.
        out_features: N.
        in_features: K.
        weight_bits: Width of a code.
        group_size: 0 for one scale per channel.
        promise: With 8-bit activations, that group scales are small integers; with 16, that there are zero points.
    """
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=weight_bits,
        group_size=group_size or None,
        integer_group_scale=promise and activation_bits == 8,
        zero_point=promise and activation_bits == 16,
        activation_bits=activation_bits,
        output_dtype=dtype,
        **describe_device(device),
    )
    return w4a8_linear.plan(problem) if activation_bits == 8 else w4a16_linear.plan(problem)


torch.library.define(
    "quattuor::packed_w4a8",
    "(Tensor x_codes, Tensor x_scale, Tensor[] operand, str names, Tensor? bias, ScalarType out_dtype, "
    "int out_features, int weight_bits, int group_size, bool promise) -> Tensor",
)
torch.library.define(
    "quattuor::packed_w4a8_gated",
    "(Tensor x_codes, Tensor x_scale, Tensor[] operand, str names, Tensor? bias, ScalarType out_dtype, "
    "int out_features, int weight_bits, int group_size, bool promise) -> (Tensor, Tensor)",
)
torch.library.define(
    "quattuor::packed_w4a16",
    "(Tensor x, Tensor[] operand, str names, Tensor? bias, int out_features, int weight_bits, int group_size, "
    "bool promise) -> Tensor",
)


@torch.library.impl("quattuor::packed_w4a8", "CompositeExplicitAutograd")
def w4a8(
    x_codes: Tensor,
    x_scale: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> Tensor:
    """Multiply int8 tokens by a packed weight; arguments as for `plan_of` and `Plan.linear`."""
    plan = plan_of(x_codes.device, out_dtype, 8, out_features, x_codes.shape[1], weight_bits, group_size, promise)
    assert isinstance(plan, w4a8_linear.Plan), "8-bit activations"
    tensors = Operand(dict(zip(names.split(","), operand, strict=True)))
    return plan.linear(x_codes, x_scale, tensors, bias, out_dtype)


@torch.library.impl("quattuor::packed_w4a8_gated", "CompositeExplicitAutograd")
def w4a8_gated(
    x_codes: Tensor,
    x_scale: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> tuple[Tensor, Tensor]:
    """Multiply int8 tokens by gate and up side by side, gate and quantize; arguments as for `gated_linear`."""
    plan = plan_of(x_codes.device, out_dtype, 8, out_features, x_codes.shape[1], weight_bits, group_size, promise)
    assert isinstance(plan, w4a8_linear.Plan), "8-bit activations"
    tensors = Operand(dict(zip(names.split(","), operand, strict=True)))
    return w4a8_linear.gated_linear(plan, x_codes, x_scale, tensors, bias, out_dtype)


@torch.library.impl("quattuor::packed_w4a16", "CompositeExplicitAutograd")
def w4a16(
    x: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> Tensor:
    """Multiply floating-point tokens by a packed weight; arguments as for `plan_of` and `Plan.linear`."""
    plan = plan_of(x.device, x.dtype, 16, out_features, x.shape[1], weight_bits, group_size, promise)
    assert isinstance(plan, w4a16_linear.Plan), "16-bit activations"
    return plan.linear(x, Operand(dict(zip(names.split(","), operand, strict=True))), bias, x.dtype)


@torch.library.register_fake("quattuor::packed_w4a8")  # type: ignore[untyped-decorator]
def _fake_w4a8(
    x_codes: Tensor,
    x_scale: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], out_features), dtype=out_dtype)


@torch.library.register_fake("quattuor::packed_w4a8_gated")  # type: ignore[untyped-decorator]
def _fake_w4a8_gated(
    x_codes: Tensor,
    x_scale: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens = x_codes.shape[0]
    return x_codes.new_empty((num_tokens, out_features // 2)), x_scale.new_empty((num_tokens,))


@torch.library.register_fake("quattuor::packed_w4a16")  # type: ignore[untyped-decorator]
def _fake_w4a16(
    x: Tensor,
    operand: list[Tensor],
    names: str,
    bias: Tensor | None,
    out_features: int,
    weight_bits: int,
    group_size: int,
    promise: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))
