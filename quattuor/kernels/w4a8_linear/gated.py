# SPDX-License-Identifier: Apache-2.0
"""The product by gate and up side by side, gated and quantized for the product that follows."""

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Operand, check, is_plain_call
from quattuor.kernels.layer import select
from quattuor.kernels.token_quantize import silu_mul_quantize, token_quantize
from quattuor.kernels.w4a8_linear.checks import check_inputs
from quattuor.kernels.w4a8_linear.lanes import Lanes
from quattuor.kernels.w4a8_linear.op import Plan

__all__ = ["gated_linear"]


def gated_linear(
    plan: Plan,
    x_codes: Tensor,
    x_scale: Tensor,
    operand: Operand,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize each token of silu(gate) * up, where y = [gate, up] is the product of a plan.

    The bits are those of `Plan.linear` and `silu_mul_quantize`. For one token the programs of the product gate
    what they computed, which is then half as long.

    Args:
        plan: Of a layer with an even number of output features: those of the gate, then those of up.
        x_codes: int8 [M, K]; M may be 0; any strides.
        x_scale: float32 [M].
        operand: What `plan.prepare` returned.
        bias: Floating point [N] or None.
        out_dtype: Of gate, up and their product: float16, bfloat16 or float32; None for the problem's.

    Returns:
        Codes int8 [M, N / 2], contiguous, and scales float32 [M], as in `token_quantize`.

    Raises:
        InputError: A tensor has the wrong dtype, shape or device, or the number of outputs is odd.
    """
    problem, place = plan.problem, "gated_linear"
    features = problem.out_features
    check(
        features % 2 == 0, "out_features", features, "is odd", place, "pass a layer of gate and up, side by side"
    )
    lanes = plan.schedule.implementation(x_codes.shape[0])
    is_plain = is_plain_call(x_codes) and is_plain_call(x_scale)
    if is_plain and isinstance(lanes, Lanes) and lanes.gates(problem):
        out_dtype = problem.output_dtype if out_dtype is None else out_dtype
        check_inputs(problem, x_codes, x_scale, None, bias, out_dtype)
        _, tensors = select(plan.schedule, operand, x_codes, place)
        return token_quantize(lanes.gated(problem, x_codes, x_scale, tensors, bias, out_dtype))
    both = plan.linear(x_codes, x_scale, operand, bias, out_dtype)
    return silu_mul_quantize(both[:, : features // 2], both[:, features // 2 :])
