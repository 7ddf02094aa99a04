# SPDX-License-Identifier: Apache-2.0
"""QQQ: 4-bit weights, 8-bit activations."""

from typing import Literal

from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import InputPolicy, Recipe
from quattuor.scales import ClipSearch, TwoLevel
from quattuor.solvers import GPTQ, CoordinateDescent, Solver, TargetCorrection, WeightQuantizer
from quattuor.transforms import AdaptiveSmoothing, FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.base import Transform

__all__ = ["qqq"]


def qqq(
    bits: int = 4,
    group_size: int | None = None,
    *,
    rotation: bool = True,
    smoothing: bool = False,
    choose_sign: bool = True,
    integer_group_scales: bool = True,
    clip: Literal["none", "plain", "weighted"] = "weighted",
    inputs: InputPolicy = "rounded",
    num_passes: int = 2,
    correct_targets: bool = False,
    sequential: bool = False,
    damping: float = 0.01,
) -> Recipe:
    """QQQ: make activations easy to round, then compensate what rounding the weights breaks.

    Args:
        bits: Width of a weight, 2 to 8.
        group_size: None for one scale per output channel; else groups of this size on an int8 grid per channel.
        rotation: Rotate the residual stream and the heads offline.
        smoothing: Search a threshold per site above which channels are scaled down.
        choose_sign: Let scales be negative, so that all 2^bits levels are used.
        integer_group_scales: Round group scales to integers, so that nothing is rounded twice.
        clip: Search smaller ranges by the error weighted with the Hessian's diagonal, by the plain one, or not.
        inputs: What the Hessian is computed from, see `Recipe.inputs`.
        num_passes: Passes of coordinate descent, with a gain per channel, after the column feedback; 0 for none.
        correct_targets: Aim at the original model's outputs; needs `sequential`.
        sequential: Collect each site after the earlier ones of its block are quantized.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.

    References:
        Zhang et al., 2024, arXiv:2406.09904. See docs/systems/qqq.md.
    """
    transforms: tuple[Transform, ...] = ()
    if rotation:
        transforms += (FoldNorms(), RotateResidual(), RotateHeads())
    if smoothing:
        transforms += (AdaptiveSmoothing(),)
    search = ClipSearch(weighted=clip == "weighted", choose_sign=choose_sign)
    if clip == "none":
        search = ClipSearch(num_steps=1, smallest=1.0, choose_sign=choose_sign)
    per_channel = group_size is None
    solver: Solver = GPTQ(damping=damping)
    if num_passes:
        solver = CoordinateDescent(start=solver, num_passes=num_passes, damping=damping)
    if correct_targets:
        solver = TargetCorrection(inner=solver, damping=damping)
    return Recipe(
        systems=("qqq",),
        transforms=transforms,
        weights=WeightQuantizer(
            number_format=Integer(bits, narrow=not choose_sign) if per_channel else TwoLevelInteger(bits),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=search if per_channel else TwoLevel(inner=search, integer=integer_group_scales),
            solver=solver,
        ),
        activations=DynamicQuantizer(),
        inputs=inputs,
        sequential=sequential,
    )
