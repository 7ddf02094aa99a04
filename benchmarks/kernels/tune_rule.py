# SPDX-License-Identifier: Apache-2.0
"""What the rule for layers without measurement would have cost where tiles were measured.

    python -m benchmarks.kernels.tune_rule

Prints, for each layer, granularity and token count of the records kernels_w4a8_tiles and, for float16 scales,
kernels_w4a8_unpacking, the tile that `choose_hopper_tile` gives, and its latency over that of the fastest tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import record
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.hopper import choose_hopper_tile
from quattuor.kernels.w4a8_linear.planes import HopperTile

__all__ = ["Cost", "costs", "main"]

GROUPS = {"channel": None, "group128": 128, "group128_float": 128}
PROCESSORS = 132


class Cost(NamedTuple):
    """A case of the record: what the rule chose, its latency if it was timed, and the least one."""

    n: int
    k: int
    m: int
    granularity: str
    tile: HopperTile
    latency_us: float | None
    fastest_us: float

    @property
    def over_fastest(self) -> float | None:
        """Latency of the rule's tile over the least, or None where it was not timed."""
        return None if self.latency_us is None else self.latency_us / self.fastest_us


def key_of(row: dict) -> tuple:
    """Return what tells the timed tiles of a case apart."""
    names = ("tile_rows", "tile_tokens", "stages", "cut", "unroll", "programs_per_processor")
    return tuple(row[name] for name in names)


def timed_rows() -> Iterator[dict]:
    """Yield the tiles of the Hopper kernel that were timed as it is cut and unpacks today."""
    for row in record.read("kernels_w4a8_tiles")["rows"]:
        if row["step"] == "third" and row["implementation"] == "gluon":
            yield row
    for row in record.read("kernels_w4a8_unpacking")["rows"]:
        if row["granularity"] == "group128_float" and row["unpacking"] == "behind_the_wait":
            yield row


def costs() -> Iterator[Cost]:
    """Yield every case that the rule for the Hopper kernel decides: up to 64 tokens most layers take Triton."""
    cases: dict[tuple, dict[tuple, float]] = {}
    for row in timed_rows():
        if row["m"] > 64 or row["granularity"] == "group128_float":
            case = cases.setdefault((row["n"], row["k"], row["m"], row["granularity"]), {})
            case[key_of(row)] = row["latency_us"]
    for (n, k, m, granularity), timed in sorted(cases.items()):
        problem = LinearProblem(
            out_features=n,
            in_features=k,
            group_size=GROUPS[granularity],
            integer_group_scale=granularity == "group128",
        )
        tile = choose_hopper_tile(m, problem, PROCESSORS)
        key = (tile.rows, tile.tokens, tile.stages, tile.cut, tile.unroll, tile.per_processor)
        yield Cost(n, k, m, granularity, tile, timed.get(key), min(timed.values()))


def main() -> None:
    """Print a line for each case, the costly ones last."""
    for cost in sorted(costs(), key=lambda cost: cost.over_fastest or 0.0):
        tile = cost.tile
        over = "it was not timed"
        if cost.over_fastest is not None:
            over = f"{cost.latency_us} us, {cost.over_fastest:.3f} of the fastest"
        print(f"{cost.n}x{cost.k} {cost.granularity} {cost.m}: {tile.rows} x {tile.tokens}, {tile.cut}: {over}")


if __name__ == "__main__":
    main()
