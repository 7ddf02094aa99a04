# SPDX-License-Identifier: Apache-2.0
"""Linear layer with integer weights of 2 to 8 bits and floating-point activations; see README.md."""

from quattuor.kernels.w4a16_linear.op import Plan, plan

__all__ = ["Plan", "plan"]
