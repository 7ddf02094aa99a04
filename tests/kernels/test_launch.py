# SPDX-License-Identifier: Apache-2.0
"""A recorder notes launches and allocations, and whatever else happens."""

import torch

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
