# SPDX-License-Identifier: Apache-2.0
"""Where the stored tensors of a packed linear lie: on the device that runs it, or in host memory.

Kernels have a weight layout of their own. On a device with memory of its own the stored tensors would take as much
again, only to be saved one day; they wait in host memory instead.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["has_own_memory", "host_copies", "is_brought", "is_present", "moved"]


def has_own_memory(device: torch.device) -> bool:
    """Return whether the memory of a device is not that of the host."""
    return device.type not in ("cpu", "meta")


def is_present(device: torch.device) -> bool:
    """Return whether this machine has a device that another one may have had."""
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def is_brought(module: nn.Module) -> bool:
    """Return whether the buffers of a module are on its device for one call, or belong to another module.

    accelerate brings what it has offloaded and takes it away again; `torch.nn.DataParallel` makes copies.
    """
    hook = module.__dict__.get("_hf_hook")
    is_offloaded = any(
        getattr(item, "offload", False) and getattr(item, "offload_buffers", False)
        for item in getattr(hook, "hooks", (hook,))
    )
    return is_offloaded or "_is_replica" in module.__dict__


def host_copies(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return copies in host memory of the tensors that lie on a device."""
    with torch.inference_mode(False):  # inside, a copy would have no version to tell changes by
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items() if tensor.device == device}


def moved(device: torch.device, fn: Callable[[Tensor], Tensor]) -> torch.device:
    """Return where a function that moves or casts tensors puts those of a device."""
    return fn(torch.empty(0, device=device)).device
