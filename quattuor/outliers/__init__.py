# SPDX-License-Identifier: Apache-2.0
"""Rules that keep entries of a weight in high precision."""

from quattuor.outliers.base import OutlierRule, Selection
from quattuor.outliers.error_threshold import ErrorThreshold
from quattuor.outliers.magnitude import SensitiveAndLarge
from quattuor.outliers.weak_columns import WeakColumns

__all__ = [
    "ErrorThreshold",
    "OutlierRule",
    "Selection",
    "SensitiveAndLarge",
    "WeakColumns",
]
