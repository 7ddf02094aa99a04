# SPDX-License-Identifier: Apache-2.0
"""Scale rules: which scale and zero point a group gets."""

from quattuor.scales.absmax import AbsMax
from quattuor.scales.base import Grid, ScaleDtype, ScaleRule
from quattuor.scales.bilevel import Bilevel
from quattuor.scales.binary import Alternating, UniformPlanes
from quattuor.scales.kmeans import WeightedKMeans
from quattuor.scales.minmax import MinMax
from quattuor.scales.output_clip import OutputClip
from quattuor.scales.root_mean_square import RootMeanSquare
from quattuor.scales.search import ClipSearch
from quattuor.scales.two_level import TwoLevel
from quattuor.scales.window_search import WindowSearch

__all__ = [
    "AbsMax",
    "Alternating",
    "Bilevel",
    "ClipSearch",
    "Grid",
    "MinMax",
    "OutputClip",
    "RootMeanSquare",
    "ScaleDtype",
    "ScaleRule",
    "TwoLevel",
    "UniformPlanes",
    "WeightedKMeans",
    "WindowSearch",
]
