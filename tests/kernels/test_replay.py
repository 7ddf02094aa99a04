# SPDX-License-Identifier: Apache-2.0
"""Recorded launches are replayed at new addresses, and only where nothing that Triton looks at has changed.

The kernels of these tests compute on the CPU, at the addresses that a launcher gets.
"""

import copy
import ctypes
import inspect
import pickle
import time

import numpy as np
import pytest
import torch
import triton
from triton import knobs

from quattuor.kernels import replay
from quattuor.kernels.launch import launcher
from quattuor.kernels.replay import Replays

K = 8


def at(address, count):
    """Return a float32 array on memory that exists elsewhere; a kernel's work is no operator of PyTorch."""
    return np.frombuffer((ctypes.c_float * count).from_address(address), dtype=np.float32)


class Compiled:
    """A compiled kernel as Triton 3.6 returns it: a launcher that takes a grid, a stream, and addresses."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, body, launches, scratch_size=0):
        self.run = self
        self.launch_cooperative_grid, self.launch_pdl = False, True
        self.global_scratch_size = self.profile_scratch_size = scratch_size
        self.body, self.launches = body, launches

    def launch(self, *arguments):
        x, y, z, stream, function, _, _, *_, metadata, _, enter, leave = arguments[:13]
        assert (stream, function, metadata, enter, leave) == (5, self.function, self.packed_metadata, None, None)
        self.launches.append((x, y, z))
        self.body(*arguments[13:])


class Kernel:
    """A decorated kernel: bound to a grid, it takes tensors and options."""

    def __init__(self, body, **fields):
        self.launches, self.pre_run_hooks, self.num_ordinary = [], [], 0
        self.signature = inspect.signature(body)
        self.arg_names = list(self.signature.parameters)
        self.compiled = Compiled(body, self.launches, **fields)

    def __getitem__(self, grid):
        def run(*args, num_warps=4, **named):
            assert num_warps == 4
            self.num_ordinary += 1
            for hook in knobs.runtime.launch_enter_hook.calls:
                hook(None)
            bound = self.signature.bind(*args, **named)
            bound.apply_defaults()
            values = [getattr(value, "base", value) for value in bound.arguments.values()]
            values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
            self.compiled.body(*values)
            return self.compiled

        return run


def scale_tokens(x, out, count, FACTOR=3):
    at(out, count)[:] = FACTOR * at(x, count)


def add_weight(x, weight, bias, out, num_tokens):
    rows = at(x, num_tokens * K).reshape(-1, K) + at(weight, K)
    at(out, num_tokens * K)[:] = (rows if bias is None else rows + at(bias, K)).flatten()


@pytest.fixture
def here(monkeypatch):
    """Let tokens on the CPU be replayed, with a stream of its own number."""
    original = replay._is_ready
    meta = torch.empty(0, device="meta")
    monkeypatch.setattr(replay, "_stream", lambda index: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)

    class OnDevice:
        is_cuda = True

        def get_device(self):
            return -1

    monkeypatch.setattr(replay, "_is_ready", lambda x: x.device != meta.device and original(OnDevice()))


class Layer:
    """(3 x + weight) + bias by two kernels and an intermediate tensor."""

    def __init__(self):
        self.weight, self.replays = torch.arange(float(K)), Replays()
        self.kernels = Kernel(scale_tokens), Kernel(add_weight)
        self.bind = launcher

    def compute(self, rows, bias):
        first, second = self.kernels
        spare = torch.empty(3, dtype=torch.int8)  # an intermediate of odd size before the other
        scaled = torch.empty_like(rows)
        out = torch.empty(rows.shape, dtype=rows.dtype)
        self.bind(first, (len(rows),))(rows, scaled, rows.numel(), num_warps=4)
        launcher(second, (1, 2))(scaled, self.weight, bias, out, num_tokens=len(rows))
        assert spare.numel() == 3
        return out

    def __call__(self, x, bias=None):
        y = self.replays.call(self.compute, x, bias, K)
        if y is None:
            y = self.compute(x.reshape(-1, K), bias).view(x.shape)
        expected = 3 * x + self.weight + (0 if bias is None else bias)
        assert y.shape == x.shape
        assert torch.equal(y, expected)
        return y

    @property
    def num_ordinary(self):
        return [kernel.num_ordinary for kernel in self.kernels]


@pytest.mark.usefixtures("here")
def test_later_calls_reach_the_kernels_past_triton():
    layer = Layer()
    for _ in range(4):
        layer(torch.randn(2, 1, K))
    assert layer.num_ordinary == [1, 1]
    assert [kernel.launches for kernel in layer.kernels] == [[(2, 1, 1)] * 3, [(1, 2, 1)] * 3]


@pytest.mark.usefixtures("here")
def test_outputs_of_calls_do_not_share_memory():
    layer, x = Layer(), torch.randn(1, K)
    layer(x)
    first, second = layer(x), layer(2 * x)
    assert torch.equal(first, 3 * x + layer.weight)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("here")
def test_each_count_and_alignment_has_its_own_recording():
    layer, buffer = Layer(), torch.randn(64)
    assert buffer.data_ptr() % 16 == 0
    for offset in (0, 4, 8, 1, 5, 2, 0, 1):
        layer(buffer[offset : offset + K].view(1, K))
    assert layer.num_ordinary == [3, 3]  # remainders 0, 4 and 8
    for count in (2, 3, 2, 3):
        layer(torch.randn(count, K))
    assert layer.num_ordinary == [5, 5]


@pytest.mark.usefixtures("here")
def test_another_bias_is_another_recording():
    layer, x = Layer(), torch.randn(1, K)
    biases = [None, torch.randn(K), torch.randn(K)]
    for bias in biases * 2:
        layer(x, bias)
    assert layer.num_ordinary == [3, 3]
    biases[1].zero_()
    layer(x, biases[1])
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_many_tokens_and_tokens_that_lie_apart_are_called_as_before():
    layer = Layer()
    for x in (torch.randn(replay.MOST_TOKENS + 1, K), torch.randn(4, K)[::2], torch.randn(2, 2 * K)[:, :K]):
        for _ in range(2):
            y = layer.replays.call(layer.compute, x, None, K)
            assert y is None
    layer(torch.randn(replay.MOST_TOKENS, K))
    assert layer.num_ordinary == [1, 1]


@pytest.mark.usefixtures("here")
def test_an_operator_beside_the_launches_prevents_a_replay():
    class Doubling(Layer):
        def compute(self, rows, bias):
            return super().compute((2 * rows).div(2), bias)

    layer = Doubling()
    for _ in range(3):
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_a_launch_that_was_not_noted_prevents_a_replay():
    layer = Layer()
    layer.bind = lambda kernel, grid: kernel[grid]
    for _ in range(3):
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_a_kernel_with_scratch_memory_of_its_own_is_not_replayed():
    layer = Layer()
    layer.kernels = Kernel(scale_tokens, scratch_size=128), Kernel(add_weight)
    for _ in range(3):
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_what_the_interpreter_runs_is_not_replayed():
    layer = Layer()
    for kernel in layer.kernels:
        kernel.compiled = type("Nothing", (), {"body": staticmethod(kernel.compiled.body)})()
    for _ in range(3):
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_hooks_see_ordinary_launches():
    layer, seen = Layer(), []
    layer(torch.randn(1, K))
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        layer(torch.randn(1, K))
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert layer.num_ordinary == [2, 2]
    layer(torch.randn(1, K))
    layer.kernels[0].pre_run_hooks.append(print)
    layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_an_unknown_triton_launches_by_itself(monkeypatch):
    monkeypatch.setattr(replay, "_runtime", [])
    monkeypatch.setattr(replay, "KNOWN_LAUNCHERS", ("2.",))
    layer = Layer()
    for _ in range(3):
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [3, 3]


@pytest.mark.usefixtures("here")
def test_a_descriptor_gets_the_address_of_the_call():
    seen = []

    class Description:
        def __init__(self, base):
            self.base, self.shape, self.strides, self.padding = base, [1, K], [K, 1], "zero"

    def note(x, weight, out):
        seen.append((x, weight))

    kernel, weight, replays = Kernel(note), torch.ones(K), Replays()

    def compute(rows, bias):
        out = torch.empty_like(rows)
        launcher(kernel, (1,))(Description(rows), Description(weight), out)
        return out

    tokens = [torch.randn(1, K) for _ in range(3)]
    for x in tokens:
        replays.call(compute, x, None, K)
    for (described, held), x in zip(seen[1:], tokens[1:], strict=True):
        assert described.base.data_ptr() == x.data_ptr()
        assert held.base.data_ptr() == weight.data_ptr()
        assert (described.shape, described.strides, described.padding) == ([1, K], [K, 1], "zero")
    assert kernel.num_ordinary == 1


@pytest.mark.usefixtures("here")
def test_copies_begin_without_recordings():
    layer = Layer()
    layer(torch.randn(1, K))
    for other in (
        copy.copy(layer.replays),
        copy.deepcopy(layer.replays),
        pickle.loads(pickle.dumps(layer.replays)),
    ):
        layer.replays = other
        layer(torch.randn(1, K))
    assert layer.num_ordinary == [4, 4]


def test_the_launcher_of_the_installed_triton_is_the_one_that_is_known():
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    if not triton.__version__.startswith(replay.KNOWN_LAUNCHERS):
        pytest.skip(f"triton {triton.__version__} launches by itself")
    # grid, stream, function, two flags, two scratch memories, two of metadata, two hooks
    assert driver._BASE_ARGS_FORMAT == "iiiKKppOOOOOO"
    names = {"global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "launch"}
    assert names <= set(driver.CudaLauncher.__init__.__code__.co_names)


@pytest.mark.usefixtures("here")
def test_python_takes_little_longer_than_for_a_dense_linear():
    """Two launches of as many arguments as kernels have, against one operator: 1.5 times as long when written."""
    names = ", ".join(f"a{i}" for i in range(36))
    kernel = Kernel(eval(f"lambda x, out, {names}: None"))
    weights, replays = [torch.ones(K) for _ in range(6)], Replays()

    def compute(rows, bias):
        out, scratch = torch.empty_like(rows), torch.empty_like(rows)
        for target in (scratch, out):
            launcher(kernel, (1, 1, 1))(rows, target, *weights, *range(30))
        return out

    def seconds(call):
        started = time.perf_counter()
        for _ in range(200):
            call()
        return time.perf_counter() - started

    x, dense = torch.randn(1, 1, K), torch.nn.Linear(1, 1, bias=False)
    token = torch.randn(1, 1, 1)
    with torch.no_grad():
        times = [
            (seconds(lambda: replays.call(compute, x, None, K)), seconds(lambda: dense(token))) for _ in range(9)
        ]
    assert kernel.num_ordinary == 2
    assert min(ours for ours, _ in times) < 5 * min(theirs for _, theirs in times)
