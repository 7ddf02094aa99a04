# SPDX-License-Identifier: Apache-2.0
"""Number formats: which numbers exist, and how codes become bytes."""

from quattuor.formats.base import Format, Parameters
from quattuor.formats.integer import Integer
from quattuor.formats.two_level import TwoLevelInteger

__all__ = ["Format", "Integer", "Parameters", "TwoLevelInteger"]
