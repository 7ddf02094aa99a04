# SPDX-License-Identifier: Apache-2.0
"""The layout of GPTQ checkpoints: weights only, words along the input features.

For the weight [N, K] of a linear, G groups:

    qweight  int32 [K * bits / 32, N]   words along K of unsigned codes
    qzeros   int32 [G, N * bits / 32]   words along N of zero_point - 1 (checkpoint_format "gptq"; "gptq_v2" stores
                                        zero_point itself)
    scales   float16 [G, N]
    g_idx    int32 [K]                  the group of each column

    W[n, k] = scales[g, n] * (code[k, n] - zero_point[g, n])

References:
    Frantar et al., 2022, arXiv:2210.17323.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quattuor.activations import ActivationQuantizer
from quattuor.checkpoints.foreign import ForeignLayout, Grid, Settings, refused, require
from quattuor.checkpoints.int32_words import codes_per_word, pack_words, unpack_words
from quattuor.checkpoints.tensors import TensorStore
from quattuor.formats import Integer, Parameters
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["GPTQLayout", "quantized_tensor"]


@dataclass(frozen=True, slots=True)
class GPTQLayout(ForeignLayout):
    """Integers of 2, 4 or 8 bits with float16 scales; activations stay in floating point."""

    @property
    def name(self) -> str:
        """Its `quant_method`."""
        return "gptq"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Last parts of the names of every tensor that belongs to a packed weight."""
        return "qweight", "qzeros", "scales", "g_idx"

    def scale_dtype(self, dense: torch.dtype) -> torch.dtype:
        """Return float16, which the layout stores."""
        return torch.float16

    def refuses(self, grid: Grid, activations: ActivationQuantizer | None) -> str | None:
        """Return why a weight does not fit."""
        if activations is not None:
            return f"has activations {activations}; the layout cannot ask for them"
        if grid.bits not in (2, 4, 8):
            return f"has {grid.bits} bits; the layout knows 2, 4 and 8"
        rows, columns = grid.codes.shape
        if rows % codes_per_word(grid.bits) or columns % codes_per_word(grid.bits):
            return f"is {rows} x {columns}; both must be multiples of the {codes_per_word(grid.bits)} of a word"
        if grid.zero_point is not None and int(grid.zero_point.min()) < 1:
            return "has a zero point of 0, which the layout cannot store"
        return None

    def encode(self, grid: Grid, scale: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a weight."""
        half = 2 ** (grid.bits - 1)
        is_symmetric = grid.zero_point is None
        zero_NG = torch.full(scale.shape, half, dtype=torch.int16) if grid.zero_point is None else grid.zero_point
        unsigned_NK = grid.codes + half if is_symmetric else grid.codes
        columns = grid.codes.shape[1]
        return {
            "qweight": pack_words(unsigned_NK, grid.bits).T,
            "qzeros": pack_words((zero_NG - 1).T, grid.bits),
            "scales": scale.T,
            "g_idx": torch.arange(columns, dtype=torch.int32) // (grid.group_size or columns),
        }

    def settings(
        self, grids: Mapping[str, Grid], activations: Mapping[str, ActivationQuantizer | None], others: list[str]
    ) -> dict[str, Any]:
        """Return the settings, which are the same for every linear.

        Raises:
            UnsupportedError: The linears differ, or one inside the blocks is in high precision.
        """
        first_name, first = next(iter(grids.items()))
        for name, grid in grids.items():
            if (grid.bits, grid.group_size) != (first.bits, first.group_size):
                raise refused(self.name, name, f"differs in bits or group size from {first_name}")
        inside = [name for name in others if ".layers." in name or ".h." in name]
        if inside:
            raise refused(self.name, inside[0], "is in high precision; the layout knows no exceptions")
        return {
            "quant_method": self.name,
            "checkpoint_format": "gptq",
            "bits": first.bits,
            "group_size": first.group_size or -1,
            "desc_act": False,
            "sym": all(grid.zero_point is None for grid in grids.values()),
            "lm_head": False,
        }

    def linears(self, store: TensorStore) -> list[str]:
        """Return the packed linears."""
        return sorted(name.removesuffix(".qweight") for name in store.names() if name.endswith(".qweight"))

    def decode(
        self, name: str, store: TensorStore, settings: Settings
    ) -> tuple[QuantizedTensor, ActivationQuantizer | None]:
        """Read one weight."""
        form = settings.get("checkpoint_format", settings.get("format", "gptq"))
        if form not in ("gptq", "gptq_v2"):
            raise refused(self.name, name, f"is stored as {form}, neither gptq nor gptq_v2")
        bits = int(settings.get("bits", 4))
        if bits not in (2, 4, 8):
            raise refused(self.name, name, f"has {bits} bits; 2, 4 and 8 are read")
        words = require(store, f"{name}.qweight", (torch.int32,))
        codes = unpack_words(words.T.contiguous(), bits)
        out_features, in_features = codes.shape
        size = int(settings.get("group_size", -1))
        size = in_features if size == -1 else size
        groups = -(-in_features // size)
        shape = (groups, out_features // codes_per_word(bits))
        zeros = unpack_words(require(store, f"{name}.qzeros", (torch.int32,), shape), bits)
        scales = require(store, f"{name}.scales", (torch.float16, torch.float32), (groups, out_features))
        self._check_order(name, store, in_features, size)  # last: a wrong group size also looks like another order
        zero_point = zeros + (1 if form == "gptq" else 0)
        return quantized_tensor(codes, scales.T, zero_point.T, bits, None if size == in_features else size), None

    def _check_order(self, name: str, store: TensorStore, in_features: int, size: int) -> None:
        if f"{name}.g_idx" not in store.names():
            return
        order = require(store, f"{name}.g_idx", (torch.int32,), (in_features,))
        if not torch.equal(order, torch.arange(in_features, dtype=torch.int32) // size):
            raise refused(self.name, name, "has columns in another order (g_idx of act-order), which is not read")


def quantized_tensor(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int | None
) -> QuantizedTensor:
    """Return unsigned codes [N, K] with parameters [N, G]: symmetric when every zero point is in the middle."""
    half = 2 ** (bits - 1)
    granularity = PerChannel() if group_size is None else PerGroup(group_size)
    scale = scale.contiguous()
    if bool((zero_point == half).all()):
        signed = (codes - half).to(torch.int8)
        return QuantizedTensor.from_codes(signed, Parameters(scale=scale), Integer(bits), granularity)
    parameters = Parameters(scale=scale, zero_point=zero_point.to(torch.uint8).contiguous())
    return QuantizedTensor.from_codes(
        codes.to(torch.uint8), parameters, Integer(bits, symmetric=False), granularity
    )
