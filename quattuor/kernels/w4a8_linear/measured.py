# SPDX-License-Identifier: Apache-2.0
"""Choices that were measured: for the layers in measured.json, the fastest implementation and tile.

`python -m benchmarks.kernels.tune` writes the file. Layers that are not in it follow the rules of the
implementations.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.narrow import width_of
from quattuor.kernels.w4a8_linear.planes import PLANE_K, HopperTile, LanesTile, Tile, mode_of

__all__ = ["FILE", "Choice", "find"]

FILE = Path(__file__).with_name("measured.json")
#: Compute capability, N, K, mode and bits of a stored code.
Key = tuple[tuple[int, int], int, int, str, int]
TILES = {"triton": Tile, "gluon": HopperTile, "lanes": LanesTile}
#: The choice for this many tokens holds for every larger number too; a layer without one follows the rules there.
LARGEST = 8192


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation and the tile that were fastest."""

    implementation: str
    tile: Tile | HopperTile | LanesTile


@functools.cache
def table() -> dict[Key, list[tuple[int, Choice]]]:
    """Return choices by compute capability, N, K, mode and bits: (largest token count, choice), ascending."""
    found: dict[Key, list[tuple[int, Choice]]] = {}
    content = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"choices": []}
    for row in content["choices"]:
        key = (tuple(content["compute_capability"]), row["n"], row["k"], row["mode"], row.get("bits", 4))
        tile = TILES[row["implementation"]](**row["tile"])
        found.setdefault(key, []).append((row["max_tokens"], Choice(row["implementation"], tile)))
    return {key: sorted(choices, key=lambda item: item[0]) for key, choices in found.items()}


@functools.lru_cache(maxsize=4096)
def find(problem: LinearProblem, num_tokens: int | None) -> Choice | None:
    """Return the measured choice for a layer and a token count (None for the largest), or None without one."""
    if problem.compute_capability is None or problem.activation_zero_point:
        return None
    if problem.group_size is not None and problem.group_size % PLANE_K:
        return None  # scaling single elements takes other tiles than those measured
    shape = (problem.out_features, problem.in_features)
    choices = table().get((problem.compute_capability, *shape, mode_of(problem), width_of(problem)), [])
    for max_tokens, choice in choices:
        if num_tokens is not None and num_tokens <= max_tokens:
            return choice
    return choices[-1][1] if choices and choices[-1][0] >= LARGEST else None
