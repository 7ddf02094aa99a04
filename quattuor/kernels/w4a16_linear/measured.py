# SPDX-License-Identifier: Apache-2.0
"""Choices that were measured: for the layers in measured.json, the fastest tile of the kernels.

`python -m benchmarks.kernels.weight_only_tune` writes the file. Layers that are not in it follow `choose_tile`.
"""

import functools
import json
from pathlib import Path

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.planes import STORED_BITS, FewTile, Tile

__all__ = ["FILE", "find"]

FILE = Path(__file__).with_name("measured.json")

Key = tuple[tuple[int, int], int, int, int, int | None]


@functools.cache
def table() -> dict[Key, list[tuple[int, Tile | FewTile]]]:
    """Return (largest token count, tile), ascending, by compute capability, N, K, stored bits and group size."""
    found: dict[Key, list[tuple[int, Tile | FewTile]]] = {}
    content = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"choices": []}
    for row in content["choices"]:
        key = (tuple(content["compute_capability"]), row["n"], row["k"], row["bits"], row["group_size"])
        kind = FewTile if "fragments" in row["tile"] else Tile
        found.setdefault(key, []).append((row["max_tokens"], kind(**row["tile"])))
    return {key: sorted(tiles, key=lambda item: item[0]) for key, tiles in found.items()}


def find(problem: LinearProblem, num_tokens: int) -> Tile | FewTile | None:
    """Return the measured tile of a layer for a token count, or None without one."""
    if problem.compute_capability is None:
        return None
    bits = STORED_BITS[problem.weight_bits]
    shape = (problem.out_features, problem.in_features)
    choices = table().get((problem.compute_capability, *shape, bits, problem.group_size), [])
    return next((tile for max_tokens, tile in choices if num_tokens <= max_tokens), None)
