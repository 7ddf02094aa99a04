# SPDX-License-Identifier: Apache-2.0
"""AWQ: scale salient channels up before rounding, weights only."""

from quattuor.formats import Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.rules import Rule
from quattuor.scales import MinMax, OutputClip
from quattuor.solvers import Nearest, WeightQuantizer
from quattuor.transforms import ActivationAwareScale

__all__ = ["awq"]


def awq(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    clip: bool = True,
    include_zero: bool = True,
    include_one: bool = False,
    share_values: bool = False,
    max_sequences: int | None = None,
) -> Recipe:
    """AWQ: scale each input channel by a power of its mean activation, clip, round to the nearest.

    Args:
        bits: Width of a weight, 2 to 8.
        group_size: Weights along the input that share a scale and zero point; None for one per output channel.
        clip: Search smaller ranges by the output error on sampled inputs, except for queries and keys.
        include_zero: Stretch every range to contain zero; off reproduces the authors' grid.
        include_one: Also try the exponent 1 in the search of the scales.
        share_values: Scale values also where several query heads read one value head, which the authors skip.
        max_sequences: Calibration sequences that the search of the scales measures errors on; None uses all.

    References:
        Lin et al., 2023, arXiv:2306.00978. See docs/systems/awq.md.
    """
    minmax = MinMax(include_zero=include_zero)
    plain = WeightQuantizer(
        number_format=Integer(bits, symmetric=False),
        granularity=PerChannel() if group_size is None else PerGroup(group_size),
        scales=minmax,
        solver=Nearest(),
    )
    clipped = WeightQuantizer(
        number_format=plain.number_format,
        granularity=plain.granularity,
        scales=OutputClip(inner=minmax),
        solver=Nearest(),
    )
    return Recipe(
        systems=("awq",),
        transforms=(
            ActivationAwareScale(include_one=include_one, share_values=share_values, max_sequences=max_sequences),
        ),
        weights=clipped if clip else plain,
        rules=(Rule(roles=("query", "key"), weights=plain),) if clip else (),
        inputs="original",
    )
