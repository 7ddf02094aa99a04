# SPDX-License-Identifier: Apache-2.0
"""What the plans of the linear operations share: laying a weight out, finding its tensors again, common checks."""

import torch
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.kernels.dispatch import (
    OUTPUT_DTYPES,
    Implementation,
    LinearProblem,
    Operand,
    Schedule,
    check,
    check_tensor,
)

__all__ = ["check_call", "prepare_layouts", "select"]


def prepare_layouts(schedule: Schedule, problem: LinearProblem, *tensors: Tensor | None) -> Operand:
    """Return the weight in every layout that the schedule needs; the tensors are checked already."""
    return Operand(
        {
            f"{layout}.{name}": tensor
            for layout, implementation in schedule.layouts().items()
            for name, tensor in implementation.prepare(problem, *tensors).items()
        }
    )


def select(
    schedule: Schedule, operand: Operand, x: Tensor, place: str
) -> tuple[Implementation, dict[str, Tensor]]:
    """Return the implementation that computes these tokens, and its tensors.

    Raises:
        InputError: The operand lacks the layout, or lies on another device than the tokens.
    """
    chosen = schedule.implementation(x.shape[0])
    tensors = operand.layout(chosen.layout)
    if not tensors or any(tensor.device != x.device for tensor in tensors.values()):
        raise InputError(
            compose(
                subject="operand",
                value=sorted(operand.entries),
                constraint=f"does not hold the layout {chosen.layout!r} on {x.device}",
                place=place,
                remedy="prepare it with this plan and move it to the inputs' device",
            )
        )
    return chosen, tensors


def check_call(
    problem: LinearProblem, name: str, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype, place: str
) -> None:
    """Raise `InputError` unless tokens, bias and output dtype are what every linear operation takes.

    Args:
        problem: What the layer computes.
        name: Of the argument that holds the tokens.
        x: Tokens [M, K]; their dtype is checked by the operation.
        bias: [N] or None.
        out_dtype: Of the result.
        place: For messages.
    """
    if bias is not None:
        check_tensor("bias", bias, (problem.out_features,), OUTPUT_DTYPES, x.device, place)
    check(
        out_dtype in OUTPUT_DTYPES,
        "out_dtype",
        out_dtype,
        "is not a supported floating-point type",
        place,
        "use float16, bfloat16 or float32",
    )
    check(
        x.device.type == problem.device_type,
        f"{name}.device",
        x.device,
        f"is not a {problem.device_type} device, for which the plan was made",
        place,
        "make a plan for this device",
    )
