# SPDX-License-Identifier: Apache-2.0
"""vLLM's passes and ours leave of a block its products and what quantizes their inputs; needs vLLM, no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.compilation.passes", reason="needs vLLM from 0.20: pip install vllm")

HERE = Path(__file__).parent


def test_a_block_is_four_products_and_four_quantizations() -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(HERE / "vllm_block.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["installed"]
    assert found["equal"] == [True, True]
    names = [name for name in found["operators"] if name.startswith("quattuor.")]
    product = "quattuor.packed_w4a8.default"
    norm, gated = "quattuor.rms_norm_quantize.default", "quattuor.packed_w4a8_gated.default"
    assert names == ["quattuor.token_quantize.default", product, norm, gated, product, norm, product]
    others = {name for name in found["operators"] if not name.startswith("quattuor.")}
    assert others == {"<built-in function getitem>"}
