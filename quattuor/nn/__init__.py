# SPDX-License-Identifier: Apache-2.0
"""The modules that replace the originals at run time."""

from quattuor.nn.execution import reason_against_execution
from quattuor.nn.layout import ExtraLayout, LinearLayout, ParameterLayout
from quattuor.nn.linear import QuantizedLinear

__all__ = ["ExtraLayout", "LinearLayout", "ParameterLayout", "QuantizedLinear", "reason_against_execution"]
