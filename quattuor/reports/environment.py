# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on: hardware and versions."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import quattuor

__all__ = ["hardware", "versions"]

PACKAGES = ("torch", "transformers", "safetensors", "triton")


def hardware() -> dict[str, str | int]:
    """Return the processor, its cores, the memory, and each kind of GPU with its number, memory and driver."""
    facts: dict[str, str | int] = {
        "cpu": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["num_gpus"] = torch.cuda.device_count()
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_driver"] = _driver()
    return facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide numbers and speed."""
    found = {"python": platform.python_version(), "quattuor": quattuor.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    """Return the marketing name of the processor where the system tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    """Return the version of the GPU's kernel driver as it states it itself; CUDA does not know it."""
    stated = Path("/proc/driver/nvidia/version")
    if stated.is_file():
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", stated.read_text())
        if match:
            return match[1]
    return "unknown"
