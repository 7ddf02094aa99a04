# SPDX-License-Identifier: Apache-2.0
"""The kernels for few tokens, whose weight goes from memory straight to the lanes that multiply it."""

from quattuor.kernels.w4a16_linear.lanes.product_kernel import launch_lanes

__all__ = ["launch_lanes"]
