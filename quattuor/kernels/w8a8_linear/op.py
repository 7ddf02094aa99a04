# SPDX-License-Identifier: Apache-2.0
"""The public wrapper: 8-bit weights per channel are one case of the family of w4a8_linear."""

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem, check

__all__ = ["plan"]

PLACE = "w8a8_linear"


def plan(problem: LinearProblem, force: str | None = None) -> w4a8_linear.Plan:
    """Choose implementations for a layer with int8 weights per channel and int8 activations per token.

    y[m, n] = float32(sum_k (x_codes[m, k] - z[m]) codes[n, k]) * scale[n] * x_scale[m] (+ bias[n]); z is zero
    unless the problem has `activation_zero_point`.

    Args:
        problem: What the layer computes.
        force: Name of the one implementation to use, or None to choose.

    Raises:
        InputError: The problem has other widths or groups, or `force` names no implementation.
        UnsupportedError: The forced implementation refuses the problem; the message holds its reason.
    """
    check(problem.weight_bits == 8, "weight_bits", problem.weight_bits, "is not 8", PLACE, "use w4a8_linear")
    check(
        problem.group_size is None,
        "group_size",
        problem.group_size,
        "is not None: 8-bit weights have one scale per channel here",
        PLACE,
        "use w4a8_linear, which takes groups at every width",
    )
    return w4a8_linear.plan(problem, force)
