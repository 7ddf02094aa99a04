# SPDX-License-Identifier: Apache-2.0
"""Choices that were measured: for the layers in measured.json, the fastest tile of the kernels.

`python -m benchmarks.kernels.weight_only_tune` writes the file. Layers that are not in it follow `choose_tile`.
"""

import functools
import json
from pathlib import Path

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.planes import STORED_BITS, DigitTile, LaneTile, PairTile, Tile

__all__ = ["FILE", "find"]

FILE = Path(__file__).with_name("measured.json")

#: The kind of a tile, by a field that no kind after it has.
KINDS = {"is_early": PairTile, "depth": LaneTile, "before": DigitTile, "rows": Tile}

#: Compute capability, N, K, stored bits, group size, and whether there are zero points.
Key = tuple[tuple[int, int], int, int, int, int | None, bool]


@functools.cache
def table() -> dict[Key, list[tuple[int, Tile | DigitTile | LaneTile | PairTile]]]:
    """Return (largest token count, tile), ascending, by layer."""
    found: dict[Key, list[tuple[int, Tile | DigitTile | LaneTile | PairTile]]] = {}
    content = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"choices": []}
    for row in content["choices"]:
        layer = (row["n"], row["k"], row["bits"], row["group_size"], row["zero_point"])
        key = (tuple(content["compute_capability"]), *layer)
        kind = next(kind for name, kind in KINDS.items() if name in row["tile"])
        found.setdefault(key, []).append((row["max_tokens"], kind(**row["tile"])))
    return {key: sorted(tiles, key=lambda item: item[0]) for key, tiles in found.items()}


def find(problem: LinearProblem, num_tokens: int) -> Tile | DigitTile | LaneTile | PairTile | None:
    """Return the measured tile of a layer for a token count, or None without one.

    A layer with zero points that was not measured takes the tile of the layer without.
    """
    if problem.compute_capability is None:
        return None
    bits = STORED_BITS[problem.weight_bits]
    layer = (problem.compute_capability, problem.out_features, problem.in_features, bits, problem.group_size)
    for zero_point in (problem.zero_point, False):
        for max_tokens, tile in table().get((*layer, zero_point), ()):
            if num_tokens <= max_tokens:
                return tile
    return None
