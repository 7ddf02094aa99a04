# SPDX-License-Identifier: Apache-2.0
"""Starts kernels, and notes how where a recorder is at work.

A block of code can be replayed only if nothing but allocations, views and launches by `launcher` happens in it:
operators are watched by a dispatch mode, launches counted by a hook of Triton.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launch", "Recorder", "is_recording", "launcher"]

_ALLOCATIONS = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default}
)


class _State(threading.local):
    recorder: "Recorder | None" = None


_state = _State()


def is_recording() -> bool:
    """Return whether the launches of this thread are being recorded."""
    return _state.recorder is not None


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Return `kernel[grid]`, noted where a recorder is at work."""
    recorder = _state.recorder
    if recorder is None:
        return kernel[grid]  # type: ignore[no-any-return]

    def noted(*args: Any, **options: Any) -> Any:
        compiled = kernel[grid](*args, **options)
        recorder.note(kernel, compiled, grid, args, options)
        return compiled

    return noted


class Launch(NamedTuple):
    """A launch as it was made: the compiled kernel, its grid and the values of all parameters in order."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    values: list[Any]


class Recorder(TorchDispatchMode):
    """Notes the launches and allocations of a block of code, and whether it does anything else.

    Attributes:
        launches: In order.
        allocations: In order; held so that no two share an address.
        obstacle: Why the block cannot be replayed, or None.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.launches: list[Launch] = []
        self.allocations: list[Tensor] = []
        self.obstacle: str | None = None
        self._num_started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operator; note what it allocates."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.is_contiguous():
            self.allocations.append(result)
        elif not func.is_view:
            self.obstacle = f"{func} is called"
        return result

    def __enter__(self) -> "Recorder":
        """Watch operators and launches."""
        from triton import knobs

        knobs.runtime.launch_enter_hook.add(self._count)
        _state.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop, and see whether every launch was noted."""
        from triton import knobs

        super().__exit__(*error)
        _state.recorder = None
        knobs.runtime.launch_enter_hook.remove(self._count)
        if self._num_started != len(self.launches):
            self.obstacle = f"{self._num_started} kernels were launched, {len(self.launches)} by launcher"

    def _count(self, metadata: Any) -> None:
        self._num_started += _state.recorder is self  # the hook sees the launches of all threads

    def note(
        self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Remember a launch that was just made."""
        if any(not hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
            self.obstacle = "the kernel is interpreted"
            return
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        defaults = {name: parameter.default for name, parameter in kernel.signature.parameters.items()}
        values = [given.get(name, defaults[name]) for name in kernel.arg_names]
        self.launches.append(Launch(kernel, compiled, grid, values))
