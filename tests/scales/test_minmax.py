# SPDX-License-Identifier: Apache-2.0
"""Ranges of the data, with and without zero, with and without some entries."""

import pytest
import torch

from quattuor.errors import UnsupportedError
from quattuor.formats import Integer
from quattuor.scales import AbsMax, MinMax
from quattuor.scales.minmax import group_range

FORMAT = Integer(4, symmetric=False)


def test_is_the_asymmetric_absmax_when_zero_is_inside(generator: torch.Generator) -> None:
    values = torch.randn(5, 3, 16, generator=generator)
    fitted, expected = MinMax(scale_dtype="float32").fit(values, FORMAT), AbsMax().fit(values, FORMAT)
    assert torch.equal(fitted["scale"], expected["scale"])
    assert torch.equal(fitted["zero_point"], expected["zero_point"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_group(sign: float) -> None:
    values = sign * torch.tensor([[[1.0, 1.3, 1.75, 2.5]]])
    safe = FORMAT.fake_quantize(values, MinMax().fit(values, FORMAT))
    assert (safe - values).abs().max() < 2.5 / 15 / 2 + 1e-3
    # The parity switch: a finer scale whose zero point is clamped, so that the far end saturates.
    parameters = MinMax(include_zero=False).fit(values, FORMAT)
    assert parameters["scale"].item() == pytest.approx(0.1, rel=1e-3)
    assert parameters["zero_point"].item() == (0 if sign > 0 else 15)
    assert FORMAT.fake_quantize(values, parameters)[0, 0, 3].abs() == pytest.approx(1.5, rel=1e-3)


def test_entries_without_importance_do_not_count() -> None:
    values = torch.tensor([[[0.5, -0.25, 90.0, 0.1]], [[1.0, -1.0, 0.5, -70.0]]])
    importance = torch.tensor([[[1.0, 0.1, 0.0, 1.0]], [[1.0, 1.0, 1.0, 0.0]]])
    fitted = MinMax(scale_dtype="float32").fit(values, FORMAT, importance)
    assert torch.allclose(fitted["scale"], torch.tensor([[0.75], [2.0]]) / 15)
    low, high = group_range(values, torch.zeros(1, 1, 4), include_zero=False)
    assert low.tolist() == high.tolist() == [[0.0], [0.0]]
    low, high = group_range(values, None, include_zero=False)
    assert (low[0].item(), high[0].item()) == (-0.25, 90.0)


def test_refuses_formats_without_a_zero_point() -> None:
    with pytest.raises(
        UnsupportedError, match=r"MinMax: format=.* has no zero point; use Integer\(bits, symmetric=F"
    ):
        MinMax().check(Integer(4))
