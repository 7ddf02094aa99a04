# SPDX-License-Identifier: Apache-2.0
"""How kernels are timed against each other: cold weights, CUDA graphs replayed in turn, medians."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Contender", "floor_us", "median_latencies", "num_copies"]

#: Ceilings of one H200: device-to-device copy in bytes/s, and twice the bf16 rate on random data in operations/s.
BANDWIDTH, RATE = 4.3e12, 1.6e15
#: Weight bytes that a contender cycles through: four times the L2 cache.
COLD_BYTES = 240_000_000
REPLAYS = 9
#: What a replay of a graph holds: at most so many launches, and few enough to take about this time at the floor.
MAX_LAUNCHES, REPLAY_US = 100, 1500.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Activations of one token count, as they are and quantized to int8 and fp8."""

    x: Tensor
    x_codes: Tensor
    x_scale: Tensor
    x_narrow: Tensor


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One kernel with its prepared weights: `run(batch, i)` computes the layer with the i-th copy of the weight.

    `gate` returns None when the result for a batch is right, else what is wrong; it is None where the contender
    was given random weights that no other contender has. `describe` names what computes a token count.
    """

    name: str
    granularity: str
    includes_activation_quantization: bool
    copies: int
    run: Callable[[Batch, int], object]
    gate: Callable[[Batch], str | None] | None = None
    takes: Callable[[int], bool] = lambda num_tokens: True
    describe: Callable[[int], str | None] = lambda num_tokens: None


def floor_us(num_tokens: int, out_features: int, in_features: int) -> float:
    """Return the time below which no kernel with 4-bit weights and 8-bit activations can compute the layer.

    The larger of its bytes over `BANDWIDTH` and its operations over `RATE`.
    """
    weight_bytes = out_features * in_features / 2 + 4 * out_features
    token_bytes = num_tokens * (in_features + 2 * out_features + 4)
    operations = 2 * num_tokens * out_features * in_features
    return 1e6 * max((weight_bytes + token_bytes) / BANDWIDTH, operations / RATE)


def num_copies(nbytes: int) -> int:
    """Return how many copies of a weight keep each of them out of the cache."""
    return max(2, -(-COLD_BYTES // nbytes))


def capture(contender: Contender, batch: Batch, lowest_us: float) -> tuple[torch.cuda.CUDAGraph, int]:
    """Return a graph of launches over every copy of the weight, and their number."""
    for i in range(2):
        contender.run(batch, i)
    torch.cuda.synchronize()
    wanted = min(MAX_LAUNCHES, REPLAY_US / lowest_us)
    launches = contender.copies * max(1, round(wanted / contender.copies))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            contender.run(batch, i)
    return graph, launches


def median_latencies(contenders: list[Contender], batch: Batch, lowest_us: float) -> list[float]:
    """Return the median latency of each contender in us; the graphs are replayed in turn."""
    graphs = [capture(contender, batch, lowest_us) for contender in contenders]
    samples: list[list[float]] = [[] for _ in graphs]
    for replay in range(REPLAYS + 1):
        for (graph, launches), found in zip(graphs, samples, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            if replay:  # the first warms up
                found.append(start.elapsed_time(stop) / launches * 1e3)
    return [sorted(found)[len(found) // 2] for found in samples]
