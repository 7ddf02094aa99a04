# SPDX-License-Identifier: Apache-2.0
"""The record of quantization time: what a run of random blocks measures, and what is projected from it."""

import pytest
import torch

from benchmarks.end_to_end.quantization_time import SHAPES, measure, row_of


def test_projection_counts_the_warm_up_once() -> None:
    row = row_of("Llama-3-8B", "bfloat16", 10.0, [11.0, 20.0, 23.0, 27.0])
    assert (row["embedding_seconds"], row["warm_up_seconds"], row["timed_blocks"]) == (1.0, 9.0, 2)
    assert row["seconds_per_block"] == 3.5
    assert row["projected_blocks"] == 32
    assert row["projected_seconds"] == 1 + 9 + 31 * 3.5


def test_shapes_are_those_of_the_model() -> None:
    sizes = SHAPES["Llama-3-8B"]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    attention = 2 * sizes["hidden_size"] ** 2 + 2 * sizes["hidden_size"] * sizes["num_key_value_heads"] * head
    block = attention + 3 * sizes["hidden_size"] * sizes["intermediate_size"]
    ends = 2 * sizes["vocab_size"] * sizes["hidden_size"]
    assert sizes["num_hidden_layers"] * block + ends == pytest.approx(8.03e9, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_row_of_a_tiny_model(dtype: torch.dtype) -> None:
    row = measure("tiny", dtype, torch.device("cpu"), blocks=1, samples=4, length=32, batch_size=2)
    assert row["timed_blocks"] == 1
    spent = row["collect_seconds"] + row["solve_seconds"] + row["propagate_seconds"]
    assert 0 < spent <= row["warm_up_seconds"] + row["seconds_per_block"]
    assert row["projected_seconds"] > row["warm_up_seconds"]
