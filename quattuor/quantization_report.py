# SPDX-License-Identifier: Apache-2.0
"""What a quantization run has to say about itself."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

__all__ = ["LayerReport", "QuantizationReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What happened to one linear. `error` is relative in output space, see `solvers/base.py`."""

    name: str
    number_format: str
    granularity: str
    num_weights: int
    bits_per_weight: float
    error: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class QuantizationReport:
    """What a run did: each layer, seconds by phase, peak memory, calibration tokens."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None
    num_tokens: int = 0
    blocks: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def measure_memory(self, device: torch.device) -> None:
        """Raise the recorded peaks to what is in use now."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, psutil.Process().memory_info().rss)
        if device.type == "cuda":
            self.peak_device_memory_bytes = torch.cuda.max_memory_allocated(device)
