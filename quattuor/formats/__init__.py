# SPDX-License-Identifier: Apache-2.0
"""Number formats: which numbers exist, and how codes become bytes."""

from quattuor.formats.base import Format, Parameters
from quattuor.formats.bilevel import BilevelInteger
from quattuor.formats.binary import BinaryCoding
from quattuor.formats.codebook import Codebook
from quattuor.formats.integer import Integer
from quattuor.formats.mid_rise import MidRise
from quattuor.formats.two_level import TwoLevelInteger

__all__ = [
    "BilevelInteger",
    "BinaryCoding",
    "Codebook",
    "Format",
    "Integer",
    "MidRise",
    "Parameters",
    "TwoLevelInteger",
]
