# SPDX-License-Identifier: Apache-2.0
"""Linear layer with integer weights of 2 to 8 bits and int8 activations; see README.md."""

from quattuor.kernels.w4a8_linear.gated import gated_linear
from quattuor.kernels.w4a8_linear.op import Plan, plan

__all__ = ["Plan", "gated_linear", "plan"]
