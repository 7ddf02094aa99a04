# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, and the tile for each token count."""

import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, TokenRange
from quattuor.kernels.lut_linear.layout import MAX_LOOK_UP_BITS, block_k, piece_of, prepare_tiles
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.w4a8_linear.planes import Tile
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Decoded", "Triton", "choose_tile", "reason_against", "rows_at_once"]

#: Elements of K that one tensor-core product takes: a shorter piece of a group would not fill it.
MIN_PIECE = 16
#: Most parts that K is cut into.
MAX_SPLIT = 8
#: From here on the weight is decoded once.
MANY_TOKENS = 17
#: Of the decoded rows that exist at a time.
SCRATCH_BYTES = 1 << 26
#: Memory of a code by its width: codebooks of more than 4 bits take a byte.
STORED_BITS = {bits: bits for bits in range(1, 9)}


def choose_tile(problem: LutProblem, num_tokens: int, num_processors: int) -> Tile:
    """Return the tile for a token count, with K cut until the programs fill the device one and a half times.

    32 rows for more than 8 tokens: two warps multiply by instructions of one warp, which wait for nothing but
    their own operands, where four would take those of a warpgroup.
    """
    if num_tokens <= 8:
        rows, tokens, num_warps, per_processor = 64, 8, 4, 4
    else:
        rows, tokens, num_warps, per_processor = 32, 16, 2, 8
    tiles = -(-problem.out_features // rows) * -(-num_tokens // tokens)
    num_blocks = -(-problem.in_features // block_k(problem))
    split = -(-3 * num_processors * per_processor // (2 * tiles))
    num_stages = 3 if problem.kind == "codebook" and problem.weight_bits == 4 else 2
    return Tile(
        rows=rows,
        tokens=tokens,
        split=max(1, min(split, MAX_SPLIT, num_blocks)),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def takes_bits(problem: LutProblem, dtype: torch.dtype) -> bool:
    """Return whether planes are multiplied as bits, in half the instructions: float16 and enough registers."""
    is_small = problem.weight_bits <= 4 and problem.group_size is None
    return problem.kind == "planes" and dtype == torch.float16 and is_small


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


def rows_at_once(problem: LutProblem, x: Tensor) -> int:
    """Return how many rows to decode at a time to the dtype of x."""
    return max(1, SCRATCH_BYTES // (128 * problem.in_features * x.element_size())) * 128


def linear_decoded(
    problem: LutProblem, x: Tensor, operand: Mapping[str, Tensor], bias: Tensor | None, out: Tensor
) -> None:
    """Fill `out` by decoding some rows after others to a scratch."""
    from quattuor.kernels.lut_linear.decode_kernel import linear_rows

    linear_rows(problem, x, operand, bias, out, rows_at_once(problem, x))


class Tiles(Implementation):
    """What the implementations on the tiled layout share."""

    layout = "tiles"
    stored_bits = STORED_BITS

    def supports(self, problem: LutProblem) -> str | None:
        return reason_against(problem)

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tiles(problem, *tensors)


class Triton(Tiles):
    """Codes unpacked in registers, looked up or multiplied as signs; float32 tokens as in `Decoded`."""

    name = "triton"

    def supports(self, problem: LutProblem) -> str | None:
        if problem.kind == "codebook" and problem.weight_bits > MAX_LOOK_UP_BITS:
            return f"holds at most {2**MAX_LOOK_UP_BITS} entries in registers, not {2**problem.weight_bits}"
        return reason_against(problem)

    def declines(self, problem: LutProblem, tokens: TokenRange) -> str | None:
        if tokens.first >= MANY_TOKENS:
            return "unpacks the weight for every 16 tokens; decoding it once costs less"
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
                    tile=choose_tile(problem, x.shape[0], processors(x.device)[0]),
                    is_masked=takes_bits(problem, x.dtype),
                )
        return out


class Decoded(Tiles):
    """Decodes 64 MiB of rows at a time to the tokens' dtype, single entries included; then dense products."""

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
