# SPDX-License-Identifier: Apache-2.0
"""A recorder notes launches and allocations, and whatever else happens."""

import ast
from pathlib import Path

import torch

from quattuor import kernels
from quattuor.kernels import launch
from quattuor.kernels.launch import Recorder


def test_a_recorder_names_the_obstacle():
    with Recorder() as recorder:
        torch.ones(3).view(1, 3)
    assert "aten.ones" in recorder.obstacle
    with Recorder() as recorder:
        torch.empty(3).view(1, 3)[:, :2]
    assert recorder.obstacle is None
    assert not launch.is_recording()


def test_every_launch_goes_through_launcher():
    folder = Path(kernels.__file__).parent
    direct = []
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched = ast.unparse(node.func.value)
                if launched.endswith("kernel"):
                    direct.append(f"{path.relative_to(folder)}:{node.lineno}: {launched}")
    assert direct == ["launch.py:" + place for place in in_launcher()]


def in_launcher():
    """Lines of `launch.py` that launch a kernel: inside `launcher` alone."""
    tree = ast.parse(Path(launch.__file__).read_text(encoding="utf-8"))
    [function] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "launcher"]
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [f"{node.lineno}: kernel" for node in calls if isinstance(node.func, ast.Subscript)]
