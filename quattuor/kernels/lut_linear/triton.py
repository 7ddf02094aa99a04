# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, and the tile for each token count."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, TokenRange
from quattuor.kernels.lut_linear import measured
from quattuor.kernels.lut_linear.layout import MAX_LOOK_UP_BITS, block_k, piece_of, prepare_tiles
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.w4a8_linear.planes import Tile
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Decoded", "Triton", "choose_tile", "tile_tokens"]

#: Outputs of one program.
TILE_ROWS = 64
#: Elements of K that one tensor-core product takes: a shorter piece of a group would not fill it.
MIN_PIECE = 16
#: From here on decoding the weight once costs less than unpacking it for every 64 tokens.
MANY_TOKENS = 129
#: Of the decoded rows that exist at a time.
SCRATCH_BYTES = 1 << 26
#: Memory of a code by its width: codebooks of more than 4 bits take a byte.
STORED_BITS = {bits: bits for bits in range(1, 9)}


def tile_tokens(num_tokens: int) -> int:
    """Return the tokens of a tile: the smallest size that takes them, 64 at most."""
    return next(size for size in (8, 16, 32, 64) if num_tokens <= size or size == 64)


def choose_tile(problem: LutProblem, num_tokens: int, num_processors: int) -> Tile:
    """Return the tile for a token count: K is split while tiles are few."""
    tokens = tile_tokens(num_tokens)
    has_many_planes = problem.kind == "planes" and problem.weight_bits > 4
    num_stages = 3 if tokens <= 16 and not has_many_planes else 2
    per_processor = {8: 8, 16: 4, 32: 3, 64: 2}[tokens]
    tiles = -(-problem.out_features // TILE_ROWS) * -(-num_tokens // tokens)
    num_blocks = -(-problem.in_features // block_k(problem))
    split = max(1, min(num_processors * per_processor // tiles, num_blocks))
    return Tile(rows=TILE_ROWS, tokens=tokens, split=split, num_warps=4, num_stages=num_stages)


@functools.lru_cache(maxsize=4096)
def tile_for(problem: LutProblem, num_tokens: int, device: torch.device) -> Tile:
    """Return the measured tile of a layer, or the one that the rule gives."""
    found = measured.find(problem, tile_tokens(num_tokens)) if num_tokens <= 64 else None
    return choose_tile(problem, num_tokens, processors(device)[0]) if found is None else found


def reason_against(problem: LutProblem) -> str | None:
    """Return why no kernel of this package takes the problem, or None."""
    if problem.device_type != "cuda":
        return f"runs on CUDA devices, not on {problem.device_type}"
    if problem.compute_capability is None or problem.compute_capability < (8, 0):
        return f"needs compute capability 8.0, not {problem.compute_capability}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if piece_of(problem) < MIN_PIECE:
        return f"needs a group size that is a multiple of {MIN_PIECE}, not {problem.group_size}"
    if problem.kind == "codebook" and problem.table_dtype != torch.float16:
        return "looks up float16 entries, not float32 ones"
    return None


def linear_decoded(
    problem: LutProblem, x: Tensor, operand: Mapping[str, Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """Fill `out` by decoding some rows after others to a scratch."""
    from quattuor.kernels.lut_linear.decode_kernel import linear_rows

    num_rows = max(1, SCRATCH_BYTES // (128 * problem.in_features * x.element_size())) * 128
    linear_rows(problem, x, operand, bias, out, num_rows)


class Tiles(Implementation):
    """What the implementations on the tiled layout share."""

    layout = "tiles"
    stored_bits = STORED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        return reason_against(problem)

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tiles(problem, *tensors)


class Triton(Tiles):
    """Plain Triton: codes unpacked in registers, looked up or multiplied as signs; float32 tokens meet decoded rows."""

    name = "triton"

    def supports(self, problem: LutProblem) -> str | None:
        if problem.kind == "codebook" and problem.weight_bits > MAX_LOOK_UP_BITS:
            return f"holds at most {2**MAX_LOOK_UP_BITS} entries in registers, not {2**problem.weight_bits}"
        return reason_against(problem)

    def declines(self, problem: LutProblem, tokens: TokenRange) -> str | None:
        if tokens.first >= MANY_TOKENS:
            return "unpacks the weight for every 64 tokens; decoding it once costs less"
        return None

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
        x = x if x.stride(1) == 1 else x.contiguous()
        bias = bias if bias is None else bias.contiguous()
        with torch.cuda.device_of(x):
            if x.dtype == torch.float32:
                linear_decoded(problem, x, operand, bias, out)
            else:
                launch(
                    problem,
                    x,
                    operand,
                    bias,
                    out,
                    tile=tile_for(problem, x.shape[0], x.device),
                    is_masked=x.dtype == torch.float16 and problem.kind == "planes",
                )
        return out


class Decoded(Tiles):
    """Decodes 64 MiB of rows at a time to the dtype of the tokens, single entries included, then one dense product."""

    name = "decoded"

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        (x,) = inputs
        out = torch.empty(x.shape[0], problem.out_features, dtype=out_dtype, device=x.device)
        if x.shape[0]:
            with torch.cuda.device_of(x):
                linear_decoded(problem, x, operand, bias, out)
        return out
