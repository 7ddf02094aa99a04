# SPDX-License-Identifier: Apache-2.0
"""The float32 path against the reference: equal bits for all widths, sizes and extreme values."""

import pytest
import torch

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a8_linear.float32 import chunk_size


def both(made, x_codes, x_scale, bias=None, out_dtype=None):
    """Return the outputs of the float32 path and of the reference."""
    outputs = []
    for name in ("float32", "reference"):
        plan = w4a8_linear.plan(made.problem, force=name)
        operand = plan.prepare(made.codes, made.scale, made.group_scale)
        outputs.append(plan.linear(x_codes, x_scale, operand, bias, out_dtype))
    return outputs


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("group_size", "integer"), [(None, False), (32, False), (128, True)])
def test_equal_bits_for_every_width(layer, inputs, bits, group_size, integer):
    made = layer(37, 2600, bits=bits, group_size=group_size, integer=integer)
    x_codes, x_scale = inputs(3, 2600)
    fast, exact = both(made, x_codes, x_scale, torch.randn(37, dtype=torch.float16), torch.float32)
    assert torch.equal(fast, exact)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 130])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_bits_for_odd_sizes(layer, inputs, num_tokens, out_dtype):
    made = layer(33, 1025, group_size=100)
    fast, exact = both(made, *inputs(num_tokens, 1025), torch.randn(33), out_dtype)
    assert fast.shape == (num_tokens, 33)
    assert fast.dtype == out_dtype
    assert torch.equal(fast, exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("pattern", ["lowest", "highest", "alternating"])
def test_extreme_values_over_several_chunks(bits, pattern):
    in_features, half = 20000, 2 ** (bits - 1)
    problem = LinearProblem(out_features=3, in_features=in_features, weight_bits=bits, output_dtype=torch.float32)
    sign = torch.ones(in_features)
    if pattern == "alternating":
        sign[1::2] = -1
    code = half - 1 if pattern == "highest" else -half
    codes = (code * sign).clamp(-half, half - 1).to(torch.int8).expand(3, in_features)
    x_codes = (-128 * sign).clamp(-128, 127).to(torch.int8).expand(2, in_features)
    scale, x_scale = torch.tensor([1.0, -1.0, 0.5]), torch.ones(2)
    total = int((codes[0].long() * x_codes[0].long()).sum())
    assert abs(total) > 2**24  # beyond what one float32 sum holds exactly
    for name in ("float32", "reference"):
        plan = w4a8_linear.plan(problem, force=name)
        out = plan.linear(x_codes, x_scale, plan.prepare(codes, scale))
        assert torch.equal(out, torch.tensor(float(total)) * scale.expand(2, 3))


def test_chunks_keep_partial_sums_exact():
    for bits in range(2, 9):
        for group_size in (None, 32):
            problem = LinearProblem(out_features=1, in_features=8, weight_bits=bits, group_size=group_size)
            max_weight = 2 ** (bits - 1) if group_size is None else 128
            assert chunk_size(problem) * 128 * max_weight <= 2**24 < (chunk_size(problem) + 1) * 128 * max_weight


def test_tf32_is_refused_on_cuda(monkeypatch):
    monkeypatch.setattr("quattuor.kernels.w4a8_linear.float32.uses_tf32", lambda: True)
    problem = LinearProblem(out_features=8, in_features=8, device_type="cuda", compute_capability=(7, 5))
    rows = [row for row in w4a8_linear.plan(problem).explain() if row.implementation == "float32"]
    assert all("TF32" in row.reason and not row.is_chosen for row in rows)
