# SPDX-License-Identifier: Apache-2.0
"""AbsMax against its formula, worked out by hand."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import UnsupportedError
from quattuor.formats import Format, Integer, TwoLevelInteger
from quattuor.scales import AbsMax


def grouped(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_formula(bits: int) -> None:
    scale = AbsMax().fit(grouped(0.5, -3.0, 1.0), Integer(bits))["scale"]
    assert scale.item() == pytest.approx(3.0 / (2 ** (bits - 1) - 1), rel=1e-6)
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", [1, -1])
def test_choose_sign_puts_the_extreme_on_the_lowest_code(bits: int, sign: int) -> None:
    number_format = Integer(bits)
    lowest, highest = number_format.code_range
    values = grouped(*(sign * torch.linspace(-1, 1 + 1e-3, 4096)).tolist())
    parameters = AbsMax(choose_sign=True).fit(values, number_format)
    assert parameters["scale"].item() == pytest.approx(sign * -(1 + 1e-3) / 2 ** (bits - 1), rel=1e-5)
    codes = number_format.encode(values, parameters)
    assert codes.unique().numel() == 2**bits
    assert codes[values == values.abs().max() * sign].tolist() == [lowest]
    assert int(codes.max()) == highest
    plain = AbsMax().fit(values, number_format)["scale"]
    assert (parameters["scale"].abs() / plain).item() == pytest.approx(highest / -lowest, rel=1e-6)


def test_asymmetric_formula_contains_zero() -> None:
    number_format = Integer(4, symmetric=False)
    for values, scale, zero_point in (
        (grouped(-1.0, 0.5, 2.0), 3.0 / 15, 5),
        (grouped(1.0, 2.0), 2.0 / 15, 0),
        (grouped(-1.0, -2.0), 2.0 / 15, 15),
    ):
        parameters = AbsMax().fit(values, number_format)
        assert parameters["scale"].item() == pytest.approx(scale, rel=1e-6)
        assert parameters["zero_point"].tolist() == [[zero_point]]
        assert parameters["zero_point"].dtype == torch.uint8


def test_each_group_has_its_own_scale() -> None:
    values = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.5, 0.25], [-8.0, 8.0]]])
    scale = AbsMax().fit(values, Integer(4))["scale"]
    assert torch.allclose(scale, torch.tensor([[2.0, 3.0], [0.5, 8.0]]) / 7)


def test_float16_scales_are_stored_and_used() -> None:
    values = grouped(1.0, -0.3)
    parameters = AbsMax(scale_dtype="float16").fit(values, Integer(4))
    assert parameters["scale"].dtype == torch.float16
    assert parameters["scale"].item() == torch.tensor(1.0 / 7).half().item()
    decoded = Integer(4).fake_quantize(values, parameters)
    assert decoded[0, 0, 0].item() == 7 * parameters["scale"].float().item()


def test_float16_zero_point_follows_the_stored_scale() -> None:
    # 12.4 / 15 in float16 is off by 2^-12; with 8 bits that moves zero points near a tie.
    values = torch.rand(1, 400, 16, generator=torch.Generator().manual_seed(0)) * 10 - 7
    number_format = Integer(8, symmetric=False)
    parameters = AbsMax(scale_dtype="float16").fit(values, number_format)
    low = values.amin(-1).clamp(max=0)
    assert torch.equal(parameters["zero_point"].float(), (-low / parameters["scale"].float()).round())


@pytest.mark.parametrize("number_format", [Integer(4, narrow=True), Integer(4, symmetric=False)], ids=str)
def test_sign_choice_needs_an_extra_code(number_format: Format) -> None:
    with pytest.raises(
        UnsupportedError, match=r"AbsMax: choose_sign=True gains nothing with .*; use choose_sign=False"
    ):
        AbsMax(choose_sign=True).fit(torch.ones(1, 1, 4), number_format)


def test_other_formats_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"AbsMax: format=.* is not a uniform integer; use Integer"):
        AbsMax().fit(torch.ones(1, 1, 4), TwoLevelInteger(4))


def test_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"is beyond the range of float16; use scale_dtype"):
        AbsMax(scale_dtype="float16").fit(grouped(7e5, 1.0), Integer(4))
    assert AbsMax().fit(grouped(7e5, 1.0), Integer(4))["scale"].item() == pytest.approx(1e5)
