# SPDX-License-Identifier: Apache-2.0
"""Norms and gates are joined to the quantization of their outputs, and nothing else is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def found_by(program: str) -> dict[str, Any]:
    """Return what a program finds; skips where PyTorch's compiler has no C++ compiler."""
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / program)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    if "InvalidCxxCompiler" in done.stderr:
        pytest.skip("needs a C++ compiler")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    """Return what fused_graph.py finds."""
    return found_by("fused_graph.py")


@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16", "torch.float32"])
def test_norms_and_gates_are_fused_with_the_same_results(dtype: str, graphs: dict[str, Any]) -> None:
    graph = graphs[dtype]
    assert (graph["norms"], graph["gates"]) == (2, 1)
    assert graph["operators"].count("quattuor.rms_norm_quantize.default") == 2
    assert graph["operators"].count("quattuor.silu_mul_quantize.default") == 1
    assert all(graph["equal"])


def test_what_others_read_too_stays(graphs: dict[str, Any]) -> None:
    operators = graphs["torch.float16"]["operators"]
    assert operators.count("fusion_test.norm.default") == 2  # one with a second reader, one without a gain
    assert operators.count("quattuor.token_quantize.default") == 2


def test_a_product_that_only_a_gate_reads_is_joined_to_it() -> None:
    found = found_by("gated_graph.py")
    assert (found["gates"], found["joined"]) == (2, 1)
    operators = found["operators"]
    assert operators.count("quattuor.packed_w4a8_gated.default") == 1
    assert operators.count("quattuor.packed_w4a8.default") == 2  # one with another reader, one whose halves differ
    assert operators.count("quattuor.silu_mul_quantize.default") == 2
    assert all(found["equal"])
