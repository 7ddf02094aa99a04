# SPDX-License-Identifier: Apache-2.0
"""QQQ's recipe: which part each option chooses."""

import pytest

from quattuor.activations import DynamicQuantizer
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.scales import ClipSearch, TwoLevel
from quattuor.solvers import WeightQuantizer
from quattuor.systems import qqq
from quattuor.transforms import AdaptiveSmoothing, FoldNorms, RotateHeads, RotateResidual


def weights_of(**options: object) -> WeightQuantizer:
    weights = qqq(**options).weights
    assert weights is not None
    return weights


def inner_search(**options: object) -> ClipSearch:
    scales = weights_of(group_size=64, **options).scales
    assert isinstance(scales, TwoLevel)
    return scales.inner


def test_granularity_chooses_the_grid() -> None:
    assert weights_of().number_format.bits == 4
    assert weights_of(group_size=None).granularity == PerChannel()
    assert isinstance(weights_of(group_size=None).number_format, Integer)
    assert isinstance(weights_of(group_size=None).scales, ClipSearch)
    assert weights_of(group_size=64).granularity == PerGroup(64)
    assert weights_of(group_size=64).number_format == TwoLevelInteger(4)
    assert isinstance(weights_of(group_size=64).scales, TwoLevel)


def test_activations_are_int8_per_token() -> None:
    assert qqq().activations == DynamicQuantizer()
    assert qqq().activations.bits == 8


def test_solver_reads_the_hessian() -> None:
    assert "hessian" in weights_of().solver.needs


@pytest.mark.parametrize("group_size", [None, 64])
def test_without_sign_choice_the_range_is_symmetric(group_size: int | None) -> None:
    weights = weights_of(group_size=group_size, choose_sign=False)
    search = weights.scales.inner if isinstance(weights.scales, TwoLevel) else weights.scales
    assert isinstance(search, ClipSearch)
    assert not search.choose_sign
    if group_size is None:
        assert weights.number_format.code_range == (-7, 7)


def test_clip() -> None:
    assert inner_search(clip="weighted").weighted
    assert not inner_search(clip="plain").weighted
    assert inner_search(clip="plain").fractions()[-1] < 0.5
    assert inner_search(clip="none").fractions() == [1.0]


def test_transforms_in_order() -> None:
    kinds = [type(transform) for transform in qqq(rotation=True, smoothing=True).transforms]
    assert kinds == [FoldNorms, RotateResidual, RotateHeads, AdaptiveSmoothing]
    assert qqq(rotation=False, smoothing=False).transforms == ()


def test_integer_group_scales() -> None:
    for integer in (True, False):
        scales = weights_of(group_size=128, integer_group_scales=integer).scales
        assert isinstance(scales, TwoLevel)
        assert scales.integer is integer


def test_refusals() -> None:
    with pytest.raises(
        UnsupportedError, match=r"bits=8 leaves less than one int8 step.*integer_group_scales=False"
    ):
        qqq(8, 128)
    with pytest.raises(InputError, match=r"GPTQ: damping"):
        qqq(damping=0.0)
