# SPDX-License-Identifier: Apache-2.0
"""SpQR's recipe: which part each option is, and what is stored (2306.03078)."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from quattuor.deltas import ElementDelta
from quattuor.errors import InputError
from quattuor.formats import BilevelInteger
from quattuor.granularity import PerGroup
from quattuor.nn.linear import QuantizedLinear
from quattuor.outliers import ErrorThreshold
from quattuor.quantize import quantize
from quattuor.scales import Bilevel
from quattuor.solvers import GPTQ, WeightToQuantize
from quattuor.systems import spqr

TOKENS = torch.randint(0, 255, (4, 48), generator=torch.Generator().manual_seed(5))


def test_defaults() -> None:
    weights = spqr().weights
    assert weights is not None
    assert weights.number_format == BilevelInteger(3, 3, 3, 16)
    assert weights.granularity == PerGroup(16)
    assert weights.scales == Bilevel()
    assert weights.solver == GPTQ(damping=1.0, order="activation", groups="fresh")
    assert weights.outliers == ErrorThreshold(relative=0.2)
    assert not spqr().sequential


def test_options() -> None:
    weights = spqr(4, 8, scale_bits=None, zero_bits=4, row_group=32, leave_one_out=False, groups="static").weights
    assert weights is not None
    assert weights.number_format == BilevelInteger(4, None, 4, 32)
    assert weights.outliers == ErrorThreshold(leave_one_out=False)
    assert weights.solver == GPTQ(damping=1.0)
    assert spqr(outlier_threshold=None).weights.outliers is None


def test_measured_bits_are_those_of_the_formula(tiny: Callable[[str], PreTrainedModel]) -> None:
    model = tiny("llama")
    quantize(model, spqr(), TOKENS)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    shares = []
    for module in linears:
        tensor = module.tensor
        rows, columns = tensor.shape
        share = tensor.delta.values.numel() / (rows * columns) if tensor.delta is not None else 0.0
        offsets = 32 * (rows + 1) / (rows * columns) if tensor.delta is not None else 0.0
        # Groups of statistics are padded to whole bytes: 4 groups of 3 bits take 2 bytes, not 1.5.
        statistics = 2 * 8 * -(-3 * columns // 16 // 8) / columns
        expected = 3 + statistics + 64 / 256 + 32 * share + offsets + 32 / rows
        assert tensor.bits_per_weight == pytest.approx(expected, rel=1e-9)
        assert tensor.delta is None or isinstance(tensor.delta, ElementDelta)
        assert tensor.input_map is not None
        shares.append(share)
    assert 0 < sum(shares) / len(shares) < 0.1


def test_static_groups_permute_nothing(generator: torch.Generator) -> None:
    weight, x = torch.randn(16, 32, generator=generator), torch.randn(90, 32, generator=generator)
    item, statistics = WeightToQuantize(name="w", weight=weight), {"hessian": x.T @ x}
    maps = [
        spqr(groups=groups).weights.solve([item], statistics)[0].tensor.input_map for groups in ("static", "fresh")
    ]
    assert maps[0] is None
    assert maps[1] is not None


def test_row_group_that_does_not_divide(tiny: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(
        InputError, match=r"layers.0.*Bilevel: row_group=24 does not divide the \d+ rows.*use a row_"
    ):
        quantize(tiny("llama"), spqr(row_group=24), TOKENS)
