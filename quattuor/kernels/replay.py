# SPDX-License-Identifier: Apache-2.0
"""Calls that are recorded when a layer is first called for a token count, and replayed afterwards.

Triton binds, specializes and looks up at every launch, and the operations above it check and choose: several
times as long as a small layer takes on a GPU. What all of that decides follows from the layer and from number,
dtype and alignment of its tokens. A `Replay` keeps the decision: compiled kernels, grids and arguments. Only the
addresses of tokens, outputs and intermediate tensors are new in each call. Triton itself has chosen every kernel
that is replayed. What cannot be replayed is called as before, each time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quattuor.kernels.launch import Launch, Recorder

__all__ = ["MOST_TOKENS", "Replay", "Replays"]

#: More tokens keep a GPU busy for longer than their launches take, and come in too many counts to remember.
MOST_TOKENS = 64
#: Versions of Triton whose entry takes what a `Replay` passes; with others every call takes the ordinary path.
KNOWN_LAUNCHERS = ("3.6.",)
#: Boundary in bytes of everything in the scratch memory of a replay; that of PyTorch's allocator.
ALIGNMENT = 512
#: What Triton looks at in an address.
POINTER_ALIGNMENT = 16


class Address(NamedTuple):
    """Where an argument lies: `offset` bytes behind the tokens (0), the outputs (1) or the scratch memory (2)."""

    base: int
    offset: int


class Descriptor:
    """What Triton's entry reads of a tensor descriptor."""

    __slots__ = ("address", "padding", "shape", "strides")

    def __init__(self, address: int, shape: Sequence[int], strides: Sequence[int], padding: str) -> None:
        """Describe a tensor at an address."""
        self.address, self.shape, self.strides, self.padding = address, shape, strides, padding

    @property
    def base(self) -> "Descriptor":
        """The tensor, as far as the entry looks at it."""
        return self

    def data_ptr(self) -> int:
        """Return the address."""
        return self.address


class Step(NamedTuple):
    """One launch of a replay.

    `arguments` are all that the entry takes; at `holes` stand addresses, at `descriptors` descriptors with
    addresses that change, and at STREAM the stream.
    """

    run: Callable[..., None]
    arguments: list[Any]
    holes: tuple[tuple[int, Address], ...]
    descriptors: tuple[tuple[int, Address, Descriptor], ...]


#: Where the entry takes the stream, after the three sizes of the grid.
STREAM = 3


class Replay:
    """A recorded call. Its tokens have the number, dtype, device and alignment of those it was recorded with."""

    def __init__(self, recorder: Recorder, x: Tensor, out: Tensor, shape: torch.Size) -> None:
        """Lay out scratch memory and arguments of a recording without obstacle, for outputs of a shape."""
        places, size = [(x.data_ptr(), x.nbytes, Address(0, 0)), (out.data_ptr(), out.nbytes, Address(1, 0))], 0
        for tensor in recorder.allocations:
            if tensor.data_ptr() != out.data_ptr():
                places.append((tensor.data_ptr(), tensor.nbytes, Address(2, size)))
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._places = [place for place in places if place[1]]
        self._scratch_bytes = size
        self._shape, self._dtype, self._device = shape, out.dtype, out.device
        self._device_index = out.get_device()
        self._kept: list[Tensor] = []
        self._hooks = [launch.kernel.pre_run_hooks for launch in recorder.launches]
        self._steps = [self._step(launch) for launch in recorder.launches]
        del self._places

    def _step(self, launch: Launch) -> Step:
        entry, compiled = launch.compiled.run, launch.compiled
        arguments: list[Any] = [
            *(*launch.grid, 1, 1)[:STREAM],
            None,
            compiled.function,
            entry.launch_cooperative_grid,
            entry.launch_pdl,
            None,  # no scratch memory, see `_obstacle`
            None,
            compiled.packed_metadata,
            None,  # no hooks, see `Replays`
            None,
            None,
        ]
        holes, descriptors = [], []
        for value in launch.values:
            position = len(arguments)
            tensor = getattr(value, "base", value)
            where = self._address(tensor) if isinstance(tensor, Tensor) else None
            if not isinstance(tensor, Tensor):
                arguments.append(value)
            elif tensor is value:
                arguments.append(value.data_ptr())
                holes += [] if where is None else [(position, where)]
            else:
                described = Descriptor(tensor.data_ptr(), value.shape, value.strides, value.padding)
                arguments.append(described)
                descriptors += [] if where is None else [(position, where, described)]
        return Step(entry.launch, arguments, tuple(holes), tuple(descriptors))

    def _address(self, tensor: Tensor) -> Address | None:
        """Return where a tensor lies that is another in each call, or None for one of the layer, which is kept."""
        pointer = tensor.data_ptr()
        for first, nbytes, address in self._places:
            if first <= pointer < first + nbytes:
                return Address(address.base, address.offset + pointer - first)
        self._kept.append(tensor)
        return None

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return the output for other tokens, or None when kernels have something to run before them."""
        for hooks in self._hooks:
            if hooks:
                return None
        out = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self._device)
        bases = (x.data_ptr(), out.data_ptr(), scratch.data_ptr())
        stream = _stream(self._device_index)
        for run, template, holes, descriptors in self._steps:
            arguments = template.copy()
            arguments[STREAM] = stream
            for position, (base, offset) in holes:
                arguments[position] = bases[base] + offset
            for position, (base, offset), described in descriptors:
                arguments[position] = Descriptor(
                    bases[base] + offset, described.shape, described.strides, described.padding
                )
            run(*arguments)
        return out


def _obstacle(recorder: Recorder, x: Tensor, out: Tensor) -> str | None:
    """Return why a recorded call cannot be replayed, or None."""
    if recorder.obstacle is not None:
        return recorder.obstacle
    if not any(tensor.data_ptr() == out.data_ptr() for tensor in recorder.allocations) or not out.is_contiguous():
        return "the output is not a tensor that the call allocates"
    if any(tensor.device != x.device for tensor in recorder.allocations):
        return "tensors are allocated on another device"
    for launch in recorder.launches:
        entry = launch.compiled.run
        sizes = [getattr(entry, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
        if sizes != [0, 0] or not hasattr(entry, "launch"):
            return "the kernel needs scratch memory of its own"
        if launch.kernel.pre_run_hooks:
            return "something runs before the kernel"
    return None


class Replays:
    """The recorded calls of one prepared layer; copies and pickles of it begin empty."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._found: dict[tuple[torch.Size, int, int], Replay | None] = {}

    def __reduce__(self) -> tuple[type["Replays"], tuple[()]]:
        """Leave addresses behind: they belong to this process and this layer."""
        return Replays, ()

    def call(
        self, compute: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor | None:
        """Return what `compute(rows, bias)` gives, or None when the call must take the ordinary path.

        Args:
            compute: From tokens [M, K] to [M, N], always the same for this object.
            x: Plain tokens [..., K] of one dtype and device.
            bias: [N] or None.
            out_features: N.
        """
        key = (x.shape, x.data_ptr() % POINTER_ALIGNMENT, 0 if bias is None else bias.data_ptr())
        replay = self._found.get(key)
        if replay is not None:
            return replay(x) if x.is_contiguous() and _is_ready(x) else None
        if key in self._found or not 0 < x.numel() <= MOST_TOKENS * x.shape[-1]:
            return None
        if not x.is_contiguous() or not _is_ready(x):
            return None
        rows = x.view(-1, x.shape[-1])
        with Recorder() as recorder:
            out = compute(rows, bias)
        y = out.view(*x.shape[:-1], out_features)
        self._found[key] = None if _obstacle(recorder, rows, out) else Replay(recorder, rows, out, y.shape)
        return y


def _is_ready(x: Tensor) -> bool:
    """Return whether launches for tokens can be replayed: on the current device, by a Triton that is known.

    A hook, a profiler's for example, expects what Triton would tell it.
    """
    if not x.is_cuda or torch.cuda.current_device() != x.get_device():
        return False
    runtime = _known_runtime()
    if runtime is None:
        return False
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (getattr(enter, "calls", True) or getattr(leave, "calls", True))


def _stream(device_index: int) -> int:
    """Return the current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


_runtime: list[Any] = []


def _known_runtime() -> Any:
    """Return Triton's runtime settings, or None without a known Triton."""
    if not _runtime:
        try:
            import triton
        except ModuleNotFoundError:
            _runtime.append(None)
        else:
            is_known = triton.__version__.startswith(KNOWN_LAUNCHERS)
            _runtime.append(triton.knobs.runtime if is_known else None)
    return _runtime[0]
