# SPDX-License-Identifier: Apache-2.0
"""SpQR: small groups with packed statistics, and single weights kept where rounding would cost too much."""

from typing import Literal

from quattuor.formats import BilevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.outliers import ErrorThreshold
from quattuor.recipe import Recipe
from quattuor.scales import Bilevel
from quattuor.solvers import GPTQ, WeightQuantizer

__all__ = ["spqr"]


def spqr(
    bits: int = 3,
    group_size: int | None = 16,
    *,
    scale_bits: int | None = 3,
    zero_bits: int | None = 3,
    row_group: int = 16,
    outlier_threshold: float | None = 0.2,
    leave_one_out: bool = True,
    act_order: bool = True,
    groups: Literal["fresh", "static"] = "fresh",
    sequential: bool = False,
    damping: float = 1.0,
) -> Recipe:
    """SpQR: GPTQ in small groups whose scales and zero points take three bits, with float16 outliers.

    Args:
        bits: Width of a weight, 2 to 8; the paper has 3 and 4.
        group_size: Weights along the input that share a scale and zero point; None for one per output channel.
        scale_bits: Width of a scale, on a grid that row_group rows share; None stores it in float16.
        zero_bits: Width of a zero point, likewise.
        row_group: Consecutive rows that share the second level; divides the output features of every linear.
        outlier_threshold: Rounding errors above so many times the mean column's energy make an outlier: larger
            keeps fewer. None keeps none.
        leave_one_out: Leave weights out of the range of their group whose absence gains more than the threshold.
        act_order: Take columns by falling activation energy instead of as they are.
        groups: Fit the scales of a group when it is reached, which together with act_order permutes inputs at run
            time, or before any rounding ("static"), which permutes nothing.
        sequential: Collect the inputs of each site after the earlier ones of its block are quantized.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.

    References:
        Dettmers et al., 2023, arXiv:2306.03078. See docs/systems/spqr.md.
    """
    outliers = None
    if outlier_threshold is not None:
        outliers = ErrorThreshold(relative=outlier_threshold, leave_one_out=leave_one_out)
    return Recipe(
        systems=("spqr",),
        weights=WeightQuantizer(
            number_format=BilevelInteger(bits, scale_bits, zero_bits, row_group),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=Bilevel(),
            solver=GPTQ(order="activation" if act_order else "natural", groups=groups, damping=damping),
            outliers=outliers,
        ),
        sequential=sequential,
    )
