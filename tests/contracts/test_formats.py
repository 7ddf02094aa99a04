# SPDX-License-Identifier: Apache-2.0
"""What every number format promises, for representative parameters. A new format is a row of `MEMBERS` and an
entry of `DEFINITIONS`: the value of a code in exact fractions, written from the paper and not from the code."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from quattuor.formats import (
    BilevelInteger,
    BinaryCoding,
    Codebook,
    Format,
    Integer,
    MidRise,
    Parameters,
    TwoLevelInteger,
)


def scaled(scale: float, dtype: torch.dtype = torch.float32, zero_point: int | None = None) -> Parameters:
    tensors = {"scale": torch.tensor([[scale]], dtype=dtype)}
    if zero_point is not None:
        tensors["zero_point"] = torch.tensor([[zero_point]], dtype=torch.uint8)
    return Parameters(**tensors)


def two_level(group_scale: float, channel_scale: float, dtype: torch.dtype = torch.float16) -> Parameters:
    return Parameters(
        group_scale=torch.tensor([[group_scale]], dtype=dtype), channel_scale=torch.tensor([[channel_scale]])
    )


def table(*entries: float, dtype: torch.dtype = torch.float16) -> Parameters:
    return Parameters(codebook=torch.tensor([[entries]], dtype=dtype))


def planes(*alpha: float, offset: float | None = None, dtype: torch.dtype = torch.float16) -> Parameters:
    tensors = {"alpha": torch.tensor([[alpha]], dtype=dtype)}
    if offset is not None:
        tensors["offset"] = torch.tensor([[offset]], dtype=dtype)
    return Parameters(**tensors)


def bilevel(scale: tuple[int, float, float], zero: tuple[int, float, float]) -> Parameters:
    """Statistics as codes, step and base."""
    tensors = {}
    for name, (code, step, base) in {"scale": scale, "zero": zero}.items():
        tensors[f"{name}_codes"] = torch.tensor([[code]], dtype=torch.uint8)
        tensors[f"{name}_step"] = torch.tensor([[step]], dtype=torch.float16)
        tensors[f"{name}_base"] = torch.tensor([[base]], dtype=torch.float16)
    return Parameters(**tensors)


def real_zero(scale: float, zero_point: float) -> Parameters:
    return Parameters(scale=torch.tensor([[scale]]).half(), zero_point=torch.tensor([[zero_point]]).half())


MEMBERS: list[tuple[Format, Parameters]] = [
    *((Integer(bits), scaled(0.0173)) for bits in range(2, 9)),
    *((Integer(bits), scaled(-0.0173)) for bits in (2, 4, 8)),
    *((Integer(bits, narrow=True), scaled(3.7)) for bits in (2, 4, 8)),
    *((Integer(bits, symmetric=False), scaled(0.11, zero_point=0)) for bits in (2, 4, 8)),
    *((Integer(bits, symmetric=False), scaled(0.11, zero_point=2**bits - 1)) for bits in (2, 4, 8)),
    (Integer(4, symmetric=False), scaled(0.11, zero_point=6)),
    (Integer(4), scaled(0.0173, torch.float16)),
    (Integer(8), scaled(6e-8, torch.float16)),
    (Integer(8), scaled(1e-30)),
    (Integer(4), scaled(0.3, torch.float64)),
    (Integer(5, symmetric=False), scaled(0.3, torch.float64, zero_point=9)),
    *((TwoLevelInteger(bits), two_level(127 / 2 ** (bits - 1), 0.0021)) for bits in range(2, 9)),
    (TwoLevelInteger(4), two_level(-15.875, 0.0021)),
    (TwoLevelInteger(4), two_level(11, 0.0021, torch.int8)),
    (TwoLevelInteger(4), two_level(-3, 0.0021, torch.int8)),
    (TwoLevelInteger(4), two_level(0.37, 0.0021)),
    (TwoLevelInteger(4), two_level(7.3, -0.5)),
    # few bits in every statistic, so that products are exact in float32
    *((BilevelInteger(bits), bilevel((5, 0.0625, 0.25), (3, 0.125, -1.5))) for bits in (2, 3, 8)),
    (BilevelInteger(4), bilevel((0, 1.0, 0.0173), (0, 1.0, 7.0))),
    (BilevelInteger(3, None, None), real_zero(0.0173, -0.25)),
    (BilevelInteger(4, None, None), real_zero(3.5, 40.0)),
    *((MidRise(bits), scaled(0.0173)) for bits in range(2, 9)),
    (MidRise(2), scaled(-0.3)),
    (MidRise(3), scaled(0.0173, torch.float16)),
    (MidRise(4), scaled(0.3, torch.float64)),
    (Codebook(1), table(-0.3, 0.7)),
    (Codebook(2), table(-2.5, -0.125, 0.0, 60000.0)),
    (Codebook(3), table(1.0, 1.001, 1.002, 1.5, 2.0, 3.0, 9.0, 30.0, dtype=torch.float64)),
    (Codebook(4), table(*(1.4142**step - 3 for step in range(16)), dtype=torch.float32)),
    (Codebook(8), table(*(step**3 / 4096 for step in range(-128, 128)), dtype=torch.float32)),
    # few bits in every number, so that sums of planes are exact in float32
    (BinaryCoding(1), planes(0.75)),
    (BinaryCoding(3), planes(1.5, 0.25, 0.625, offset=-0.375)),
    (BinaryCoding(4), planes(0.0625, 0.125, 0.25, 0.5, offset=0.03125)),
    (BinaryCoding(8), planes(*(2.0**step for step in range(8)), dtype=torch.float64)),
]


def integer_value(number_format: Integer, code: int, parameters: dict[str, Fraction]) -> Fraction:
    return parameters["scale"] * (code - parameters.get("zero_point", Fraction(0)))


def two_level_value(number_format: TwoLevelInteger, code: int, parameters: dict[str, Fraction]) -> Fraction:
    level8 = round(code * parameters["group_scale"])  # half to even
    return min(max(level8, -128), 127) * parameters["channel_scale"]


def mid_rise_value(number_format: MidRise, code: int, parameters: dict[str, Any]) -> Fraction:
    return parameters["scale"] * (code + Fraction(1, 2))


def bilevel_value(number_format: BilevelInteger, code: int, parameters: dict[str, Any]) -> Fraction:
    if number_format.scale_bits is None:
        return parameters["scale"] * (code - parameters["zero_point"])
    scale, zero = (
        parameters[f"{name}_codes"] * parameters[f"{name}_step"] + parameters[f"{name}_base"]
        for name in ("scale", "zero")
    )
    return scale * (code - zero)


def codebook_value(number_format: Codebook, code: int, parameters: dict[str, Any]) -> Fraction:
    return parameters["codebook"][code]


def binary_value(number_format: BinaryCoding, code: int, parameters: dict[str, Any]) -> Fraction:
    signs = [1 if code >> plane & 1 else -1 for plane in range(number_format.bits)]
    terms = (alpha * sign for alpha, sign in zip(parameters["alpha"], signs, strict=True))
    return sum(terms, parameters.get("offset", Fraction(0)))


DEFINITIONS: dict[type[Format], Callable[..., Fraction]] = {
    Integer: integer_value,
    TwoLevelInteger: two_level_value,
    MidRise: mid_rise_value,
    BilevelInteger: bilevel_value,
    Codebook: codebook_value,
    BinaryCoding: binary_value,
}


def exact_values(number_format: Format, parameters: Parameters) -> list[Fraction]:
    """Return the exact number of every code, in the order of the codes."""
    exact: dict[str, Any] = {
        name: Fraction(tensor.item())
        if tensor.dim() == 2
        else [Fraction(item) for item in tensor.flatten().tolist()]
        for name, tensor in parameters.items()
    }
    lowest, highest = number_format.code_range
    definition = DEFINITIONS[type(number_format)]
    return [definition(number_format, code, exact) for code in range(lowest, highest + 1)]


def all_codes(number_format: Format) -> Tensor:
    lowest, highest = number_format.code_range
    codes = torch.arange(lowest, highest + 1).view(1, 1, -1)
    return codes.to(torch.int8 if lowest < 0 else torch.uint8)


def compute_dtype(parameters: Parameters) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in parameters.values())
    return torch.float64 if is_double else torch.float32


every_member = pytest.mark.parametrize(
    ("number_format", "parameters"), MEMBERS, ids=[f"{index}-{row[0]}" for index, row in enumerate(MEMBERS)]
)


@every_member
def test_decode_agrees_with_the_definition(number_format: Format, parameters: Parameters) -> None:
    decoded = number_format.decode(all_codes(number_format), parameters)
    expected = torch.tensor(
        [float(value) for value in exact_values(number_format, parameters)], dtype=torch.float64
    )
    assert decoded.dtype == compute_dtype(parameters)
    assert torch.equal(decoded.view(-1), expected.to(decoded.dtype))


@every_member
def test_every_code_comes_back(number_format: Format, parameters: Parameters) -> None:
    codes, values = all_codes(number_format).view(-1), exact_values(number_format, parameters)
    is_unique = torch.tensor([values.count(value) == 1 for value in values])
    if not isinstance(number_format, TwoLevelInteger):
        assert is_unique.all()
    decoded = number_format.decode(codes.view(1, 1, -1), parameters)
    again = number_format.encode(decoded, parameters)
    assert again.dtype == codes.dtype
    assert torch.equal(again.view(-1)[is_unique], codes[is_unique])
    # Codes that share a number must at least stay on that number.
    assert torch.equal(number_format.decode(again, parameters), decoded)


@every_member
def test_encode_is_nearest_and_saturates(
    number_format: Format, parameters: Parameters, generator: torch.Generator
) -> None:
    table = torch.tensor([float(value) for value in exact_values(number_format, parameters)], dtype=torch.float64)
    span, middle = float(table.max() - table.min()), float(table.max() + table.min()) / 2
    inside = torch.linspace(-0.55, 0.55, 257, dtype=torch.float64) + 0.001 * torch.rand(257, generator=generator)
    values = torch.cat([inside * span + middle, torch.tensor([-50.0, 50.0]) * span]).to(compute_dtype(parameters))
    codes = number_format.encode(values.view(1, 1, -1), parameters).view(-1)
    lowest, highest = number_format.code_range
    assert int(codes.min()) >= lowest
    assert int(codes.max()) <= highest
    distance = (values.double()[:, None] - table).abs()
    chosen = distance.gather(1, codes.long()[:, None] - lowest).squeeze(1)
    # The division that finds a code rounds once, so a near-tie may go either way: 2^-23 of the largest quotient.
    slack = 2.0**-23 * (span + table.abs().max())
    assert (chosen <= distance.min(dim=1).values + slack).all()
    assert float(table[int(codes[-2]) - lowest]) == float(table.min())
    assert float(table[int(codes[-1]) - lowest]) == float(table.max())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number_format", [Integer(4), Integer(8), Integer(3, symmetric=False)], ids=str)
def test_ties_go_to_the_even_step(number_format: Integer, sign: int) -> None:
    zero_point = None if number_format.symmetric else 4
    lowest, highest = number_format.code_range
    offset = zero_point or 0
    steps = torch.arange(lowest - offset, highest - offset) + 0.5  # halfway between all neighbours, exact
    parameters = scaled(sign * 0.25, zero_point=zero_point)
    codes = number_format.encode((steps * sign * 0.25).view(1, 1, -1), parameters).view(-1)
    assert [code - offset for code in codes.tolist()] == [round(Fraction(step)) for step in steps.tolist()]


@every_member
def test_fake_quantize_is_decode_of_encode(
    number_format: Format, parameters: Parameters, generator: torch.Generator
) -> None:
    reach = max(abs(float(value)) for value in exact_values(number_format, parameters))
    values = torch.randn(1, 1, 64, generator=generator) * reach
    once = number_format.fake_quantize(values, parameters)
    expected = number_format.decode(number_format.encode(values, parameters), parameters)
    assert once.dtype == values.dtype
    assert torch.equal(once, expected.to(values.dtype))


@pytest.mark.parametrize(
    ("number_format", "parameters"),
    [
        (Integer(4), Parameters(scale=torch.tensor([[0.1, -0.2], [0.3, 0.4], [1.0, 2.0]]))),
        (
            Integer(4, symmetric=False),
            Parameters(
                scale=torch.tensor([[0.1, 0.2], [0.3, 0.4], [1.0, 2.0]]),
                zero_point=torch.tensor([[1, 2], [3, 4], [15, 0]], dtype=torch.uint8),
            ),
        ),
        (MidRise(3), Parameters(scale=torch.tensor([[0.1, -0.2], [0.3, 0.4], [1.0, 2.0]]))),
        (
            TwoLevelInteger(4),
            Parameters(
                group_scale=torch.tensor([[1, -2], [3, 4], [15, 7]], dtype=torch.int8),
                channel_scale=torch.tensor([[0.01], [0.02], [0.1]]),
            ),
        ),
    ],
    ids=["Integer", "Integer asymmetric", "MidRise", "TwoLevelInteger"],
)
def test_each_group_reads_its_own_parameters(
    number_format: Format, parameters: Parameters, generator: torch.Generator
) -> None:
    values = torch.randn(3, 2, 5, generator=generator)
    codes = number_format.encode(values, parameters)
    decoded = number_format.decode(codes, parameters)
    for row in range(3):
        for index in range(2):
            own = parameters.rows(row, row + 1).group(index)
            alone = values[row : row + 1, index : index + 1]
            assert torch.equal(number_format.encode(alone, own)[0, 0], codes[row, index])
            assert torch.equal(
                number_format.decode(number_format.encode(alone, own), own)[0, 0], decoded[row, index]
            )
