# SPDX-License-Identifier: Apache-2.0
"""Every GPU implementation against the reference, bit for bit, on a CUDA device."""

import dataclasses

import pytest
import torch

from quattuor.kernels import w4a8_linear
from quattuor.kernels.dispatch import describe_device
from quattuor.kernels.w4a8_linear.op import IMPLEMENTATIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = [item.name for item in IMPLEMENTATIONS if item.name != "reference"]


def assert_equal_bits(made, name, x_codes, x_scale, bias, out_dtype):
    """Assert equal bits of an implementation and the reference; skip what the implementation refuses."""
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    by_name = {item.name: item for item in IMPLEMENTATIONS}
    reason = by_name[name].supports(problem)
    if reason is not None:
        pytest.skip(reason)
    outputs = []
    for implementation in (name, "reference"):
        plan = w4a8_linear.plan(problem, force=implementation)
        operand = plan.prepare(made.codes, made.scale, made.group_scale)
        poison = torch.full((x_codes.shape[0], problem.out_features), torch.nan, dtype=out_dtype, device="cuda")
        del poison  # the allocator hands the poisoned memory to the output
        outputs.append(plan.linear(x_codes, x_scale, operand, bias, out_dtype))
        again = plan.linear(x_codes, x_scale, operand, bias, out_dtype)
        assert torch.equal(outputs[-1], again)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("group_size", "integer", "clamps"),
    [
        (None, False, False),
        (32, True, False),
        (128, True, False),
        (64, False, True),
        (128, False, True),
        (128, False, False),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 40, 200])
def test_widths(layer, inputs, name, bits, group_size, integer, clamps, num_tokens):
    scales = {"group_size": group_size, "integer": integer, "clamps": clamps}
    made = layer(391, 1296, bits=bits, **scales, seed=num_tokens, device="cuda")
    x_codes, x_scale = inputs(num_tokens, 1296, seed=bits, device="cuda")
    bias = torch.randn(391, device="cuda", dtype=torch.float16)
    assert_equal_bits(made, name, x_codes, x_scale, bias, torch.float16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1024, 4096), (1, 1), (129, 257), (72, 64), (129, 256)])
@pytest.mark.parametrize("num_tokens", [0, 1, 8, 9, 31, 64, 65, 128, 129, 513])
def test_sizes(layer, inputs, name, num_tokens, out_features, in_features):
    for group_size in (None, 128):
        made = layer(
            out_features, in_features, group_size=group_size, integer=group_size is not None, device="cuda"
        )
        x_codes, x_scale = inputs(num_tokens, in_features, device="cuda")
        assert_equal_bits(made, name, x_codes, x_scale, None, torch.float16)


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(6144, 4096), (4096, 14336), (24576, 4096), (7680, 5120), (5120, 2560), (13824, 5120), (5120, 6912)],
)
@pytest.mark.parametrize(
    "scales", [{}, {"group_size": 128, "integer": True}, {"group_size": 128, "clamps": False}]
)
def test_served_layers(layer, inputs, out_features, in_features, scales):
    """Of Llama-3-8B, Qwen3-8B and each half of a layer of 13B, by what a plan chooses."""
    made = layer(out_features, in_features, **scales, device="cuda")
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    chosen = w4a8_linear.plan(problem)
    operand = chosen.prepare(made.codes, made.scale, made.group_scale)
    exact = w4a8_linear.plan(problem, force="reference")
    exact_operand = exact.prepare(made.codes, made.scale, made.group_scale)
    for num_tokens in (1, 33, 129):
        x_codes, x_scale = inputs(num_tokens, in_features, device="cuda")
        expected = exact.linear(x_codes, x_scale, exact_operand)
        assert torch.equal(chosen.linear(x_codes, x_scale, operand), expected), num_tokens


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [3, 150])
def test_output_dtypes(layer, inputs, name, out_dtype, num_tokens):
    made = layer(1024, 1024, device="cuda")
    x_codes, x_scale = inputs(num_tokens, 1024, device="cuda")
    assert_equal_bits(made, name, x_codes, x_scale, None, out_dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_tokens", [3, 130])
def test_strides(layer, inputs, name, num_tokens):
    made = layer(200, 768, device="cuda")
    x_codes, x_scale = inputs(2 * num_tokens, 768, device="cuda")
    wide = torch.cat((x_codes, x_codes), dim=1)
    for strided in (
        x_codes[::2],
        wide[::2, :768],
        wide[::2, 5:773],
        x_codes.T.contiguous().T[::2],
        x_codes[:1].expand(num_tokens, -1),
    ):
        assert_equal_bits(made, name, strided, x_scale[::2], None, torch.float16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", [-8, 7])
@pytest.mark.parametrize("x_code", [-128, 127])
def test_extremes(layer, inputs, name, code, x_code):
    for num_tokens in (1, 64, 256):
        made = layer(256, 28672, device="cuda")
        made.codes.fill_(code)
        x_codes, x_scale = inputs(num_tokens, 28672, device="cuda")
        x_codes.fill_(x_code)
        assert_equal_bits(made, name, x_codes, x_scale, None, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_batch_position_does_not_matter(layer, inputs, name):
    made = layer(512, 4096, device="cuda")
    problem = dataclasses.replace(made.problem, **describe_device("cuda"))
    if {item.name: item for item in IMPLEMENTATIONS}[name].supports(problem) is not None:
        pytest.skip("refused")
    plan = w4a8_linear.plan(problem, force=name)
    operand = plan.prepare(made.codes, made.scale)
    x_codes, x_scale = inputs(300, 4096, device="cuda")
    together = plan.linear(x_codes, x_scale, operand)
    for start, stop in ((0, 1), (7, 23), (100, 164), (299, 300)):
        assert torch.equal(plan.linear(x_codes[start:stop], x_scale[start:stop], operand), together[start:stop])


@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_graph_replay(layer, inputs, num_tokens):
    made = layer(1024, 4096, device="cuda")
    plan = w4a8_linear.plan(dataclasses.replace(made.problem, **describe_device("cuda")))
    operand = plan.prepare(made.codes, made.scale)
    x_codes, x_scale = inputs(num_tokens, 4096, device="cuda")
    expected = plan.linear(x_codes, x_scale, operand)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.linear(x_codes, x_scale, operand)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
    fresh_codes, fresh_scale = inputs(num_tokens, 4096, seed=9, device="cuda")
    x_codes.copy_(fresh_codes)
    x_scale.copy_(fresh_scale)
    graph.replay()
    assert torch.equal(out, plan.linear(fresh_codes, fresh_scale, operand))


@pytest.mark.parametrize("overlap", ["early", "late"])
@pytest.mark.parametrize("split", [1, 3])
def test_overlapping_launches_do_not_read_too_early(layer, inputs, overlap, split):
    from quattuor.kernels.w4a8_linear.planes import Tile, prepare_planes
    from quattuor.kernels.w4a8_linear.triton_kernel import launch

    made = layer(1024, 4096, device="cuda")
    tensors = prepare_planes(
        dataclasses.replace(made.problem, **describe_device("cuda")), made.codes, made.scale, None
    )
    tile = Tile(rows=64, tokens=16, split=split, num_warps=4, num_stages=3, overlap=overlap)
    x_codes, x_scale = inputs(16, 4096, device="cuda")
    outs = [torch.full((16, 1024), torch.nan, device="cuda", dtype=torch.float16) for _ in range(40)]
    for i, out in enumerate(outs):
        # the input of each launch is written by the kernel just before it
        moved = x_codes.roll(i, dims=0)
        launch(
            moved,
            x_scale,
            tensors["packed"],
            tensors["scale"],
            None,
            tensors["arrivals"],
            None,
            out,
            mode="channel",
            group_size=None,
            tile=tile,
        )
    exact = w4a8_linear.plan(made.problem, force="reference")
    operand = exact.prepare(made.codes, made.scale)
    for i, out in enumerate(outs):
        assert torch.equal(out, exact.linear(x_codes.roll(i, dims=0), x_scale, operand))
