# SPDX-License-Identifier: Apache-2.0
"""Which kernels of a stream run at the same time: the `overlap` of a tile, in kernels and in their launches."""

import triton.language as tl

from quattuor.kernels.w4a8_linear.triton_kernel import EARLY, LATE, NONE

__all__ = ["EARLY", "LATE", "NONE", "OVERLAPS", "OWN"]

#: The product beside the kernel that prepares its tokens; the kernel after the product starts when it is done.
OWN = tl.constexpr(3)

OVERLAPS = {"none": NONE, "own": OWN, "early": EARLY, "late": LATE}
