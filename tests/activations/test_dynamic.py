# SPDX-License-Identifier: Apache-2.0
"""DynamicQuantizer against its definition in exact fractions, and the tokens that are not ordinary."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from quattuor.activations import DynamicQuantizer
from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import Integer
from quattuor.granularity import PerTensor

QUANTIZER = DynamicQuantizer()
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_tokens(dtype: torch.dtype, shape: tuple[int, ...] = (9, 33)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_definition(dtype: torch.dtype) -> None:
    x = make_tokens(dtype)
    codes, scale = QUANTIZER.encode(x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (9,)
    for token, row, step in zip(x.tolist(), codes.tolist(), scale.tolist(), strict=True):
        exact = max(map(abs, map(Fraction, token))) / 127
        assert step == pytest.approx(float(exact), rel=2**-23)
        for value, code in zip(token, row, strict=True):
            quotient = Fraction(value) / Fraction(step)
            # The float32 quotient is within 2^-24 of the exact one, so only a near-tie may differ.
            assert abs(code - quotient) <= Fraction(1, 2) + abs(quotient) * Fraction(1, 2**23)
        assert max(map(abs, row)) == 127


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_is_scale_times_codes(dtype: torch.dtype) -> None:
    x = make_tokens(dtype, (2, 3, 4, 33))
    faked = QUANTIZER.fake_quantize(x)
    assert faked.dtype == dtype
    assert faked.shape == x.shape
    codes, scale = QUANTIZER.encode(x.reshape(-1, 33))
    assert torch.equal(faked.reshape(-1, 33), (codes.float() * scale[:, None]).to(dtype))
    bound = scale.view(2, 3, 4, 1) * 0.5 + x.abs().float() * 2.0**-8  # half a step, and the rounding of the dtype
    assert ((faked.float() - x.float()).abs() <= bound).all()


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert QUANTIZER.encode(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_their_batch(dtype: torch.dtype) -> None:
    x = make_tokens(dtype)
    codes, scale = QUANTIZER.encode(x)
    for index in range(len(x)):
        alone = QUANTIZER.encode(x[index : index + 1])
        assert torch.equal(alone[0][0], codes[index])
        assert torch.equal(alone[1][0], scale[index])
    strided = make_tokens(dtype, (33, 9)).T
    assert torch.equal(QUANTIZER.encode(strided)[0], QUANTIZER.encode(strided.contiguous())[0])
    assert torch.equal(QUANTIZER.fake_quantize(strided), QUANTIZER.fake_quantize(strided.contiguous()))


def test_no_tokens() -> None:
    codes, scale = QUANTIZER.encode(torch.empty(0, 8))
    assert codes.shape == (0, 8)
    assert scale.shape == (0,)
    assert QUANTIZER.fake_quantize(torch.empty(2, 0, 8)).shape == (2, 0, 8)


def test_tokens_of_zeros_and_tokens_that_are_not_finite() -> None:
    x = torch.ones(5, 4)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 0] = torch.inf
    codes, scale = QUANTIZER.encode(x)
    assert codes[1].tolist() == [0] * 4
    assert scale[1] == 0
    faked = QUANTIZER.fake_quantize(x)
    assert torch.equal(faked[[0, 1, 4]], x[[0, 1, 4]])
    assert faked[2].isnan().all(), "a broken token stays visibly broken"
    assert faked[3].isnan().all()


def test_tiny_and_huge_tokens() -> None:
    x = torch.tensor([[1e-38, -1e-38, 0.0], [3e38, -3e38, 1e38]])
    faked = QUANTIZER.fake_quantize(x)
    assert torch.isfinite(faked).all()
    assert torch.allclose(faked, x, rtol=0.01)


def test_refusals() -> None:
    with pytest.raises(UnsupportedError, match=r"is not symmetric int8 per token; use Integer\(8, narrow=True\)"):
        DynamicQuantizer(number_format=Integer(8))
    with pytest.raises(UnsupportedError, match=r"is not symmetric int8 per token"):
        DynamicQuantizer(granularity=PerTensor())
    with pytest.raises(InputError, match=r"x.dtype=torch.float64 is not float16 or bfloat16 or float32"):
        QUANTIZER.encode(torch.ones(2, 4, dtype=torch.float64))
    assert QUANTIZER.bits == 8
