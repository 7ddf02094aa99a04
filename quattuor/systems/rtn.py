# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: the baseline every system is measured against."""

from quattuor.activations import DynamicQuantizer
from quattuor.errors import UnsupportedError, compose
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.recipe import Recipe
from quattuor.scales import AbsMax, ClipSearch, ScaleDtype, TwoLevel
from quattuor.solvers import Nearest, WeightQuantizer

__all__ = ["rtn"]


def rtn(
    bits: int = 4,
    group_size: int | None = 128,
    *,
    symmetric: bool = True,
    activation_bits: int | None = None,
) -> Recipe:
    """RTN: every weight becomes the nearest number of an absolute-maximum grid; no data is used.

    Args:
        bits: Width of a weight, 2 to 8.
        group_size: Weights along the input that share a scale; None for one scale per output channel.
        symmetric: Whether zero is the middle code, or a zero point is stored (floating-point activations only).
        activation_bits: 8 for int8 per token at run time; None for floating-point activations. With groups and 8,
            groups sit on an int8 grid per channel, so that the product is one of integers.

    Raises:
        InputError: A width or group size that does not exist.
        UnsupportedError: Activations of another width, or a zero point together with quantized activations.
    """
    if activation_bits is not None and not symmetric:
        raise UnsupportedError(
            compose(
                subject="symmetric",
                value=symmetric,
                constraint="has no integer product with 8-bit activations",
                place="rtn",
                remedy="use symmetric=True, or activation_bits=None for floating-point activations",
            )
        )
    granularity = PerChannel() if group_size is None else PerGroup(group_size)
    if activation_bits is None:
        scale_dtype: ScaleDtype = "float32" if group_size is None else "float16"
        weights = WeightQuantizer(
            number_format=Integer(bits, symmetric=symmetric),
            granularity=granularity,
            scales=AbsMax(scale_dtype=scale_dtype),
            solver=Nearest(),
        )
        return Recipe(systems=("rtn",), weights=weights)
    return Recipe(
        systems=("rtn",),
        weights=WeightQuantizer(
            number_format=Integer(bits) if group_size is None else TwoLevelInteger(bits),
            granularity=granularity,
            scales=AbsMax()
            if group_size is None
            else TwoLevel(inner=ClipSearch(num_steps=1, smallest=1.0), integer=False, refine=False),
            solver=Nearest(),
        ),
        activations=DynamicQuantizer(number_format=Integer(activation_bits, narrow=True)),
    )
