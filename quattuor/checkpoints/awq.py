# SPDX-License-Identifier: Apache-2.0
"""The layout of AWQ checkpoints ("gemm" version), read only.

For the weight [N, K] of a linear, G groups:

    qweight  int32 [K, N / 8]   words along N; place p of a word holds output (0, 2, 4, 6, 1, 3, 5, 7)[p]
    qzeros   int32 [G, N / 8]   zero points, in the same order
    scales   float16 [G, N]

    W[n, k] = scales[g, n] * (code[k, n] - zero_point[g, n])

References:
    Lin et al., 2023, arXiv:2306.00978.
"""

from dataclasses import dataclass

import torch

from quattuor.activations import ActivationQuantizer
from quattuor.checkpoints.foreign import ForeignReader, Settings, refused, require
from quattuor.checkpoints.gptq import quantized_tensor
from quattuor.checkpoints.int32_words import unpack_words
from quattuor.checkpoints.tensors import TensorStore
from quattuor.quantized_tensor import QuantizedTensor

__all__ = ["ORDER", "AWQReader"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = 4


@dataclass(frozen=True, slots=True)
class AWQReader(ForeignReader):
    """Integers of 4 bits with zero points per group; activations in floating point."""

    @property
    def name(self) -> str:
        """Its `quant_method`."""
        return "awq"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Last parts of the names of every tensor that belongs to a packed weight."""
        return "qweight", "qzeros", "scales"

    def linears(self, store: TensorStore) -> list[str]:
        """Return the packed linears."""
        return sorted(name.removesuffix(".qweight") for name in store.names() if name.endswith(".qweight"))

    def decode(
        self, name: str, store: TensorStore, settings: Settings
    ) -> tuple[QuantizedTensor, ActivationQuantizer | None]:
        """Read one weight."""
        bits = settings.get("bits", settings.get("w_bit"))
        version = str(settings.get("version", "gemm")).lower()
        if bits != _BITS or version != "gemm":
            raise refused(self.name, name, f"has {bits} bits, version {version}; 4 bits of version gemm are read")
        words = require(store, f"{name}.qweight", (torch.int32,))
        codes = unpack_words(words, _BITS, ORDER).T.contiguous()
        out_features, in_features = codes.shape
        size = int(settings.get("group_size", settings.get("q_group_size", -1)))
        size = in_features if size == -1 else size
        groups = -(-in_features // size)
        zeros = unpack_words(
            require(store, f"{name}.qzeros", (torch.int32,), (groups, out_features // 8)), _BITS, ORDER
        )
        scales = require(store, f"{name}.scales", (torch.float16, torch.float32), (groups, out_features))
        return quantized_tensor(codes, scales.T, zeros.T, _BITS, None if size == in_features else size), None
