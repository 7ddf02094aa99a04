# SPDX-License-Identifier: Apache-2.0
"""The operation in Triton: which problems it takes, the weight layout, the tile for each token count."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem
from quattuor.kernels.requirements import reason_against_triton
from quattuor.kernels.w4a8_linear import measured
from quattuor.kernels.w4a8_linear.narrow import BLOCKS, prepare_narrow, width_of
from quattuor.kernels.w4a8_linear.planes import (
    PLANE_K,
    STORED_BITS,
    Tile,
    group_scale_of,
    mode_of,
    prepare_planes,
)

__all__ = ["Triton", "choose_tile"]


@functools.cache
def processors(device: torch.device) -> tuple[int, bool]:
    """Return the number of multiprocessors of a CUDA device and whether it has warpgroup instructions."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major == 9


#: Stages with which two programs of 64 rows share a multiprocessor, and not three, by tokens.
PAIR_STAGES = {8: 9, 16: 7, 32: 6}


def streaming(tokens: int, programs: float) -> tuple[int, str]:
    """Return stages and overlap for at most 32 tokens on Hopper, given the programs for each multiprocessor.

    With nearly two programs for each, those of the next kernel may come early where shared memory holds two: they
    then spread as evenly. Fewer would leave it uneven room, so that it comes late. Many hide each other's latency
    with three stages. No kernel waits for the end of the one before it to be launched: in a model that is the
    quantization of the tokens.
    """
    if programs > 2:
        return 3, "late"
    return (PAIR_STAGES[tokens], "early") if programs > 1.8 else (5, "late")


def sizes(
    rows: int, tokens: int, num_warps: int, num_stages: int, overlap: str = "none", columns: int = 128
) -> Tile:
    """Return a tile that takes the whole of K."""
    return Tile(
        rows=rows,
        tokens=tokens,
        split=1,
        num_warps=num_warps,
        num_stages=num_stages,
        overlap=overlap,
        columns=columns,
    )


def narrow_sizes(num_tokens: int, width: int, is_scaled: bool, has_warpgroups: bool) -> Tile:
    """Return the tile for 2 and 3 bits, whose blocks hold two and four times as many elements of the tokens."""
    if num_tokens <= 16:
        return sizes(64, 8 if num_tokens <= 8 else 16, 4, 3)
    if num_tokens <= 32 or not has_warpgroups:
        has_registers = has_warpgroups or width == 2 or not is_scaled
        return sizes(64, 32 if has_registers else 16, 4, 2)
    if is_scaled:
        return sizes(128, 64, 8, 2, columns=64)
    return sizes(128, 64, 8, 3 if width == 2 else 2, columns=64)


def choose_tile(
    num_tokens: int,
    out_features: int,
    num_blocks: int,
    num_processors: int,
    has_warpgroups: bool,
    width: int = 4,
    scaled: str | None = None,
) -> Tile:
    """Return the tile for a token count: small, with K split, while tiles are few; wide otherwise.

    The numbers are what most of the measured layers chose. Without warpgroup instructions the weight operand takes
    more registers and there is less shared memory, so the widest tile has 64 tokens and three stages, which 99 KB
    of shared memory hold in every mode. The scales of single elements take as much of it as the tokens.

    Args:
        num_tokens: M.
        out_features: N.
        num_blocks: Blocks of K, as long as `narrow.BLOCKS` says for the width.
        num_processors: Multiprocessors of the device.
        has_warpgroups: Whether it has warpgroup instructions.
        width: Bits of a stored code: 2, 3, 4 or 8.
        scaled: What group scales multiply: "planes" (groups of whole planes), "elements", or None without groups.
    """
    per_processor = 2
    has_many_rows = out_features > 64 * 3 * num_processors
    if width < 4:
        tile = narrow_sizes(num_tokens, width, scaled is not None, has_warpgroups)
    elif num_tokens <= 16:
        num_stages = 3 if scaled == "elements" and not has_warpgroups else 4
        tile = sizes(64, 8 if num_tokens <= 8 else 16, 4, num_stages)
    elif num_tokens <= 32:
        tile = sizes(64, 32, 4, 3)
    elif scaled == "elements":
        tile = sizes(64, 64, 4, 2)
    elif num_tokens <= 64 and has_warpgroups and not has_many_rows:
        tile = sizes(64, 64, 4, 4, "early")
    elif num_tokens <= 64 or not has_warpgroups:
        tile = sizes(128, 64, 8, 3)
    else:
        tile, per_processor = sizes(128, 128, 8, 3), 1
    tiles = -(-out_features // tile.rows) * -(-num_tokens // tile.tokens)
    # a part shorter than 1024 elements costs more in partial sums than it gains in occupancy
    shortest = max(1, 1024 // BLOCKS[width].elements)
    tile = replace(tile, split=max(1, min(num_processors * per_processor // tiles, num_blocks // shortest)))
    if has_warpgroups and num_tokens <= 32 and width == 4 and scaled != "elements":
        num_stages, overlap = streaming(tile.tokens, tiles * tile.split / num_processors)
        tile = replace(tile, num_stages=num_stages, overlap=overlap)
    elif width == 3 and num_tokens <= 16 and scaled is None and tiles * tile.split > 2 * num_processors:
        # a third stage leaves room for two programs on a multiprocessor
        tile = replace(tile, num_stages=2)
    return tile


@functools.lru_cache(maxsize=4096)
def tile_for(problem: LinearProblem, num_tokens: int, device: torch.device) -> Tile:
    """Return the measured tile of a layer, or the one that the rule gives."""
    choice = measured.find(problem, num_tokens)
    if choice is not None and choice.implementation == Triton.name:
        return choice.tile
    width = width_of(problem)
    num_blocks = -(-problem.in_features // BLOCKS[width].elements)
    scaled = None
    if mode_of(problem) in ("integer", "half"):
        scaled = "elements" if problem.group_size % PLANE_K else "planes"
    return choose_tile(num_tokens, problem.out_features, num_blocks, *processors(device), width, scaled)


class Triton(Implementation):
    """Plain Triton: int4 planes unpacked in registers, int32 sums on the tensor cores."""

    name = "triton"
    layout = "planes"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        return reason_against_triton(problem)

    def memory_bits(self, problem: LinearProblem) -> int:
        return width_of(problem)

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_narrow(problem, *tensors) if width_of(problem) < 4 else prepare_planes(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.w4a8_linear.triton_kernel import launch

        x_codes, x_scale, x_zero_point = inputs
        num_tokens = x_codes.shape[0]
        out = torch.empty(num_tokens, problem.out_features, dtype=out_dtype, device=x_codes.device)
        if num_tokens == 0:
            return out
        if x_codes.stride(1) != 1:
            x_codes = x_codes.contiguous()
        with torch.cuda.device_of(x_codes):
            launch(
                x_codes,
                x_scale.contiguous(),
                operand["packed"],
                operand["scale"],
                group_scale_of(problem, operand)[1],
                operand["arrivals"],
                bias if bias is None else bias.contiguous(),
                out,
                mode=mode_of(problem),
                group_size=problem.group_size,
                width=width_of(problem),
                group_words=operand.get("group_words"),
                tile=tile_for(problem, num_tokens, x_codes.device),
                x_zero_point=x_zero_point if x_zero_point is None else x_zero_point.contiguous(),
                weight_sum=operand.get("weight_sum"),
            )
        return out
