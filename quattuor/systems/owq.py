# SPDX-License-Identifier: Apache-2.0
"""OWQ: GPTQ on all but the few input columns whose rounding would hurt most."""

from typing import Literal

from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.outliers import WeakColumns
from quattuor.recipe import Recipe
from quattuor.scales import MinMax, ScaleRule, WindowSearch
from quattuor.solvers import GPTQ, WeightQuantizer

__all__ = ["owq"]


def owq(
    bits: int = 3,
    group_size: int | None = None,
    *,
    target_bits: float | None = None,
    num_columns: int | None = None,
    weighted_by_error: bool = True,
    clip: Literal["none", "plain", "weighted"] = "weighted",
    act_order: bool = False,
    groups: Literal["static", "fresh"] = "static",
    sequential: bool = False,
    damping: float = 0.01,
) -> Recipe:
    """OWQ: weak columns stay in float16 and absorb the errors of the columns that GPTQ rounds.

    Args:
        bits: Width of a weight, 2 to 8; the paper has 3 and 4.
        group_size: Weights along the input that share a scale and zero point; None for one per output channel.
        target_bits: Bits per weight of codes and weak columns, shared out so that all linears get as many weak
            parameters; None for bits + 0.1 unless num_columns is given. Equal to bits, it keeps no column.
        num_columns: Weak columns of every linear instead of a budget.
        weighted_by_error: Rank columns by H_jj times their rounding error; off ranks them by H_jj alone.
        clip: Search scale and zero point together, by the error weighted with the Hessian's diagonal ("weighted"),
            by the authors' plain error of exponent 2.4 ("plain", slow), or take the full range ("none").
        act_order: Take the other columns by falling activation energy instead of as they are.
        groups: Fit the scales of a group before any rounding, or when it is reached; see gptq.
        sequential: Collect the inputs of each site after the earlier ones of its block are quantized.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.

    References:
        Lee et al., 2023, arXiv:2306.02272. See docs/systems/owq.md.
    """
    if target_bits is None and num_columns is None:
        target_bits = bits + 0.1
    scales: dict[str, ScaleRule] = {
        "none": MinMax(),
        "plain": WindowSearch(norm=2.4, weighted=False),
        "weighted": WindowSearch(),
    }
    weak = WeakColumns(target_bits=target_bits, num_columns=num_columns, weighted_by_error=weighted_by_error)
    return Recipe(
        systems=("owq",),
        weights=WeightQuantizer(
            number_format=Integer(bits, symmetric=False),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=scales[clip],
            solver=GPTQ(order="activation" if act_order else "natural", groups=groups, damping=damping),
            outliers=None if target_bits == bits or num_columns == 0 else weak,
        ),
        sequential=sequential,
    )
