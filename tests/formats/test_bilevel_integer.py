# SPDX-License-Identifier: Apache-2.0
"""Statistics in a few bits: what is shared, what is packed, what is refused."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import BilevelInteger, Parameters
from quattuor.granularity import PerGroup
from quattuor.quantized_tensor import QuantizedTensor


def parameters(num_rows: int, num_groups: int, row_group: int) -> Parameters:
    """Return statistics of which every one differs from its neighbours."""
    generator = torch.Generator().manual_seed(0)
    runs = -(-num_rows // row_group)

    def codes(bits: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, (num_rows, num_groups), generator=generator, dtype=torch.uint8)

    def real(low: float) -> torch.Tensor:
        return (low + torch.rand(runs, num_groups, generator=generator)).half()

    return Parameters(
        scale_codes=codes(3), scale_step=real(0.1), scale_base=real(0.5),
        zero_codes=codes(3), zero_step=real(0.2), zero_base=real(-3.0),
    )  # fmt: skip


@pytest.mark.parametrize("num_rows", [8, 6, 3])
def test_rows_share_their_second_level(num_rows: int) -> None:
    given = parameters(num_rows, 2, 4)
    number_format = BilevelInteger(3, row_group=4)
    codes = torch.arange(8, dtype=torch.uint8).expand(num_rows, 2, -1)
    decoded = number_format.decode(codes, given)
    for row in range(num_rows):
        for group in range(2):
            own = {
                name: value[row // 4 if len(value) != num_rows else row, group].float()
                for name, value in given.items()
            }
            scale = own["scale_codes"] * own["scale_step"] + own["scale_base"]
            zero = own["zero_codes"] * own["zero_step"] + own["zero_base"]
            assert torch.equal(decoded[row, group], (torch.arange(8.0) - zero) * scale)


def test_statistics_are_stored_in_their_bits() -> None:
    # The published average: b + (3 + 3) / 16 + 64 / (16 * 16), here measured on the bytes of the tensors.
    number_format = BilevelInteger(3)
    codes = torch.randint(0, 8, (32, 128), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tensor = QuantizedTensor.from_codes(codes, parameters(32, 8, 16), number_format, PerGroup(16))
    assert tensor.state()["scale_codes"].shape == (32, 3)
    assert tensor.bits_per_weight == 3 + 6 / 16 + 64 / 256
    again = QuantizedTensor.from_state(tensor.state(), number_format, PerGroup(16), (32, 128))
    assert torch.equal(again.decode(), tensor.decode())
    assert torch.equal(again.parameters["zero_codes"], tensor.parameters["zero_codes"])


def test_plain_statistics() -> None:
    number_format = BilevelInteger(2, None, None)
    given = Parameters(scale=torch.tensor([[0.5]]).half(), zero_point=torch.tensor([[-1.25]]).half())
    assert number_format.packed_parameters == {}
    decoded = number_format.decode(torch.arange(4, dtype=torch.uint8).view(1, 1, 4), given)
    assert decoded.view(-1).tolist() == [0.625, 1.125, 1.625, 2.125]  # a grid that does not contain zero
    assert number_format.encode(torch.tensor([[[0.0, 1.2, 9.0]]]), given).tolist() == [[[0, 1, 3]]]


def test_only_one_statistic_in_bits() -> None:
    number_format = BilevelInteger(3, scale_bits=4, zero_bits=None)
    assert number_format.packed_parameters == {"scale_codes": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"BilevelInteger: bits=1 is not an integer from 2 to 8"),
        ({"bits": 3, "scale_bits": 9}, r"BilevelInteger: scale_bits=9 is not an integer from 1 to 8; use 3 bits"),
        ({"bits": 3, "zero_bits": 0}, r"BilevelInteger: zero_bits=0 is not an integer from 1 to 8"),
        ({"bits": 3, "row_group": 0}, r"BilevelInteger: row_group=0 is not an integer from 1 to 65536"),
    ],
)
def test_widths_that_do_not_exist(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BilevelInteger(**options)


def test_resolved_statistics_give_the_same_numbers(generator: torch.Generator) -> None:
    given, number_format = parameters(6, 2, 4), BilevelInteger(3, row_group=4)
    resolved = number_format.resolved(given)
    values = 5 * torch.randn(6, 2, 9, generator=generator)
    codes = number_format.encode(values, given)
    assert torch.equal(number_format.encode(values, resolved), codes)
    assert torch.equal(number_format.decode(codes, resolved), number_format.decode(codes, given))
    assert resolved.group(1)["scale"].shape == (6, 1)
