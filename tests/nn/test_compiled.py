# SPDX-License-Identifier: Apache-2.0
"""Packed models generate with a static cache and a compiled step: one graph without breaks, the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
CASES = {
    "w4a8 group": ["quattuor.packed_w4a8"],
    "w4a8 channel, biases": ["quattuor.packed_w4a8"],
    "w4a8 channel, joined": ["quattuor.packed_w4a8"],
    "w3a16 group": ["quattuor.packed_w4a16"],
}
"""Models of compiled_generate.py, and our operators in their graphs."""

LINEARS = (
    "plain",
    "two levels",
    "elements",
    "columns",
    "maps",
    "codebook",
    "planes",
    "columns beside integers",
    "elements beside integers",
)

NEW_TOKENS = 6


def run_script(*arguments: str) -> dict[str, Any]:
    """Return what compiled_generate.py prints."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "checkpoints"), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_generate.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Return what compiled_generate.py measures."""
    return run_script()


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_with_a_static_cache_gives_the_same_tokens(
    case: str, compiled: dict[str, dict[str, Any]]
) -> None:
    result = compiled["models"][case]
    assert result["equal"]
    assert result["graphs"] == 1
    assert result["calls"] == NEW_TOKENS - 1  # every token but the one that the prompt gives


@pytest.mark.parametrize("case", CASES)
def test_a_linear_is_one_operator_in_the_graph(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["models"][case]["operators"] == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_would_copy_no_weight(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["models"][case]["copied"] == []


@pytest.mark.parametrize(
    ("change", "graphs"),
    [
        ("first call", 1),
        ("other number of tokens", 1),
        ("number of tokens of another kernel", 1),
        ("other weights", 2),
        ("other kernel", 3),
    ],
)
def test_a_compiled_linear_follows_what_is_changed(
    change: str, graphs: int, compiled: dict[str, dict[str, Any]]
) -> None:
    assert compiled["changes"][change] == [0.0, graphs]


@pytest.mark.parametrize("kernel", ["chosen", "reference"])
@pytest.mark.parametrize("linear", LINEARS)
def test_every_kind_of_linear_compiles_without_a_break(
    linear: str, kernel: str, compiled: dict[str, dict[str, Any]]
) -> None:
    assert compiled["linears"][f"{linear}, {kernel}"] == 0.0


def test_the_cases_are_those_of_the_script(compiled: dict[str, dict[str, Any]]) -> None:
    assert compiled["models"].keys() == CASES.keys()
    assert len(compiled["linears"]) == 2 * len(LINEARS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_transformers_compiles_and_records_the_step_by_itself() -> None:
    assert run_script("cuda") == {"equal": True, "graphs": 1, "skips": 0}
