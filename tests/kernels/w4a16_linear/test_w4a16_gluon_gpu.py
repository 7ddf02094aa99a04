# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel on a CUDA device: every tile against float64, what it leaves to Triton, graphs, poison."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.w4a8_linear.hopper import CUTS, make_schedule
from quattuor.kernels.w4a16_linear.gluon import FEW_TOKENS
from quattuor.kernels.w4a16_linear.hopper import COSTS, tile_of
from quattuor.kernels.w4a16_linear.planes import layout_of
from quattuor.kernels.w4a16_linear.reference import decoded_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A random layer, its weight in float64 and its prepared tensors."""

    problem: LinearProblem
    weight: torch.Tensor
    operand: object

    def run(self, x, bias, out_dtype, tile):
        """Compute with one tile on poisoned memory."""
        from quattuor.kernels.w4a16_linear.gluon_kernel import launch_hopper

        tensors = self.operand.layout("fields")
        out = torch.full((x.shape[0], self.problem.out_features), torch.nan, dtype=out_dtype, device="cuda")
        tiles = -(-out.shape[1] // tile.rows) * -(-x.shape[0] // tile.tokens)
        launch_hopper(
            x,
            tensors["packed"],
            tensors["scale"],
            tensors.get("zero_point"),
            tensors["arrivals"],
            bias,
            out,
            layout=layout_of(self.problem),
            group_size=self.problem.group_size,
            tile=tile,
            schedule=make_schedule(tiles, tile.num_steps(tensors["packed"].shape[1]), 132, tile.cut),
        )
        return out


def make_layer(out_features, in_features, *, bits=4, group_size=128, zero="none", seed=0, exact_scale=True):
    """Random codes and scales of both signs, a scale of zero; zero points are "none", "integer" or "real"."""
    torch.manual_seed(seed)
    low = -(2 ** (bits - 1)) if zero == "none" else 0
    codes = torch.randint(low, low + 2**bits, (out_features, in_features), device="cuda")
    codes = codes.to(torch.int8 if zero == "none" else torch.uint8)
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        weight_bits=bits,
        group_size=group_size,
        zero_point=zero != "none",
        activation_bits=16,
        output_dtype=torch.float32,
        **describe_device("cuda"),
    )
    scale = torch.randn(out_features, problem.num_groups, device="cuda")
    scale[0, -1] = 0.0
    scale = scale.half().float() if exact_scale else scale
    zero_point = None
    if zero != "none":
        zero_point = torch.rand_like(scale) * 2**bits
        zero_point = zero_point if zero == "real" else zero_point.floor()
    operand = w4a16_linear.plan(problem, force="gluon").prepare(codes, scale, zero_point)
    return Layer(problem, decoded_weight(problem, codes, scale, zero_point).double(), operand)


def assert_close(found, x, weight, bias, is_rounded=False):
    """Assert what the definition allows: float32 sums of exact operands, or of weights rounded once."""
    exact = x.double() @ weight.T + (0.0 if bias is None else bias.double())
    assert found.isfinite().all()
    error = float((found.double() - exact).norm() / exact.norm())
    if is_rounded:
        assert error < 2 * torch.finfo(x.dtype).eps
    elif found.dtype == torch.float32:
        assert error < 2e-6
    else:
        assert error < torch.finfo(found.dtype).eps


@pytest.mark.parametrize("cut", ["none", "even"])
@pytest.mark.parametrize(("size", "scaling"), COSTS)
def test_every_tile(size, scaling, cut):
    """Odd tails of tokens, rows and K, a bias, integer zero points in every other case, both dtypes."""
    group_size = None if scaling == "row" else 128
    for index, (num_tokens, out_features, in_features) in enumerate(((1, 391, 1304), (515, 640, 2048))):
        zero = ("none", "integer")[index]
        layer = make_layer(out_features, in_features, group_size=group_size, zero=zero, seed=index)
        dtype = torch.bfloat16 if index and cut == "none" else torch.float16
        x = torch.randn(2 * num_tokens, in_features, device="cuda").to(dtype)[::2]
        bias = torch.randn(out_features, device="cuda").to(dtype)
        tile = tile_of(layer.problem, size, scaling, cut)
        out_dtype = torch.float32 if cut == "none" else dtype
        found = layer.run(x, bias, out_dtype, tile)
        assert_close(found, x, layer.weight, bias)
        assert torch.equal(found, layer.run(x, bias, out_dtype, tile)), "equal calls, equal bits"
        assert not layer.operand.layout("fields")["arrivals"].any()


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize(("size", "group_size"), [("slim", 128), ("narrow", 128), ("narrow", 64), ("slim", 32)])
def test_sums_of_the_last_group_while_the_next_runs(size, group_size, unroll):
    layer = make_layer(391, 2048, group_size=group_size, seed=unroll)
    x, bias = torch.randn(130, 2048, device="cuda").half(), torch.randn(391, device="cuda")
    tile = dataclasses.replace(tile_of(layer.problem, size, "sums", "even"), lags=True, unroll=unroll)
    assert_close(layer.run(x, bias, torch.float32, tile), x, layer.weight, bias)


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, None), (2, 64), (4, 32), (4, 64), (4, 96), (4, 512), (8, None), (8, 128)]
)
@pytest.mark.parametrize("num_tokens", [0, 40, 600])
def test_widths_and_groups(bits, group_size, num_tokens):
    layer = make_layer(384, 1304, bits=bits, group_size=group_size, zero="integer", seed=bits)
    plan = w4a16_linear.plan(layer.problem, force="gluon")
    x = torch.randn(num_tokens, 1304, device="cuda").half()
    found = plan.linear(x, layer.operand)
    assert found.shape == (num_tokens, 384)
    if num_tokens:
        assert_close(found, x, layer.weight, None)


@pytest.mark.parametrize("num_tokens", [FEW_TOKENS + 1, 64, 200, 700])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_plan_chooses(num_tokens, dtype):
    """Float32 scales, real zero points and float32 tokens among them, the last two by Triton."""
    for zero, exact_scale in (("none", True), ("real", True), ("integer", False)):
        layer = make_layer(1024, 2048, zero=zero, exact_scale=exact_scale)
        plan = w4a16_linear.plan(layer.problem)
        x = torch.randn(num_tokens, 2048, device="cuda").to(dtype)
        found = plan.linear(x, layer.operand, out_dtype=dtype)
        # what is left to triton from 512 tokens on is decoded, and rounded to the dtype of the tokens
        is_rounded = num_tokens >= 512 and zero == "real"
        assert_close(found, x, layer.weight, None, is_rounded)


def test_strides():
    layer = make_layer(200, 768)
    plan = w4a16_linear.plan(layer.problem, force="gluon")
    x = torch.randn(300, 1536, device="cuda").half()
    for strided in (x[::2, :768], x[:, 5:773], x[:, :768].T.contiguous().T, x[:1, :768].expand(130, -1)):
        assert_close(plan.linear(strided, layer.operand), strided, layer.weight, None)


def test_infinity_stays_in_its_token():
    layer = make_layer(640, 2048)
    plan = w4a16_linear.plan(layer.problem, force="gluon")
    for num_tokens in (40, 128, 300, 600):
        x = torch.randn(num_tokens, 2048, device="cuda").half()
        clean = plan.linear(x, layer.operand)
        x[7, 3] = torch.inf
        spoilt = plan.linear(x, layer.operand)
        assert not spoilt[7, 1:].isfinite().any()
        assert torch.equal(spoilt[8:], clean[8:])


@pytest.mark.parametrize("num_tokens", [64, 128, 300, 700])
def test_graph_replay(num_tokens):
    layer = make_layer(1024, 4096)
    plan = w4a16_linear.plan(layer.problem, force="gluon")
    x = torch.randn(num_tokens, 4096, device="cuda").half()
    expected = plan.linear(x, layer.operand)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.linear(x, layer.operand)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
    fresh = torch.randn_like(x)
    x.copy_(fresh)
    graph.replay()
    assert torch.equal(out, plan.linear(fresh, layer.operand))


@pytest.mark.parametrize("cut", CUTS)
def test_overlapping_launches_do_not_read_too_early(cut):
    layer = make_layer(1024, 4096)
    tile = tile_of(layer.problem, "narrow", "sums", cut)
    x = torch.randn(64, 4096, device="cuda").half()
    # the input of each launch is written by the kernel just before it
    outs = [layer.run(x.roll(shift, dims=0), None, torch.float16, tile) for shift in range(30)]
    for shift, out in enumerate(outs):
        assert_close(out, x.roll(shift, dims=0), layer.weight, None)
