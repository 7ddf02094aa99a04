# SPDX-License-Identifier: Apache-2.0
"""How a tuning takes the place of the latencies of a record."""

from test_w4a8_ratios import row

from benchmarks.kernels.progress import progress

CASE = {"n": 64, "k": 128, "m": 256}
TILE = {"tile_rows": 128, "tile_tokens": 64, "spans": 1, "cut": "none"}


def tile(step, granularity, latency_us, **fields):
    """One tile as the record of tiles has it."""
    return CASE | TILE | {"step": step, "granularity": granularity, "latency_us": latency_us} | fields


def test_the_fastest_tile_of_the_step_takes_the_place_of_the_latency():
    names = [("cublas_fp16", "none", 12.0), ("humming_w4a8", "channel", 3.0), ("humming_w4a8", "group128", 6.5)]
    ours = [("quattuor", "channel", 4.0), ("quattuor", "group128", 5.0)]
    rows = [row(*item) | {"m": 256} for item in (*names, *ours)] + [
        row("quattuor", "channel", 9.0, quantizes=True)
    ]
    tiles = [
        tile("second", "channel", 0.5),
        tile("third", "channel", 2.5, cut="aligned"),
        tile("third", "channel", 2.0),
        tile("third", "channel", 0.1, m=64),
    ]
    (found,) = progress(rows, tiles)
    assert (found["before_us"], found["quattuor_us"], found["gain"]) == (4.0, 2.0, 2.0)
    assert (found["over_humming"], found["over_fp16"], found["is_ahead"], found["cut"]) == (1.5, 6.0, True, "none")


def test_groups_are_set_beside_the_tuned_latency_per_channel():
    rows = [row(*item) | {"m": 256} for item in (("cublas_fp16", "none", 12.0), ("quattuor", "channel", 4.0))]
    rows += [row("quattuor", "group128", 5.0) | {"m": 256}]
    found = {
        item["granularity"]: item
        for item in progress(rows, [tile("third", "channel", 2.0), tile("third", "group128", 2.5)])
    }
    assert found["group128"]["of_channel_speed"] == 0.8
