# SPDX-License-Identifier: Apache-2.0
"""What the rule for layers without measurement would have cost where tiles were measured.

    python -m benchmarks.kernels.tune_rule

Prints, for each layer, granularity and token count of the record kernels_w4a8_tiles whose every tile was timed,
the tile that `choose_hopper_tile` gives, and its latency over that of the fastest tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import record
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.hopper import choose_hopper_tile
from quattuor.kernels.w4a8_linear.planes import HopperTile

__all__ = ["Cost", "costs", "main"]

RECORD = "kernels_w4a8_tiles"
#: The first step of the notebook that timed tiles of the kernel as it is cut today.
STEPS = ("third",)
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


def costs() -> Iterator[Cost]:
    """Yield every case with more than 64 tokens; up to there most layers take the Triton kernel."""
    cases: dict[tuple, dict[tuple, float]] = {}
    for row in record.read(RECORD)["rows"]:
        if row["step"] in STEPS and row["implementation"] == "gluon" and row["m"] > 64:
            case = cases.setdefault((row["n"], row["k"], row["m"], row["granularity"]), {})
            case[key_of(row)] = row["latency_us"]
    for (n, k, m, granularity), timed in sorted(cases.items()):
        problem = LinearProblem(
            out_features=n,
            in_features=k,
            group_size=None if granularity == "channel" else 128,
            integer_group_scale=granularity == "group128",
        )
        tile = choose_hopper_tile(m, problem, PROCESSORS)
        key = (tile.rows, tile.tokens, tile.stages, tile.cut, tile.unroll, tile.per_processor)
        yield Cost(n, k, m, granularity, tile, timed.get(key), min(timed.values()))


def main() -> None:
    """Print a line for each case, the costly ones last."""
    for cost in sorted(costs(), key=lambda cost: cost.over_fastest or 0.0):
        tile = cost.tile
        over = "not timed" if cost.over_fastest is None else f"{cost.over_fastest:.3f}"
        print(
            f"{cost.n}x{cost.k} {cost.granularity} {cost.m}: {tile.rows} x {tile.tokens}, {tile.cut}"
            f": {cost.latency_us} us, {over} of the fastest"
        )


if __name__ == "__main__":
    main()
