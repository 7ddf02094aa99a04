# SPDX-License-Identifier: Apache-2.0
"""The modules that replace the originals at run time."""

from quattuor.nn.linear import LinearLayout, ParameterLayout, QuantizedLinear, reason_against_execution

__all__ = ["LinearLayout", "ParameterLayout", "QuantizedLinear", "reason_against_execution"]
