# SPDX-License-Identifier: Apache-2.0
"""The operation on Hopper in Gluon: which problems it takes, and the tile for each token count."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem, TokenRange
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.hopper import choose_hopper_tile, make_schedule
from quattuor.kernels.w4a8_linear.narrow import width_of
from quattuor.kernels.w4a8_linear.planes import (
    BLOCK_K,
    PLANE_K,
    STORED_BITS,
    HopperTile,
    group_scale_of,
    mode_of,
    prepare_planes,
    remark_on_clamps,
)
from quattuor.kernels.w4a8_linear.triton import processors

__all__ = ["Gluon"]


@functools.lru_cache(maxsize=4096)
def tile_for(problem: LinearProblem, num_tokens: int, mode: str, device: torch.device) -> HopperTile:
    """Return the measured tile of a layer, or the one that the rule gives."""
    # float16 scales were measured without clamps
    choice = None if mode == "half" else measured.find(problem, num_tokens)
    if choice is not None and choice.implementation == Gluon.name:
        return choice.tile
    return choose_hopper_tile(num_tokens, problem, processors(device)[0])


class Gluon(Implementation):
    """Bulk copies, warp specialization and register-operand warpgroup products, for compute capability 9.0."""

    name = "gluon"
    layout = "planes"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        if problem.device_type != "cuda":
            return f"runs on CUDA devices, not on {problem.device_type}"
        if problem.compute_capability is None or problem.compute_capability[0] != 9:
            return f"needs warpgroup instructions (compute capability 9.0), not {problem.compute_capability}"
        if importlib.util.find_spec("triton.experimental.gluon") is None:
            return "the installed triton has no Gluon (pip install 'triton>=3.6')"
        if problem.activation_zero_point:
            return "subtracts no zero points of activations"
        if problem.weight_bits > 4:
            return f"unpacks codes of at most 4 bits, not {problem.weight_bits}"
        if width_of(problem) < 4:
            return f"unpacks nibbles, in which codes of {problem.weight_bits} bits are not kept"
        if problem.group_size is not None and problem.group_size % PLANE_K:
            return f"needs a group size that is a multiple of {PLANE_K}, not {problem.group_size}"
        if problem.in_features % 16:
            return f"bulk copies need in_features to be a multiple of 16, not {problem.in_features}"
        return None

    def declines(self, problem: LinearProblem, tokens: TokenRange) -> str | None:
        choice = measured.find(problem, tokens.last)
        if choice is not None:
            is_fastest = choice.implementation == self.name
            return None if is_fastest else f"{choice.implementation} was measured to be faster on this layer"
        few = {"channel": 64, "integer": 32}.get(mode_of(problem), 0)
        if tokens.last is not None and tokens.last <= few:
            return "streaming the weight is the limit here, and the smaller programs of triton hide more of it"
        return None

    def remark(self, problem: LinearProblem, tokens: TokenRange) -> str:
        return remark_on_clamps(problem)

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_planes(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.w4a8_linear.gluon_kernel import launch

        x_codes, x_scale, _ = inputs
        num_tokens = x_codes.shape[0]
        out = torch.empty(num_tokens, problem.out_features, dtype=out_dtype, device=x_codes.device)
        if num_tokens == 0:
            return out
        row_stride = x_codes.stride(0)
        is_regular = x_codes.stride(1) == 1 and row_stride >= problem.in_features
        if not is_regular or row_stride % 16 or x_codes.data_ptr() % 16:
            x_codes = x_codes.clone(memory_format=torch.contiguous_format)
        mode, group_scale = group_scale_of(problem, operand)
        tile = tile_for(problem, num_tokens, mode, x_codes.device)
        num_blocks = -(-problem.in_features // BLOCK_K)
        num_tiles = -(-problem.out_features // tile.rows) * -(-num_tokens // tile.tokens)
        programs = processors(x_codes.device)[0] * tile.per_processor
        with torch.cuda.device_of(x_codes):
            launch(
                x_codes,
                x_scale.contiguous(),
                operand["packed"],
                operand["scale"],
                group_scale,
                operand["arrivals"],
                bias if bias is None else bias.contiguous(),
                out,
                mode=mode,
                group_size=problem.group_size,
                num_blocks=num_blocks,
                tile=tile,
                schedule=make_schedule(num_tiles, num_blocks, programs, tile.cut),
            )
        return out
