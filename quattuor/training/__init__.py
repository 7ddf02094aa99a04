# SPDX-License-Identifier: Apache-2.0
"""Training of what a packed model holds in floating point."""

from quattuor.training.weak_columns import TunableColumns, keep_columns_, make_tunable_, tune_weak_columns

__all__ = ["TunableColumns", "keep_columns_", "make_tunable_", "tune_weak_columns"]
