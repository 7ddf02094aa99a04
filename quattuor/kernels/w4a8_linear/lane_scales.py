# SPDX-License-Identifier: Apache-2.0
"""Group scales for the kernel for one token, in the order in which its threads need them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quattuor.kernels.dispatch import LinearProblem

__all__ = ["STEP_BLOCKS", "pack_lane_scales", "plane_parts", "reason_against_groups"]

#: Elements of K in a block and in one of its planes, blocks in a step, and elements of a plane in a thread.
BLOCK_K, PLANE_K, STEP_BLOCKS, LANE_K = 256, 128, 4, 16


def plane_parts(group_size: int) -> int | None:
    """Return how many groups share a plane, 1 where a group has planes, None where groups cut a thread's part."""
    if group_size % PLANE_K == 0:
        return 1
    return PLANE_K // group_size if PLANE_K % group_size == 0 and group_size % LANE_K == 0 else None


def reason_against_groups(problem: LinearProblem) -> str | None:
    """Return why threads cannot scale what they add in a step, or None."""
    if problem.in_features % BLOCK_K:
        return f"needs in_features to be a multiple of {BLOCK_K}, not {problem.in_features}"
    if problem.group_size is not None and plane_parts(problem.group_size) is None:
        return f"takes groups of {LANE_K}, 32, 64 or a multiple of {PLANE_K} elements, not {problem.group_size}"
    return None


def pack_lane_scales(group_scale: Tensor, group_size: int, in_features: int, *, is_integer: bool) -> Tensor:
    """Return int32 [N, 4 P, W]: for each block of a step and each of the P groups of a plane, all steps in a row.

    An integer scale is a byte and a word holds two steps; a float16 scale is half a word, which holds one. In a
    step the scale of the low plane comes first. Steps and blocks beyond K repeat the last group.

    Args:
        group_scale: float16 [N, G].
        group_size: S; one that `plane_parts` takes.
        in_features: K, whole blocks.
        is_integer: Whether all scales are integers.
    """
    parts = plane_parts(group_size)
    assert parts is not None
    steps = -(-in_features // (STEP_BLOCKS * BLOCK_K))
    # words come by twos
    steps += -steps % (4 if is_integer else 2)
    device = group_scale.device
    block = torch.arange(steps, device=device) * STEP_BLOCKS + torch.arange(STEP_BLOCKS, device=device)[:, None]
    part = torch.arange(parts, device=device) * (PLANE_K // parts)
    plane = torch.arange(2, device=device) * PLANE_K
    first = block[:, None, :, None] * BLOCK_K + part[None, :, None, None] + plane
    group = (first // group_size).clamp_(max=group_scale.shape[1] - 1)
    values = group_scale[:, group.flatten()]
    values = values.to(torch.int8) if is_integer else values
    return values.view(group_scale.shape[0], STEP_BLOCKS * parts, -1).view(torch.int32)


def pad_rows(words: Tensor, num_rows: int) -> Tensor:
    """Pad words [N, ...] with zeros to `num_rows` rows."""
    return pad(words, (0, 0, 0, 0, 0, num_rows - words.shape[0]))
