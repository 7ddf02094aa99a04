# SPDX-License-Identifier: Apache-2.0
"""SqueezeLLM: a codebook per output channel, weighted by squared gradients, and a few entries kept aside."""

from quattuor.formats import Codebook
from quattuor.granularity import PerChannel, PerGroup
from quattuor.outliers import SensitiveAndLarge
from quattuor.recipe import Recipe
from quattuor.scales import WeightedKMeans
from quattuor.solvers import Nearest, WeightQuantizer

__all__ = ["squeezellm"]


def squeezellm(
    bits: int = 4,
    group_size: int | None = None,
    *,
    sensitive_share: float = 0.0005,
    large_share: float = 0.004,
    exact: bool = False,
) -> Recipe:
    """SqueezeLLM: Fisher-weighted k-means per output channel, with sensitive and large weights in float16.

    Args:
        bits: Width of a weight, 1 to 8; the paper has 3 and 4.
        group_size: Weights along the input that share a codebook; None for one codebook per output channel.
        sensitive_share: Share of each matrix that is kept for its squared gradient; 0 together with large_share=0
            keeps nothing (the paper's dense variant).
        large_share: Share of each matrix that is kept for its magnitude.
        exact: Find the codebook of smallest error; ten times slower, for a permille less error.

    References:
        Kim et al., 2023, arXiv:2306.07629. See docs/systems/squeezellm.md.
    """
    outliers = SensitiveAndLarge(sensitive_share=sensitive_share, large_share=large_share)
    return Recipe(
        systems=("squeezellm",),
        weights=WeightQuantizer(
            number_format=Codebook(bits),
            granularity=PerChannel() if group_size is None else PerGroup(group_size),
            scales=WeightedKMeans(method="exact" if exact else "search"),
            solver=Nearest(weighted=True, sensitivity="fisher"),
            outliers=outliers if sensitive_share or large_share else None,
        ),
    )
