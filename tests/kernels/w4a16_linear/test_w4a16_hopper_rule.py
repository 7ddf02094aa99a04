# SPDX-License-Identifier: Apache-2.0
"""What the rule for tiles of the Hopper kernel costs where tiles were timed."""

import pytest

from benchmarks import record
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.hopper import SIZES, choose_hopper_tile


def timed():
    """Return the latency of each tile of the last run, by case."""
    cases = {}
    for row in record.read("kernels_w4a16_hopper")["rows"]:
        if row["step"] == "second" and row["contender"] == "quattuor_gluon" and row["scaling"] != "operand":
            case = cases.setdefault((row["n"], row["k"], row["group_size"], row["m"]), {})
            case[row["size"], row["scaling"], row["cut"], row["unroll"], row["lags"]] = row["latency_us"]
    return cases


def test_the_rule_costs_little_where_tiles_were_timed():
    found = []
    for (n, k, group_size, m), case in timed().items():
        problem = LinearProblem(out_features=n, in_features=k, group_size=group_size, activation_bits=16)
        tile = choose_hopper_tile(m, problem, 132, True)
        size = next(
            name for name, base in SIZES.items() if (base.blocks, base.tokens) == (tile.blocks, tile.tokens)
        )
        latency_us = case.get((size, tile.scaling, tile.cut, tile.unroll, tile.lags))
        if latency_us is not None:
            found.append(latency_us / min(case.values()))
    assert len(found) >= 12
    assert max(found) <= 1.04
    assert sum(found) <= 1.015 * len(found)


@pytest.mark.parametrize("peer", ["triton_us", "humming_us"])
def test_the_page_names_the_cases_that_a_peer_leads(peer):
    rows = record.read("kernels_w4a16_many_tokens")["rows"]
    behind = [(row["n"], row["m"]) for row in rows if row[peer] < row["quattuor_us"]]
    assert behind == ([] if peer == "triton_us" else [(11008, 512)])
