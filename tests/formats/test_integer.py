# SPDX-License-Identifier: Apache-2.0
"""Uniform integers: golden vectors, ranges, dtypes and refusals. The general laws are in the contract."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import Integer, Parameters
from quattuor.scales import AbsMax

U = [-1.3, -0.25, 0.0, 0.2, 1.8]
V = [0.45, 0.85, 1.15, 1.6]


@pytest.mark.parametrize(
    ("number_format", "values", "scale", "codes", "decoded"),
    [
        (Integer(4), U, 0.257143, [-5, -1, 0, 1, 7], [-1.285714, -0.257143, 0, 0.257143, 1.8]),
        (Integer(4), V, 0.228571, [2, 4, 5, 7], [0.457143, 0.914286, 1.142857, 1.6]),
        (Integer(4, narrow=True), U, 0.257143, [-5, -1, 0, 1, 7], [-1.285714, -0.257143, 0, 0.257143, 1.8]),
        (Integer(4, symmetric=False), U, 0.206667, [0, 5, 6, 7, 15], [-1.24, -0.206667, 0, 0.206667, 1.86]),
        (Integer(4, symmetric=False), V, 0.106667, [4, 8, 11, 15], [0.426667, 0.853333, 1.173333, 1.6]),
        (
            Integer(8),
            U,
            1.8 / 127,
            [-92, -18, 0, 14, 127],
            [-1.303937, -0.255118, 0, 0.198425, 1.8],
        ),
    ],
    ids=["symmetric u", "symmetric v", "narrow u", "asymmetric u", "asymmetric v", "int8 u"],
)
def test_golden_vectors(
    number_format: Integer, values: list[float], scale: float, codes: list[int], decoded: list[float]
) -> None:
    # The published quantizers of SmoothQuant (symmetric), QUIK (asymmetric) and LLM.int8(), worked out by hand.
    grouped = torch.tensor(values).view(1, 1, -1)
    parameters = AbsMax().fit(grouped, number_format)
    assert parameters["scale"].item() == pytest.approx(scale, abs=1e-6)
    encoded = number_format.encode(grouped, parameters)
    assert encoded.view(-1).tolist() == codes
    assert number_format.decode(encoded, parameters).view(-1).tolist() == pytest.approx(decoded, abs=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_range(bits: int) -> None:
    half = 2 ** (bits - 1)
    assert Integer(bits).code_range == (-half, half - 1)
    assert Integer(bits, narrow=True).code_range == (1 - half, half - 1)
    assert Integer(bits, symmetric=False).code_range == (0, 2 * half - 1)
    assert Integer(bits).bits == bits


def test_two_float16_tensors_are_divided_in_float32() -> None:
    # 7 * 0.1 in float16 over 0.2 is 3.5 plus or minus a little: float16 division would round it to a tie.
    scale = torch.tensor([[0.199951171875]], dtype=torch.float16)
    values = torch.tensor([[[0.7001953125, 0.69970703125]]], dtype=torch.float16)
    exact = values.double() / scale.double()
    codes = Integer(4).encode(values, Parameters(scale=scale))
    assert codes.tolist() == exact.round().to(torch.int8).tolist()
    assert codes.view(-1).tolist() == [4, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    values = torch.tensor([[[-1.0, 0.5, 0.25]]], dtype=dtype)
    parameters = Parameters(scale=torch.tensor([[0.25]], dtype=torch.float16))
    codes = Integer(4).encode(values, parameters)
    assert codes.dtype == torch.int8
    assert Integer(4).decode(codes, parameters).dtype == torch.float32
    assert Integer(4).fake_quantize(values, parameters).dtype == dtype
    assert torch.equal(Integer(4).fake_quantize(values, parameters), values)


def test_asymmetric_codes_are_unsigned_bytes() -> None:
    parameters = Parameters(scale=torch.ones(1, 1), zero_point=torch.tensor([[255]], dtype=torch.uint8))
    codes = Integer(8, symmetric=False).encode(torch.tensor([[[-300.0, -255.0, 0.0, 1.0]]]), parameters)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[[0, 0, 255, 255]]]
    # uint8 arithmetic would wrap here.
    assert Integer(8, symmetric=False).decode(codes, parameters).tolist() == [[[-255.0, -255.0, 0.0, 0.0]]]


@pytest.mark.parametrize("bits", [1, 9, 0, -4, True])
def test_width_that_does_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=r"Integer: bits=.* is not an integer from 2 to 8; choose a width"):
        Integer(bits)


def test_narrow_needs_symmetric() -> None:
    with pytest.raises(InputError, match=r"narrow=True has no meaning for an asymmetric format; drop narrow"):
        Integer(4, symmetric=False, narrow=True)


def test_missing_parameter_names_those_present() -> None:
    with pytest.raises(InputError, match=r"parameter=zero_point is not among \['scale'\]; fit the parameters"):
        Integer(4, symmetric=False).encode(torch.zeros(1, 1, 1), Parameters(scale=torch.ones(1, 1)))
