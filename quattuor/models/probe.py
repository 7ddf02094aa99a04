# SPDX-License-Identifier: Apache-2.0
"""What a block does that no description can promise for every version of transformers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["returns_tuple"]


@torch.no_grad()
def returns_tuple(block: nn.Module, hidden_states: Tensor, keywords: Mapping[str, Any]) -> bool:
    """Find out whether a block returns a tuple rather than the hidden state, without computing anything.

    Runs the forward of the block's class on the meta device, so that the weights need not be loaded and stay
    untouched. A forward that somebody put on the block itself is set aside meanwhile.

    Args:
        block: A decoder block, on any device.
        hidden_states: Anything of the shape and dtype that the block receives.
        keywords: The other arguments of its forward.
    """
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    stand_in = block.__dict__.pop("forward", None)
    try:
        output = torch.func.functional_call(
            block,
            {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()},
            (torch.empty_like(hidden_states, device="meta"),),
            {name: _on_meta(value) for name, value in keywords.items()},
        )
    finally:
        if stand_in is not None:
            block.__dict__["forward"] = stand_in
    return isinstance(output, tuple)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, tuple):
        return tuple(_on_meta(item) for item in value)
    return value
