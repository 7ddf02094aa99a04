# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process and of its accelerator."""

import sys

import psutil
import torch

__all__ = ["peak_device_memory_bytes", "peak_memory_bytes", "reset_peak_device_memory_"]


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had since it started, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes elsewhere


def peak_device_memory_bytes(device: torch.device | str) -> int | None:
    """Return the most bytes PyTorch has had allocated on a CUDA device since the last reset; None elsewhere."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak_device_memory_(device: torch.device | str) -> None:
    """Start a new measurement on a CUDA device; nothing to do elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
