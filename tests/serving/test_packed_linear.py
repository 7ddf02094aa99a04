# SPDX-License-Identifier: Apache-2.0
"""A served linear equals the module that transformers runs, compiled or not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from served import CASES, Served, channel

from quattuor.activations import DynamicQuantizer
from quattuor.serving import packed_linear

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_module(case: str, generator: torch.Generator) -> None:
    served = Served(case, generator)
    x = torch.randn(2, 3, 256, generator=generator)
    assert torch.equal(served(x), served.reference(served.norm(x)))


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Return what compiled_linear.py measures."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "compiled_linear.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("case", CASES)
def test_one_graph_serves_every_number_of_tokens(case: str, compiled: dict[str, dict[str, Any]]) -> None:
    for how in ("fused", "apart"):
        result = compiled[f"{case}, {how}"]
        assert result["graphs"] == 1  # a second one would mean that the choice of a kernel was traced
        assert result["difference"] == 0


def test_quantization_is_in_the_graph_or_one_operator(compiled: dict[str, dict[str, Any]]) -> None:
    assert "quattuor.token_quantize" not in compiled["channel, fused"]["operators"]
    assert "quattuor.token_quantize" in compiled["channel, apart"]["operators"]
    assert "quattuor.token_quantize" not in compiled["weights only, apart"]["operators"]


@pytest.mark.parametrize("bias", [False, True])
def test_operators_pass_the_framework_check(bias: bool, generator: torch.Generator) -> None:
    facts, operand = packed_linear.prepare(channel(32, 64, generator), DynamicQuantizer(), torch.float32)
    codes, scale = torch.ops.quattuor.token_quantize(torch.randn(3, 64, generator=generator))
    arguments = (codes, scale, list(operand.values()), facts.names, torch.ones(32) if bias else None)
    sizes = (torch.float32, facts.out_features, facts.weight_bits, facts.group_size, facts.promise)
    torch.library.opcheck(torch.ops.quattuor.packed_w4a8, (*arguments, *sizes))
