# SPDX-License-Identifier: Apache-2.0
"""Linear layer whose weights are table entries or sums of signed scales, plus single entries; see README.md."""

from quattuor.kernels.lut_linear.op import Plan, plan
from quattuor.kernels.lut_linear.problem import LutProblem

__all__ = ["LutProblem", "Plan", "plan"]
