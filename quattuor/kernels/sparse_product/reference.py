# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch, with sums in the order of the entries."""

import torch
from torch import Tensor

__all__ = ["multiply"]

#: Terms that exist at a time.
MAX_TERMS = 1 << 24


def multiply(x: Tensor, row_offsets: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return x [M, K] times the entries in compressed rows, transposed: float32 [M, N].

    `segment_reduce` adds the entries of a row one after the other on every device, where `index_add` and a
    product of sparse matrices add in the order in which the threads of a GPU arrive.
    """
    num_tokens = max(1, MAX_TERMS // max(1, values.numel()))
    parts = [x.new_zeros((0, row_offsets.numel() - 1), dtype=torch.float32)]
    for tokens in x.split(num_tokens):
        terms_EM = (tokens.float()[:, columns.long()] * values.float()).T.contiguous()
        sums_NM = torch.segment_reduce(terms_EM, "sum", offsets=row_offsets.long(), axis=0, initial=0.0)
        parts.append(sums_NM.T)
    return torch.cat(parts)
