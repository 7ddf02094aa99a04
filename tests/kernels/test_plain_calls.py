# SPDX-License-Identifier: Apache-2.0
"""Operations call their implementation directly, except where something watches operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quattuor.kernels import lut_linear, w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, is_plain_call
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.token_quantize import rms_norm_quantize, silu_mul_quantize, token_quantize

N, K = 6, 16


class Watch(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def products(x):
    """Yield the name of each operation and a call of it on tokens [M, K]."""
    gain = torch.rand(K)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    fields = {"out_features": N, "in_features": K, "output_dtype": torch.float32}
    integer = w4a8_linear.plan(LinearProblem(**fields))
    weight = integer.prepare(codes, torch.rand(N))
    yield "w4a8_linear", lambda: integer.linear(x.round().to(torch.int8), torch.ones(len(x)), weight)
    floating = w4a16_linear.plan(LinearProblem(**fields, activation_bits=16))
    decoded = floating.prepare(codes, torch.rand(N, 1))
    yield "w4a16_linear", lambda: floating.linear(x, decoded)
    table = lut_linear.plan(LutProblem(**fields, weight_bits=2, kind="codebook"))
    entries = table.prepare(codes.remainder(4).to(torch.uint8), torch.randn(N, 1, 4).half())
    yield "lut_linear", lambda: table.linear(x, entries)
    yield "token_quantize", lambda: token_quantize(x)
    yield "rms_norm_quantize", lambda: rms_norm_quantize(x, gain, 1e-6)
    yield "silu_mul_quantize", lambda: silu_mul_quantize(x, x)


NAMES = [name for name, _ in products(torch.zeros(1, K))]


@pytest.mark.parametrize("name", NAMES)
def test_a_watched_call_is_an_operator_and_gives_the_same_bits(name):
    x = 3 * torch.randn(5, K)
    call = dict(products(x))[name]
    plain = call()
    with Watch() as watch:
        watched = call()
    assert f"quattuor::{name}" in watch.seen
    pairs = [(plain, watched)] if isinstance(plain, torch.Tensor) else list(zip(plain, watched, strict=True))
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_a_plain_call_goes_past_the_dispatcher(monkeypatch):
    calls = dict(products(torch.randn(5, K)))

    def fail(*args):
        raise AssertionError("an operator was called")

    for name in NAMES:
        monkeypatch.setattr(getattr(torch.ops.quattuor, name), "__call__", fail, raising=False)
        monkeypatch.setattr(torch.ops.quattuor, name, fail)
    for name, call in calls.items():
        result = call()
        assert len(result) == 5 if isinstance(result, torch.Tensor) else len(result[0]) == 5, name


def test_what_is_watched():
    x = torch.ones(2)
    assert is_plain_call(x)
    assert is_plain_call(x.view(1, 2).detach())
    learned = torch.ones(2, requires_grad=True)
    assert not is_plain_call(learned)
    with torch.no_grad():
        assert is_plain_call(learned)
        assert is_plain_call(torch.relu(learned))
    with FakeTensorMode() as mode:
        assert not is_plain_call(mode.from_tensor(x))
    with Watch():
        assert not is_plain_call(x)
