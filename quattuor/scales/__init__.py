# SPDX-License-Identifier: Apache-2.0
"""Scale rules: which scale and zero point a group gets."""

from quattuor.scales.absmax import AbsMax
from quattuor.scales.base import Grid, ScaleDtype, ScaleRule
from quattuor.scales.search import ClipSearch
from quattuor.scales.two_level import TwoLevel

__all__ = ["AbsMax", "ClipSearch", "Grid", "ScaleDtype", "ScaleRule", "TwoLevel"]
