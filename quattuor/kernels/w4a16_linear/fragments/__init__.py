# SPDX-License-Identifier: Apache-2.0
"""The kernel for few tokens whose words go from memory to operands of products; see the README one level up."""

from quattuor.kernels.w4a16_linear.fragments.kernel import launch_fragments

__all__ = ["launch_fragments"]
