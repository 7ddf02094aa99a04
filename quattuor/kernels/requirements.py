# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel of the package needs of a device."""

import functools
import importlib.util
from typing import Protocol

import torch

__all__ = ["reason_against_triton", "runs_on_triton"]


class DeviceProblem(Protocol):
    """A problem that says on which kind of device it runs."""

    @property
    def device_type(self) -> str: ...

    @property
    def compute_capability(self) -> tuple[int, int] | None: ...


def reason_against_triton(problem: DeviceProblem) -> str | None:
    """Return why no Triton kernel of this package runs on the device of a problem, or None."""
    if problem.device_type != "cuda":
        return f"runs on CUDA devices, not on {problem.device_type}"
    if problem.compute_capability is None or problem.compute_capability < (8, 0):
        return f"needs compute capability 8.0, not {problem.compute_capability}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


@functools.cache
def runs_on_triton(device: torch.device) -> bool:
    """Return whether a device runs the Triton kernels: CUDA with triton installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None
