# SPDX-License-Identifier: Apache-2.0
"""Linear layers with 8-bit weights and int8 activations, with or without zero points; see README.md."""

from quattuor.kernels.w4a8_linear import Plan
from quattuor.kernels.w8a8_linear.op import plan

__all__ = ["Plan", "plan"]
