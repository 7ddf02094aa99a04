# SPDX-License-Identifier: Apache-2.0
"""Tiles that were the fastest on a device, shipped in measured.json; `benchmarks/kernels/weight_only_tables.py` writes it."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.w4a8_linear.planes import Tile

__all__ = ["FILE", "Choice", "find", "key_of", "read"]

FILE = Path(__file__).with_name("measured.json")
#: Capability of the devices that the choices were measured on.
CAPABILITY = (9, 0)

Key = tuple[str, int, bool, int, int, int]
Choice = Mapping[str, str | int | bool]


def key_of(problem: LutProblem, tile_tokens: int) -> Key:
    """Return what a choice depends on."""
    grouped = problem.group_size is not None
    return problem.kind, problem.weight_bits, grouped, problem.out_features, problem.in_features, tile_tokens


def read(choices: Iterable[Choice]) -> dict[Key, Tile]:
    """Return the tiles by what they depend on."""
    names = ("rows", "tokens", "split", "num_warps", "num_stages", "overlap")
    return {
        (row["kind"], row["bits"], row["grouped"], row["n"], row["k"], row["tokens"]): Tile(
            **{name: row[name] for name in names}
        )
        for row in choices
    }


@functools.cache
def shipped() -> dict[Key, Tile]:
    """Return the choices of the package."""
    return read(json.loads(FILE.read_text()))


def find(problem: LutProblem, tile_tokens: int) -> Tile | None:
    """Return the measured tile of a layer for tiles of so many tokens, or None where none was measured."""
    if problem.compute_capability != CAPABILITY:
        return None
    return shipped().get(key_of(problem, tile_tokens))
