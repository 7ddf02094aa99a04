# SPDX-License-Identifier: Apache-2.0
"""Runs a loop of many tiny tensor operations as one CUDA graph.

A column solver launches a dozen kernels per column, each far shorter than its launch. Captured once per shape and
replayed, the same kernels run on the same numbers without the launches; on other devices the loop simply runs.
"""

from collections.abc import Callable, Hashable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["run_captured"]

Loop = Callable[..., tuple[Tensor, ...]]
Signature = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]
NUM_KEPT_GRAPHS = 32


def run_captured(loop: Loop, static: tuple[Hashable, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return loop(*static, *inputs).

    Args:
        loop: A module-level function of tensors that neither synchronises nor looks at values; it must not write
            to its inputs.
        static: Its leading arguments, which select what is captured.
        inputs: Its tensors.
    """
    if not inputs[0].is_cuda:
        return loop(*static, *inputs)
    signature = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)
    return _capture(loop, static, signature)(inputs)


class _Graph:
    """A captured loop with the tensors it reads and writes."""

    def __init__(self, loop: Loop, static: tuple[Hashable, ...], signature: Signature) -> None:
        """Capture the loop on placeholders; ones keep every division in it defined."""
        self.inputs = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in signature]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loop(*static, *self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = loop(*static, *self.inputs)

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy the inputs in, replay, and copy the outputs out."""
        for placeholder, tensor in zip(self.inputs, inputs, strict=True):
            placeholder.copy_(tensor)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


@lru_cache(maxsize=NUM_KEPT_GRAPHS)
def _capture(loop: Loop, static: tuple[Hashable, ...], signature: Signature) -> _Graph:
    return _Graph(loop, static, signature)
