# SPDX-License-Identifier: Apache-2.0
"""Function-preserving changes of a model's weights: rotations and changes of scale."""

from quattuor.transforms.base import RotationTransform, SiteProblem, SiteTransform, Transform
from quattuor.transforms.hadamard import hadamard, has_hadamard
from quattuor.transforms.incoherence import Incoherence
from quattuor.transforms.rotation import FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.scale_search import ActivationAwareScale
from quattuor.transforms.scaling import MigrateScale
from quattuor.transforms.smoothing import AdaptiveSmoothing

__all__ = [
    "TRANSFORMS",
    "ActivationAwareScale",
    "AdaptiveSmoothing",
    "FoldNorms",
    "Incoherence",
    "MigrateScale",
    "RotateHeads",
    "RotateResidual",
    "RotationTransform",
    "SiteProblem",
    "SiteTransform",
    "Transform",
    "hadamard",
    "has_hadamard",
]

TRANSFORMS: tuple[type[Transform], ...] = (
    FoldNorms,
    RotateResidual,
    RotateHeads,
    MigrateScale,
    AdaptiveSmoothing,
    ActivationAwareScale,
)
"""Every transform that a recipe may name."""
