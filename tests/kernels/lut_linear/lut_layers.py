# SPDX-License-Identifier: Apache-2.0
"""Random layers of the operation, and their exact weight, written from the definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quattuor.kernels.lut_linear.problem import LutProblem


@dataclass(frozen=True)
class Layer:
    """A problem, the tensors that `prepare` takes, and the weight in float64."""

    problem: LutProblem
    codes: Tensor
    table: Tensor
    offset: Tensor | None
    sparse: tuple[Tensor, Tensor, Tensor] | None
    weight: Tensor

    @property
    def tensors(self) -> tuple:
        return self.codes, self.table, self.offset, self.sparse


def make_layer(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    kind: str,
    group_size: int | None = None,
    offset: bool = False,
    sparse: bool = False,
    table_dtype: torch.dtype = torch.float16,
    seed: int = 0,
    device: str = "cpu",
    **fields: object,
) -> Layer:
    """Return a layer with codes over the whole range, and about two percent single entries in uneven rows."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size is None else -(-in_features // group_size)
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    size = 2**bits if kind == "codebook" else bits
    table = torch.randn(out_features, groups, size, generator=generator).to(table_dtype)
    constant = torch.randn(out_features, groups, generator=generator).to(table_dtype) if offset else None
    group_of_k = torch.arange(in_features) // (group_size or in_features)
    wide = table.double()[:, group_of_k]
    if kind == "codebook":
        weight = wide.gather(2, codes.long()[..., None]).squeeze(2)
    else:
        signs = (codes[..., None].long() >> torch.arange(bits)) % 2 * 2 - 1
        weight = (wide * signs).sum(dim=2)
    if constant is not None:
        weight = weight + constant.double()[:, group_of_k]
    entries = None
    if sparse:
        mask = torch.rand(out_features, in_features, generator=generator) < 0.02
        mask[1], mask[2, : in_features // 2] = False, True  # an empty and a crowded row
        values = torch.randn(int(mask.sum()), generator=generator).half()
        weight[mask] += values.double()
        row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)]).int()
        entries = (row_offsets, mask.nonzero()[:, 1].to(torch.int16), values)
    problem = LutProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        kind=kind,
        group_size=group_size,
        offset=offset,
        sparse=sparse,
        table_dtype=table_dtype,
        device_type=device,
        **fields,
    )
    moved = [None if tensor is None else tensor.to(device) for tensor in (codes, table, constant)]
    if entries is not None:
        entries = tuple(tensor.to(device) for tensor in entries)
    return Layer(problem, *moved, entries, weight.to(device))
