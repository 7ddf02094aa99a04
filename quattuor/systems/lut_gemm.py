# SPDX-License-Identifier: Apache-2.0
"""LUT-GEMM: weights as a few signed scales, so that a product is a sum of table entries."""

from typing import Literal

from quattuor.formats import BinaryCoding
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.scales import Alternating, UniformPlanes
from quattuor.solvers import GPTQ, Nearest, Solver, WeightQuantizer

__all__ = ["lut_gemm"]


def lut_gemm(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    rounds: int = 15,
    offset: bool = True,
    uniform: bool = False,
    rounding: Literal["feedback", "weighted", "nearest"] = "feedback",
    sequential: bool = True,
    damping: float = 0.01,
) -> Recipe:
    """LUT-GEMM: binary coding, fitted by alternation from a greedy and from a uniform start.

    Args:
        bits: Number of planes, 1 to 8.
        group_size: Weights along the input that share scales; None for one set per output channel.
        rounds: Rounds of alternation; 0 keeps the better start.
        offset: Whether a group has a constant term, 16 bits each; the authors' alternation has none.
        uniform: Convert the symmetric uniform grid instead, exactly; from 2 bits. With rounding="nearest" the
            numbers are those of rtn, with "feedback" the codes are those of GPTQ.
        rounding: Weight the alternation by the Hessian's diagonal and push errors onto later columns
            ("feedback"), only weight it ("weighted"), or use no data, like the authors' code ("nearest").
        sequential: With feedback, collect the inputs of each site after the earlier ones of its block are done.
        damping: Added to the Hessian's diagonal, as a fraction of its mean; with feedback.

    References:
        Park et al., 2022, arXiv:2206.09557. See docs/systems/lut_gemm.md.
    """
    solvers: dict[str, Solver] = {
        "feedback": GPTQ(damping=damping),
        "weighted": Nearest(weighted=True),
        "nearest": Nearest(),
    }
    return Recipe(
        systems=("lut_gemm",),
        weights=WeightQuantizer(
            number_format=BinaryCoding(bits),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=UniformPlanes() if uniform else Alternating(rounds=rounds, offset=offset),
            solver=solvers[rounding],
        ),
        sequential=sequential and rounding == "feedback",
    )
