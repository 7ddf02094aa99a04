# SPDX-License-Identifier: Apache-2.0
"""What the operation accepts: every argument is checked before any launch."""

import torch
from torch import Tensor

from quattuor.kernels.dispatch import LinearProblem, check, check_tensor
from quattuor.kernels.layer import check_call

__all__ = ["PLACE", "check_inputs", "check_weight"]

PLACE = "w4a8_linear"


def check_weight(problem: LinearProblem, codes: Tensor, scale: Tensor, group_scale: Tensor | None) -> None:
    """Raise `InputError` unless the weight tensors match the problem in dtype, shape, device and range."""
    place = f"{PLACE}.prepare"
    device = codes.device
    check_tensor("codes", codes, (problem.out_features, problem.in_features), (torch.int8,), device, place)
    check_tensor("scale", scale, (problem.out_features,), (torch.float32,), device, place)
    low, high = (int(bound) for bound in codes.aminmax())
    check(
        -problem.max_code <= low and high < problem.max_code,
        "codes",
        f"{low} .. {high}",
        f"exceed the range of {problem.weight_bits} signed bits",
        place,
        "pass signed codes, or state the right weight_bits",
    )
    check(
        (group_scale is None) == (problem.group_size is None),
        "group_scale",
        "None" if group_scale is None else "a tensor",
        f"does not fit group_size={problem.group_size}",
        place,
        "pass group scales exactly when the problem has groups",
    )
    check(
        bool(scale.isfinite().all()),
        "scale",
        "NaN or infinite",
        "is not finite",
        place,
        "check how it was made",
    )
    if group_scale is None:
        return
    shape = (problem.out_features, problem.num_groups)
    check_tensor("group_scale", group_scale, shape, (torch.float16,), device, place)
    check(
        bool(group_scale.isfinite().all()),
        "group_scale",
        "NaN or infinite",
        "is not finite",
        place,
        "choose a larger channel scale",
    )
    top, bottom = 2 ** (8 - problem.weight_bits), -(127 // problem.max_code)
    legal = (group_scale == group_scale.round()) & (group_scale != 0)
    legal &= (group_scale >= bottom) & (group_scale <= top)
    check(
        not problem.integer_group_scale or bool(legal.all()),
        "group_scale",
        f"{group_scale.min().item()} .. {group_scale.max().item()}",
        f"are not all integers in {bottom} .. -1 or 1 .. {top}, as integer_group_scale promises",
        place,
        "set integer_group_scale=False",
    )


def check_inputs(
    problem: LinearProblem,
    x_codes: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Raise `InputError` unless the inputs match the problem in dtype, shape and device."""
    place = f"{PLACE}.linear"
    device = x_codes.device
    check(x_codes.dim() == 2, "x_codes.dim()", x_codes.dim(), "is not 2", place, "flatten tokens to [M, K]")
    num_tokens = x_codes.shape[0]
    check_tensor("x_codes", x_codes, (num_tokens, problem.in_features), (torch.int8,), device, place)
    check_tensor("x_scale", x_scale, (num_tokens,), (torch.float32,), device, place)
    check(
        (x_zero_point is not None) == problem.activation_zero_point,
        "x_zero_point",
        "None" if x_zero_point is None else "a tensor",
        f"does not fit activation_zero_point={problem.activation_zero_point} of the problem",
        place,
        "pass zero points exactly when the problem has them",
    )
    if x_zero_point is not None:
        check_tensor("x_zero_point", x_zero_point, (num_tokens,), (torch.int8,), device, place)
    check_call(problem, "x_codes", x_codes, bias, out_dtype, place)
