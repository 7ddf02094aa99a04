# SPDX-License-Identifier: Apache-2.0
"""Binary coding: planes and signs, conversion from uniform grids, widths."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.formats import BinaryCoding, Integer, Parameters
from quattuor.formats.binary import binary_parameters, levels


@pytest.mark.parametrize("with_offset", [True, False])
def test_bits_of_a_code_are_signs_of_planes(with_offset: bool, generator: torch.Generator) -> None:
    alpha = torch.rand(2, 3, 4, generator=generator)
    offset = torch.randn(2, 3, generator=generator) if with_offset else None
    codes = torch.randint(0, 16, (2, 3, 50), generator=generator, dtype=torch.uint8)
    parameters = Parameters(alpha=alpha) if offset is None else Parameters(alpha=alpha, offset=offset)
    expected = torch.zeros(2, 3, 50, dtype=torch.float64)
    for plane in range(4):
        sign = torch.where((codes >> plane) % 2 == 1, 1.0, -1.0)
        expected += alpha[..., plane, None].double() * sign
    if offset is not None:
        expected += offset[..., None].double()
    torch.testing.assert_close(BinaryCoding(4).decode(codes, parameters).double(), expected, atol=1e-6, rtol=0)


def test_encode_is_nearest_for_uneven_planes(generator: torch.Generator) -> None:
    alpha = torch.rand(3, 2, 5, generator=generator)  # neither sorted nor powers of two
    parameters = Parameters(alpha=alpha, offset=torch.randn(3, 2, generator=generator))
    table = levels(alpha, parameters["offset"])
    values = torch.randn(3, 2, 100, generator=generator) * 2
    distance = (values[..., None] - table[..., None, :]).abs()
    chosen = BinaryCoding(5).encode(values, parameters)
    assert torch.equal(distance.gather(-1, chosen.long()[..., None]).squeeze(-1), distance.amin(dim=-1))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_conversion_from_a_uniform_grid_is_exact(bits: int, symmetric: bool, generator: torch.Generator) -> None:
    # 2206.09557, section 3.2: sum_i alpha_i B_i + z = s (q - z_u), for every code and any zero point
    uniform = Integer(bits, symmetric=symmetric)
    scale = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    tensors = {"scale": scale}
    if not symmetric:
        tensors["zero_point"] = torch.randint(0, 2**bits, (4, 3), generator=generator, dtype=torch.uint8)
    lowest, highest = uniform.code_range
    codes = torch.arange(lowest, highest + 1).expand(4, 3, -1)
    expected = uniform.decode(codes, Parameters(**tensors))
    binary = (codes - lowest).to(torch.uint8)
    decoded = BinaryCoding(bits).decode(binary, binary_parameters(uniform, Parameters(**tensors)))
    assert ((decoded - expected).abs() <= 1e-13 * scale.abs()[..., None]).all()


def test_conversion_keeps_float16_scales_exact_in_float32(generator: torch.Generator) -> None:
    parameters = Parameters(
        scale=torch.rand(5, 2, generator=generator).half(),
        zero_point=torch.randint(0, 16, (5, 2), generator=generator, dtype=torch.uint8),
    )
    codes = torch.arange(16, dtype=torch.uint8).expand(5, 2, -1)
    converted = binary_parameters(Integer(4, symmetric=False), parameters)
    assert torch.equal(
        BinaryCoding(4).decode(codes, converted), Integer(4, symmetric=False).decode(codes, parameters)
    )


def test_one_plane() -> None:
    parameters = Parameters(alpha=torch.tensor([[[0.5]]]))
    values = torch.tensor([[[-3.0, -0.1, 0.2, 1.0]]])
    assert BinaryCoding(1).fake_quantize(values, parameters).tolist() == [[[-0.5, -0.5, 0.5, 0.5]]]


@pytest.mark.parametrize("bits", [0, 9, True])
def test_widths_that_do_not_exist(bits: int) -> None:
    with pytest.raises(InputError, match=r"BinaryCoding: bits=.* is not an integer from 1 to 8; "):
        BinaryCoding(bits)


def test_planes_of_another_width_are_refused() -> None:
    with pytest.raises(InputError, match="alpha planes=3 are not the 4 of this format"):
        BinaryCoding(4).encode(torch.zeros(1, 1, 2), Parameters(alpha=torch.zeros(1, 1, 3)))
