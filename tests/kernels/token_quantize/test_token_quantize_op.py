# SPDX-License-Identifier: Apache-2.0
"""Per-token int8 quantization: definition, edge tokens, errors, operator check."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.kernels.token_quantize import rms_norm_quantize, silu_mul_quantize, token_quantize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 127), (17, 1025)])
def test_codes_round_to_nearest_on_the_token_grid(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = token_quantize(x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.shape == shape
    assert scale.shape == shape[:1]
    assert torch.equal(scale, x.float().abs().amax(dim=1) / 127)
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert (codes.abs().amax(dim=1) == 127).all()


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    codes, scale = token_quantize(x)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_edge_tokens_do_not_disturb_their_neighbours():
    x = torch.randn(6, 32)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 3] = torch.inf
    x[4] = 2.0**-149  # the scale underflows to zero
    codes, scale = token_quantize(x)
    assert scale[1] == 0
    assert scale[4] == 0
    assert scale[2:4].isnan().all()
    assert (codes[1:5] == 0).all()
    alone = token_quantize(x[[0, 5]])
    assert torch.equal(codes[[0, 5]], alone[0])
    assert torch.equal(scale[[0, 5]], alone[1])


def test_non_contiguous_input():
    x = torch.randn(16, 6).T[::2]
    assert not x.is_contiguous()
    for strided, plain in zip(token_quantize(x), token_quantize(x.contiguous()), strict=True):
        assert torch.equal(strided, plain)
        assert strided.is_contiguous()


def test_wrong_inputs_are_refused():
    with pytest.raises(InputError, match=r"x\.dim"):
        token_quantize(torch.randn(8))
    with pytest.raises(InputError, match=r"x\.dtype"):
        token_quantize(torch.zeros(2, 8, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(0, 8), (3, 127), (17, 1025)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_is_fused_in_the_right_order(dtype, shape, has_residual):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1])
    codes, scale, hidden = rms_norm_quantize(x, weight, 1e-6, residual if has_residual else None)
    assert torch.equal(hidden, x + residual if has_residual else x)
    assert hidden.data_ptr() != x.data_ptr() or shape[0] == 0
    norm = torch.nn.functional.rms_norm(hidden.float(), shape[1:], None, 1e-6).to(dtype)
    separate = (norm.float() * weight).to(dtype).double()
    error = (codes.double() * scale.double()[:, None] - separate).abs()
    rounding = 2 * torch.finfo(dtype).eps * separate.abs()  # of a norm whose squares are summed in another order
    assert (error <= 0.5001 * scale[:, None] + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_silu_mul_takes_halves_of_one_tensor(dtype):
    both = torch.randn(9, 200).to(dtype)
    gate, up = both.chunk(2, dim=1)
    codes, scale = silu_mul_quantize(gate, up)
    separate = torch.nn.functional.silu(gate.float()).to(dtype) * up
    for found, expected in zip((codes, scale), token_quantize(separate), strict=True):
        assert torch.equal(found, expected)


def test_wrong_inputs_of_fused_functions_are_refused():
    x, weight = torch.randn(2, 8), torch.ones(8)
    for match, arguments in {
        r"x\.dim": (x[0], weight, 1e-6),
        r"weight\.shape": (x, weight[:7], 1e-6),
        r"weight\.dtype": (x, weight.int(), 1e-6),
        "eps=0": (x, weight, 0.0),
        r"residual\.shape": (x, weight, 1e-6, x[:1]),
        r"residual\.dtype": (x, weight, 1e-6, x.half()),
    }.items():
        with pytest.raises(InputError, match=match):
            rms_norm_quantize(*arguments)
    with pytest.raises(InputError, match=r"up\.shape"):
        silu_mul_quantize(x, x[:, :4])
    with pytest.raises(InputError, match=r"up\.device"):
        silu_mul_quantize(x, x.to("meta"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("token_quantize", (torch.randn(3, 8),)),
        ("rms_norm_quantize", (torch.randn(3, 8), torch.ones(8), 1e-6, torch.randn(3, 8))),
        ("rms_norm_quantize", (torch.randn(3, 8), torch.ones(8), 1e-6, None)),
        ("silu_mul_quantize", (torch.randn(3, 8), torch.randn(3, 8))),
    ],
)
def test_framework_operator_check(name, arguments):
    results = torch.library.opcheck(getattr(torch.ops.quattuor, name), arguments)
    assert set(results.values()) == {"SUCCESS"}
