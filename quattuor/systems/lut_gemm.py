# SPDX-License-Identifier: Apache-2.0
"""LUT-GEMM: weights as a few signed scales, so that a product is a sum of table entries."""

from quattuor.formats import BinaryCoding
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.scales import Alternating, UniformPlanes
from quattuor.solvers import Nearest, WeightQuantizer

__all__ = ["lut_gemm"]


def lut_gemm(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    rounds: int = 15,
    offset: bool = True,
    uniform: bool = False,
) -> Recipe:
    """LUT-GEMM: binary coding, fitted by alternation from a greedy and from a uniform start; no data is used.

    Args:
        bits: Number of planes, 1 to 8.
        group_size: Weights along the input that share scales; None for one set per output channel.
        rounds: Rounds of alternation; 0 keeps the better start.
        offset: Whether a group has a constant term, 16 bits each; the authors' alternation has none.
        uniform: Convert the symmetric uniform grid instead, exactly (the numbers are those of rtn); from 2 bits.

    References:
        Park et al., 2022, arXiv:2206.09557. See docs/systems/lut_gemm.md.
    """
    return Recipe(
        systems=("lut_gemm",),
        weights=WeightQuantizer(
            number_format=BinaryCoding(bits),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=UniformPlanes() if uniform else Alternating(rounds=rounds, offset=offset),
            solver=Nearest(),
        ),
    )
