# SPDX-License-Identifier: Apache-2.0
"""Binary coding: a weight is a sum of a few signed scales, and the bits of its code are the signs.

Every uniform grid of b bits is such a sum: with codes q = sum_i 2^i bit_i and signs B_i = 2 bit_i - 1,

    scale * (q - zero_point) = sum_i (scale 2^i / 2) B_i + scale ((2^b - 1) / 2 - zero_point)

which `binary_parameters` computes. The converse does not hold: binary coding also has uneven grids.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.codebook import check_table_bits, look_up, nearest_entry
from quattuor.formats.integer import Integer

__all__ = ["BinaryCoding", "binary_parameters", "levels"]


def levels(alpha: Float[Tensor, "*lead P"], offset: Float[Tensor, "*lead"] | None) -> Float[Tensor, "*lead C"]:
    """Return the number of every code: sum_i alpha_i (2 bit_i(code) - 1) + offset, added in this order."""
    num_planes = alpha.shape[-1]
    codes = torch.arange(2**num_planes, device=alpha.device)
    total = torch.zeros(*alpha.shape[:-1], 2**num_planes, dtype=alpha.dtype, device=alpha.device)
    for plane in range(num_planes):
        sign_C = ((codes >> plane & 1) * 2 - 1).to(alpha.dtype)
        total = total + alpha[..., plane, None] * sign_C
    return total if offset is None else total + offset.unsqueeze(-1)


def binary_parameters(number_format: Integer, parameters: Parameters) -> Parameters:
    """Return the binary coding whose code c has the number of the Integer code c + lowest code.

    Exact in the dtype of the scale: alpha is the scale times powers of two, and the offset has five bits more for
    four-bit codes (none more when the format is symmetric).

    Args:
        number_format: The uniform format.
        parameters: Its `scale`, and `zero_point` when it is asymmetric.

    References:
        Park et al., 2022, arXiv:2206.09557 (LUT-GEMM), section 3.2.
    """
    scale, bits = parameters["scale"], number_format.bits
    if scale.dtype == torch.float16:
        scale = scale.float()
    powers = 2.0 ** torch.arange(-1, bits - 1, device=scale.device, dtype=scale.dtype)
    middle = (2**bits - 1) / 2 + number_format.code_range[0]
    offset = scale * middle
    if not number_format.symmetric:
        offset = scale * (middle - parameters["zero_point"].to(scale.dtype))
    return Parameters(alpha=scale.unsqueeze(-1) * powers, offset=offset)


@dataclass(frozen=True, slots=True)
class BinaryCoding(Format):
    """Sums of `bits` signed scales: x is approximated by sum_i alpha_i B_i + offset with B_i = 2 bit_i(code) - 1.

    Reads `alpha` `[R, G, bits]`, and `offset` `[R, G]` where there is one. Codes are in [0, 2^bits - 1]; plane i
    is bit i of the code. Several codes may have the same number (alpha of zero); encode then returns one of them.

    Args:
        bits: Number of planes, 1 to 8.

    References:
        Park et al., 2022, arXiv:2206.09557 (LUT-GEMM), section 3.1.
    """

    bits: int

    def __post_init__(self) -> None:
        """Reject widths that do not exist."""
        check_table_bits(self.bits, "BinaryCoding")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest legal code."""
        return 0, 2**self.bits - 1

    def encode(self, values: Float[Tensor, "*lead S"], parameters: Parameters) -> UInt8[Tensor, "*lead S"]:
        """Return the code of the nearest number; computes in float32, or float64 when either side is."""
        ascending, order = self._levels(parameters).sort(dim=-1, stable=True)
        values = values.to(torch.promote_types(values.dtype, ascending.dtype))
        nearest = nearest_entry(values, ascending)
        return order.to(torch.uint8).expand(*values.shape[:-1], -1).gather(-1, nearest)

    def decode(self, codes: UInt8[Tensor, "*lead S"], parameters: Parameters) -> Float[Tensor, "*lead S"]:
        """sum_i alpha_i (2 bit_i(codes) - 1) + offset."""
        return look_up(codes, self._levels(parameters))

    def _levels(self, parameters: Parameters) -> Float[Tensor, "*table C"]:
        """Return the number of every code, in float32, or float64 when alpha is stored so."""
        alpha = parameters["alpha"]
        if alpha.shape[-1] != self.bits:
            raise InputError(
                compose(
                    subject="alpha planes",
                    value=alpha.shape[-1],
                    constraint=f"are not the {self.bits} of this format",
                    place="BinaryCoding",
                    remedy="fit the parameters with Alternating for this width",
                )
            )
        dtype = torch.promote_types(alpha.dtype, torch.float32)
        return levels(alpha.to(dtype), parameters["offset"].to(dtype) if "offset" in parameters else None)
