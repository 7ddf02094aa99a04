# SPDX-License-Identifier: Apache-2.0
"""Solvers: which codes a weight gets, given its grid and the statistics of its input."""

from quattuor.solvers.base import Solution, Solver, hessian_error
from quattuor.solvers.column_feedback import GPTQ
from quattuor.solvers.coordinate_descent import CoordinateDescent
from quattuor.solvers.nearest import Nearest
from quattuor.solvers.obq import OBQ
from quattuor.solvers.target_correction import TargetCorrection
from quattuor.solvers.weight_quantizer import WeightQuantizer, WeightToQuantize

__all__ = [
    "GPTQ",
    "OBQ",
    "CoordinateDescent",
    "Nearest",
    "Solution",
    "Solver",
    "TargetCorrection",
    "WeightQuantizer",
    "WeightToQuantize",
    "hessian_error",
]
