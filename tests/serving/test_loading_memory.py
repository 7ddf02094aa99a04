# SPDX-License-Identifier: Apache-2.0
"""Loading a sharded checkpoint takes the checkpoint and at most one more shard: packed weights are no floats."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "loading_memory.py"
SLACK = 24 * 2**20
"""Modules imported on the way, and what the allocator keeps."""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(*arguments: str) -> str:
    """Return what the script prints."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of 200 MiB."""
    path = tmp_path_factory.mktemp("large") / "packed"
    run("write", str(path))
    return path


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_the_peak_is_the_checkpoint_and_one_shard(device_map: object, folder: Path) -> None:
    found = json.loads(run("load", str(folder), json.dumps(device_map)))
    assert found["shards"] > 5
    assert found["model"] <= found["checkpoint"]
    assert found["floats"] < 0.1 * found["model"]
    assert found["model"] < found["peak"] <= found["checkpoint"] + found["shard"] + SLACK
