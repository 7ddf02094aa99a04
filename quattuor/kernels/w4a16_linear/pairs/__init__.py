# SPDX-License-Identifier: Apache-2.0
"""The kernels for one token and groups: two groups are summed at once, in columns that one token leaves empty."""

from quattuor.kernels.w4a16_linear.pairs.product_kernel import launch_pairs

__all__ = ["launch_pairs"]
