# SPDX-License-Identifier: Apache-2.0
"""Set the last tuning of the Hopper kernel beside the record of every contender: the record kernels_w4a8_progress.

    python -m benchmarks.kernels.progress

The fastest tile of each case of the step "third" of kernels_w4a8_tiles takes the place of Quattuor's latency in
kernels_w4a8; the ratios are then those of `benchmarks.kernels.ratios`. The two were measured in different runs, so
ratios within a few percent of 1 decide nothing. Fewer than 128 tokens are left out: other records have them.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import record
from benchmarks.kernels.ratios import ratios

__all__ = ["main", "progress"]

STEP, FIRST = "third", 128
CASE = ("n", "k", "m", "granularity")
TILE = ("tile_rows", "tile_tokens", "spans", "cut")
Row = dict[str, Any]


def progress(rows: Sequence[Row], tiles: Sequence[Row]) -> Iterator[Row]:
    """Yield a flat row for each case that was tuned and has contenders, kernel only."""
    best: dict[tuple, Row] = {}
    for tile in tiles:
        case = tuple(tile[key] for key in CASE)
        if tile["step"] != STEP or tile["m"] < FIRST:
            continue
        if case not in best or tile["latency_us"] < best[case]["latency_us"]:
            best[case] = tile
    before = {}
    replaced = []
    for row in rows:
        if row["includes_activation_quantization"]:
            continue
        case = tuple(row[key] for key in CASE)
        is_tuned = row["contender"] == "quattuor" and case in best
        if is_tuned:
            before[case] = row["latency_us"]
        replaced.append(row | {"latency_us": best[case]["latency_us"]} if is_tuned else row)
    for row in ratios(replaced):
        case = tuple(row[key] for key in CASE)
        if case in before:
            chosen = {key: best[case][key] for key in TILE}
            yield row | chosen | {"before_us": before[case], "gain": round(before[case] / row["quattuor_us"], 3)}


def main() -> None:
    """Write the record; it says where and when the tiles were measured, not where the ratios were formed."""
    source = record.read("kernels_w4a8_tiles")
    rows = record.read("kernels_w4a8")["rows"]
    path = record.write("kernels_w4a8_progress", list(progress(rows, source["rows"])))
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {key: source[key] for key in ("commit", "date", "hardware", "versions")}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(record.ROOT))


if __name__ == "__main__":
    main()
