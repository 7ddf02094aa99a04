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


@pytest.fixture(scope="module")
def graphs() -> dict[str, Any]:
    """Return what fused_graph.py finds; skipped where PyTorch's compiler has no C++ compiler."""
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "fused_graph.py")],
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
