# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column, and let the columns that are still free take the error back."""

from typing import Literal

from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.scales import AbsMax, ClipSearch, MinMax, ScaleRule, WindowSearch
from quattuor.solvers import GPTQ, WeightQuantizer

__all__ = ["gptq"]


def gptq(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = False,
    act_order: bool = True,
    groups: Literal["static", "fresh", "stale"] = "static",
    clip: Literal["none", "plain", "weighted"] = "none",
    sequential: bool = True,
    damping: float = 0.01,
) -> Recipe:
    """GPTQ: rounding to nearest with the error of each column pushed onto the columns behind it.

    Args:
        bits: Width of a weight, 2 to 8.
        group_size: Weights along the input that share a scale; None for one scale per output channel.
        symmetric: Scales of either sign around zero; off stores a zero point with each scale.
        act_order: Take columns by falling activation energy instead of as they are.
        groups: Fit the scales of a group before any rounding ("static"), to the weights that have taken errors
            back when the group is reached ("fresh", which together with act_order permutes inputs at run time), or
            like the authors' code to weights that miss the errors of the last columns ("stale").
        clip: Search smaller ranges by the error weighted with the Hessian's diagonal ("weighted"), by the authors'
            plain error of exponent 2.4 ("plain"), or not.
        sequential: Collect the inputs of each site after the earlier ones of its block are quantized.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.

    References:
        Frantar et al., 2022, arXiv:2210.17323. See docs/systems/gptq.md.
    """
    plain = ClipSearch(num_steps=100, norm=2.4, weighted=False, choose_sign=symmetric, scale_dtype="float16")
    searched = ClipSearch(num_steps=100, choose_sign=True, scale_dtype="float16")
    scales: dict[str, ScaleRule] = {
        "none": AbsMax(choose_sign=True, scale_dtype="float16") if symmetric else MinMax(),
        "plain": plain,
        "weighted": searched if symmetric else WindowSearch(),
    }
    return Recipe(
        systems=("gptq",),
        weights=WeightQuantizer(
            number_format=Integer(bits, symmetric=symmetric),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=scales[clip],
            solver=GPTQ(order="activation" if act_order else "natural", groups=groups, damping=damping),
        ),
        sequential=sequential,
    )
