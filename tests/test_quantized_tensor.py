# SPDX-License-Identifier: Apache-2.0
"""QuantizedTensor: codes in, the same codes out; sizes; slices; stored state that does not fit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from quattuor.deltas import ElementDelta
from quattuor.errors import CheckpointError, InputError
from quattuor.formats import Format, Integer, Parameters, TwoLevelInteger
from quattuor.granularity import Granularity, PerChannel, PerGroup, PerTensor
from quattuor.online_maps import Kronecker
from quattuor.quantized_tensor import QuantizedTensor


def random_codes(number_format: Format, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    lowest, highest = number_format.code_range
    codes = torch.randint(lowest, highest + 1, shape, generator=generator)
    return codes.to(torch.int8 if lowest < 0 else torch.uint8)


def make(
    number_format: Format, granularity: Granularity, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, QuantizedTensor]:
    rows = 1 if isinstance(granularity, PerTensor) else shape[0]
    groups = granularity.num_groups(shape[1])
    if isinstance(number_format, TwoLevelInteger):
        parameters = Parameters(
            group_scale=torch.randint(1, 10, (rows, groups), generator=generator).half(),
            channel_scale=torch.rand(rows, 1, generator=generator) + 0.1,
        )
    elif isinstance(number_format, Integer) and not number_format.symmetric:
        zero_point = torch.randint(0, 2**number_format.bits, (rows, groups), generator=generator)
        parameters = Parameters(
            scale=torch.rand(rows, groups, generator=generator).half(), zero_point=zero_point.to(torch.uint8)
        )
    else:
        parameters = Parameters(scale=torch.randn(rows, groups, generator=generator))
    codes = random_codes(number_format, shape, generator)
    return codes, QuantizedTensor.from_codes(codes, parameters, number_format, granularity)


FORMATS = [
    *(Integer(bits) for bits in range(2, 9)),
    *(Integer(bits, symmetric=False) for bits in (2, 3, 8)),
    TwoLevelInteger(4),
]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(5)], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_codes_and_numbers_come_back(
    number_format: Format, granularity: Granularity, generator: torch.Generator
) -> None:
    codes, tensor = make(number_format, granularity, (6, 15), generator)
    assert torch.equal(tensor.codes, codes)
    assert tensor.codes.dtype == codes.dtype
    decoded = tensor.decode()
    assert decoded.shape == (6, 15)
    assert decoded.dtype == torch.float32
    for row in range(6):
        for column in (0, 4, 5, 14):
            group = column // 5 if isinstance(granularity, PerGroup) else 0
            own = tensor.parameters.rows(row, row + 1).group(group)
            expected = number_format.decode(codes[row : row + 1, column : column + 1, None], own)
            assert decoded[row, column] == expected.item()
    again = QuantizedTensor.from_state(tensor.state(), number_format, granularity, (6, 15))
    assert torch.equal(again.decode(), decoded)


def test_size_by_hand(generator: torch.Generator) -> None:
    _, tensor = make(Integer(3, symmetric=False), PerGroup(16), (4, 48), generator)
    # 48 codes of 3 bits are 18 bytes a row; 3 groups have a float16 and a byte each.
    assert tensor.nbytes == 4 * 18 + 4 * 3 * 2 + 4 * 3
    assert tensor.bits_per_weight == pytest.approx(3 + 24 / 16)
    _, tensor = make(TwoLevelInteger(4), PerGroup(16), (4, 48), generator)
    assert tensor.bits_per_weight == pytest.approx(4 + 16 / 16 + 32 / 48)
    assert set(tensor.state()) == {"packed", "group_scale", "channel_scale"}


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(5)], ids=str)
def test_rows_are_tensors_of_their_own(granularity: Granularity, generator: torch.Generator) -> None:
    _, tensor = make(Integer(4), granularity, (6, 15), generator)
    part = tensor.rows(2, 5)
    assert part.shape == (3, 15)
    assert torch.equal(part.decode(), tensor.decode()[2:5])
    for name, value in part.state().items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name
        assert value.data_ptr() != tensor.state()[name].data_ptr(), name


@pytest.mark.parametrize(
    ("number_format", "bad"),
    [
        (Integer(4), 8),
        (Integer(4), -9),
        (Integer(4, narrow=True), -8),
        (Integer(4, symmetric=False), 16),
        (Integer(4, symmetric=False), -1),
        (TwoLevelInteger(3), 4),
    ],
    ids=str,
)
def test_codes_outside_the_format(number_format: Format, bad: int) -> None:
    codes = torch.zeros(2, 4, dtype=torch.int8)
    codes[1, 2] = bad
    with pytest.raises(InputError, match=r"codes=.* leave the range .*; make them with the format's encode"):
        QuantizedTensor.from_codes(codes, Parameters(scale=torch.ones(2, 1)), number_format, PerChannel())


@pytest.mark.parametrize(
    ("packed", "found"),
    [
        (None, "missing"),
        (torch.zeros(4, 3, dtype=torch.uint8), r"torch.uint8 \(4, 3\)"),
        (torch.zeros(3, 4, dtype=torch.uint8), r"torch.uint8 \(3, 4\)"),
        (torch.zeros(4, 4, dtype=torch.int8), r"torch.int8 \(4, 4\)"),
    ],
    ids=["missing", "short", "rows", "dtype"],
)
def test_stored_state_that_does_not_fit(packed: Tensor | None, found: str) -> None:
    state = {"scale": torch.ones(4, 1)} | ({} if packed is None else {"packed": packed})
    with pytest.raises(CheckpointError, match=rf"layer.7: packed={found} is not the uint8 \(4, 4\) of Integer"):
        QuantizedTensor.from_state(state, Integer(4), PerChannel(), (4, 8), name="layer.7")


def test_extras_are_part_of_the_weight(generator: torch.Generator) -> None:
    _, plain = make(Integer(4), PerGroup(6), (8, 12), generator)
    mask = torch.rand(8, 12, generator=generator) < 0.2
    delta = ElementDelta.from_dense(torch.randn(8, 12, generator=generator), mask)
    input_map = Kronecker(
        left=torch.randn(3, 3, generator=generator),
        right=torch.randn(4, 4, generator=generator),
        before=torch.rand(12, generator=generator) + 0.5,
    )
    output_map = Kronecker(left=torch.randn(2, 2, generator=generator), right=torch.eye(4))
    tensor = dataclasses.replace(plain, delta=delta, input_map=input_map, output_map=output_map)
    x = torch.randn(5, 12, generator=generator)
    expected = output_map.apply(input_map.apply(x) @ (plain.decode() + delta.dense((8, 12))).T)
    assert torch.allclose(x @ tensor.decode().T, expected, atol=1e-4)
    assert torch.equal(tensor.decode_codes(), plain.decode())

    state = tensor.state()
    assert {"delta_values", "input_map_before", "output_map_left"} < set(state)
    again = QuantizedTensor.from_state(
        state, tensor.number_format, tensor.granularity, tensor.shape, extra_kinds=tensor.extra_kinds
    )
    assert torch.equal(again.decode(), tensor.decode())
    assert again.nbytes == tensor.nbytes > plain.nbytes
