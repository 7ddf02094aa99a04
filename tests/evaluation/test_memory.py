# SPDX-License-Identifier: Apache-2.0
"""Peak memory grows with what is allocated and never shrinks."""

import psutil
import pytest
import torch

from quattuor.evaluation.memory import peak_device_memory_bytes, peak_memory_bytes, reset_peak_device_memory_


def test_peak_memory_counts_what_was_freed():
    now = psutil.Process().memory_info().rss
    before = peak_memory_bytes()
    assert before >= now * 0.9
    room = max(0, before - now)
    ones = torch.ones((room + 200_000_000) // 4)
    after = peak_memory_bytes()
    assert after - before > 100_000_000
    del ones
    assert peak_memory_bytes() >= after


def test_a_cpu_has_no_device_memory():
    reset_peak_device_memory_("cpu")
    assert peak_device_memory_bytes("cpu") is None


@pytest.mark.gpu
def test_device_memory_counts_since_the_reset():
    reset_peak_device_memory_("cuda")
    before = peak_device_memory_bytes("cuda")
    torch.ones(1_000_000, device="cuda")
    assert peak_device_memory_bytes("cuda") - before >= 4_000_000
