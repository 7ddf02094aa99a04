# SPDX-License-Identifier: Apache-2.0
"""Kernels whose weight lies in the order in which the lanes of a warp multiply it; see the README one level up."""

from quattuor.kernels.lut_linear.lanes.implementation import Lanes

__all__ = ["Lanes"]
