# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, the weight layout, the tile for each token count."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import Implementation, TokenRange
from quattuor.kernels.lut_linear.problem import PACKED_BITS, LutProblem

__all__ = ["BLOCK_K", "Tile", "Triton", "choose_tile", "pack_fields", "piece_of", "prepare_tensors", "widths_of"]

#: K is padded to a multiple of this, rows to `MAX_ROWS`: every tile is loaded without a mask.
BLOCK_K = 128
MAX_ROWS = 128
#: The shortest run of K that fills a word of single bits and a tensor-core product.
MIN_PIECE = 32
#: Tiles that programs can share; beyond them there is enough work without splitting K.
MAX_SPLIT_TILES = 4096


@dataclass(frozen=True, slots=True)
class Tile:
    """Outputs and tokens of one program, parts that K is cut into, and how the program is compiled."""

    rows: int
    tokens: int
    split: int
    num_warps: int
    num_stages: int


def widths_of(problem: LutProblem) -> tuple[int, ...]:
    """Return the fields that a code is stored in, lowest bits first: powers of two that fill 32-bit words.

    Planes are stored one by one; 3 bits of a codebook as 2 and 1, 5 as 4 and 1.
    """
    if problem.kind == "planes":
        return (1,) * problem.weight_bits
    return tuple(width for width in (8, 4, 2, 1) if problem.weight_bits & width)


def pack_fields(codes: Tensor, width: int) -> Tensor:
    """Return int32 words [N, K * width / 32]; code j occupies bits (j mod 32/width) * width of its word."""
    per_word = 32 // width
    shifts = torch.arange(per_word, device=codes.device) * width
    words = (codes.long().unflatten(1, (-1, per_word)) << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def piece_of(problem: LutProblem) -> int:
    """Return the longest run of K, at most a block, that never crosses a group."""
    return math.gcd(problem.group_size, BLOCK_K) if problem.group_size else BLOCK_K


def choose_tile(
    num_tokens: int, out_features: int, num_blocks: int, num_processors: int, has_warpgroups: bool
) -> Tile:
    """Return the tile for a token count: small, with K split, while tiles are few; wide otherwise."""
    if num_tokens <= 16:
        rows, tokens, num_warps, num_stages, per_processor = 64, 16, 4, 3, 3
    elif num_tokens <= 64 or not has_warpgroups:
        rows, tokens, num_warps, num_stages, per_processor = 64, 64, 4, 3, 2
    else:
        rows, tokens, num_warps, num_stages, per_processor = 128, 64, 8, 3, 1
    tiles = -(-out_features // rows) * -(-num_tokens // tokens)
    split = max(1, min(num_processors * per_processor // tiles, num_blocks // 4))
    return Tile(rows=rows, tokens=tokens, split=split, num_warps=num_warps, num_stages=num_stages)


def prepare_tensors(
    problem: LutProblem,
    codes: Tensor,
    table: Tensor,
    offset: Tensor | None,
    row_offsets: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
) -> dict[str, Tensor]:
    """Return the padded tensors of the kernel.

    words        int32: the fields of all codes, one after another, each [N', K' * width / 32]
    table        [G', N', 2^b] entries, or [b, G', N'] scales
    offset       [G', N'], where there is one
    row_offsets  int32 [N' + 1]; columns; values: the single entries, where there are any
    arrivals     int32 zeros: counters of programs that share a tile, zero again after every launch
    """
    rows = problem.out_features + -problem.out_features % MAX_ROWS
    columns_padded = problem.in_features + -problem.in_features % BLOCK_K
    groups = -(-columns_padded // (problem.group_size or columns_padded))
    more = (groups - problem.num_groups, rows - problem.out_features)
    padded = pad(codes, (0, columns_padded - problem.in_features, 0, more[1]))
    fields, low = [], 0
    for width in widths_of(problem):
        fields.append(pack_fields((padded >> low) & (2**width - 1), width).flatten())
        low += width
    by_group = pad(table, (0, 0, 0, more[0], 0, more[1])).transpose(0, 1)
    named = {
        "words": torch.cat(fields),
        "table": (by_group if problem.kind == "codebook" else by_group.movedim(2, 0)).contiguous(),
        "arrivals": torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=codes.device),
    }
    if offset is not None:
        named["offset"] = pad(offset, (0, more[0], 0, more[1])).T.contiguous()
    if values is not None:
        named["row_offsets"] = torch.cat([row_offsets, row_offsets[-1:].expand(more[1])])
        named |= {"columns": columns.contiguous(), "values": values.contiguous()}
    return named


class Triton(Implementation):
    """Plain Triton: codes unpacked in registers, looked up or multiplied as signs; single entries added last."""

    name = "triton"
    layout = "words"
    stored_bits = PACKED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device_type}"
        if problem.compute_capability is None or problem.compute_capability < (8, 0):
            return f"needs compute capability 8.0, not {problem.compute_capability}"
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if piece_of(problem) < MIN_PIECE:
            return f"needs a group size that is a multiple of {MIN_PIECE}, not {problem.group_size}"
        if problem.kind == "codebook" and problem.table_dtype != torch.float16:
            return "multiplies float16 entries on the tensor cores, not float32 ones"
        return None

    def declines(self, problem: LutProblem, tokens: TokenRange) -> str | None:
        return "has only been interpreted and compiled, not run on a GPU; force it to try it"

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tensors(problem, *tensors)

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.lut_linear.triton_kernel import launch

        (x,) = inputs
        out = torch.empty(x.shape[0], problem.out_features, dtype=out_dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        properties = torch.cuda.get_device_properties(x.device)
        num_blocks = -(-problem.in_features // BLOCK_K)
        tile = choose_tile(
            x.shape[0],
            problem.out_features,
            num_blocks,
            properties.multi_processor_count,
            properties.major == 9,
        )
        with torch.cuda.device_of(x):
            launch(
                problem,
                x if x.stride(1) == 1 else x.contiguous(),
                operand,
                bias if bias is None else bias.contiguous(),
                out,
                tile=tile,
            )
        return out
