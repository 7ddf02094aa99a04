# SPDX-License-Identifier: Apache-2.0
"""The kernels for few tokens, whose tensor cores multiply bytes of codes by bytes of tokens; see the README."""

from quattuor.kernels.w4a16_linear.digits.product_kernel import launch_digits

__all__ = ["launch_digits"]
