# SPDX-License-Identifier: Apache-2.0
"""Quattuor's own kernels and the library products of PyTorch, prepared for timing."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.fp8 import quantize_tokens_fp8
from benchmarks.kernels.timing import Batch, Contender, num_copies
from quattuor.kernels import w4a8_linear, w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, describe_device
from quattuor.kernels.token_quantize import token_quantize

__all__ = ["cublas", "ours", "ours_w4a16", "quantized_rows"]


def quantized_rows(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to 4 bits: codes, channel scale, and integer group scales when there are groups."""
    out_features, in_features = weight.shape
    if group_size is None:
        scale = weight.float().abs().amax(dim=1) / 7
        codes = torch.round(weight.float() / scale[:, None]).clamp(-8, 7).to(torch.int8)
        return codes, scale, None
    groups = weight.float().view(out_features, -1, group_size)
    step = groups.abs().amax(dim=2) / 7
    scale = step.amax(dim=1) / 16
    group_scale = torch.round(step / scale[:, None]).clamp(1, 16)
    codes = torch.round(groups / (scale[:, None] * group_scale)[:, :, None]).clamp(-8, 7)
    return codes.to(torch.int8).view(out_features, in_features), scale, group_scale.half()


def random_codes(shape: torch.Size) -> Tensor:
    """Return uniform 4-bit codes."""
    return torch.randint(-8, 8, shape, dtype=torch.int8, device="cuda")


def ours(weight: Tensor, group_size: int | None, float_scales: bool) -> Iterator[Contender]:
    """Quattuor's W4A8 as a layer uses it, with and without the quantization of activations."""
    out_features, in_features = weight.shape
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        integer_group_scale=group_size is not None and not float_scales,
        **describe_device("cuda"),
    )
    plan = w4a8_linear.plan(problem)
    exact_plan = w4a8_linear.plan(problem, force="reference")
    codes, scale, group_scale = quantized_rows(weight, group_size)
    if float_scales:
        group_scale = group_scale - 0.25  # as in checkpoints: no product with a code leaves int8
    exact_operand = exact_plan.prepare(codes, scale, group_scale)
    operands = [plan.prepare(codes, scale, group_scale)]
    total = num_copies(operands[0].nbytes)
    operands += [plan.prepare(random_codes(codes.shape), scale, group_scale) for _ in range(total - 1)]

    def gate(batch: Batch) -> str | None:
        rows = torch.arange(0, batch.x.shape[0], max(1, batch.x.shape[0] // 8), device="cuda")
        expected = exact_plan.linear(batch.x_codes[rows], batch.x_scale[rows], exact_operand)
        found = plan.linear(batch.x_codes, batch.x_scale, operands[0])[rows]
        return None if torch.equal(found, expected) else "outputs differ from the reference"

    kind = "channel" if group_size is None else f"group{group_size}"
    shared = {
        "name": "quattuor",
        "granularity": kind + "_float" * float_scales,
        "copies": total,
        "describe": plan.implementation,
    }
    yield Contender(
        **shared,
        includes_activation_quantization=False,
        gate=gate,
        run=lambda batch, i: plan.linear(batch.x_codes, batch.x_scale, operands[i % total]),
    )
    yield Contender(
        **shared,
        includes_activation_quantization=True,
        run=lambda batch, i: plan.linear(*token_quantize(batch.x), operands[i % total]),
    )


def ours_w4a16(weight: Tensor, group_size: int) -> Iterator[Contender]:
    """Quattuor's W4A16 with float16 group scales."""
    out_features, in_features = weight.shape
    problem = LinearProblem(
        out_features=out_features,
        in_features=in_features,
        group_size=group_size,
        activation_bits=16,
        **describe_device("cuda"),
    )
    plan = w4a16_linear.plan(problem)
    exact_plan = w4a16_linear.plan(problem, force="reference")
    groups = weight.float().view(out_features, -1, group_size)
    scale = (groups.abs().amax(dim=2) / 7).half()
    codes = torch.round(groups / scale.float()[:, :, None]).clamp(-8, 7).to(torch.int8).view(weight.shape)
    exact_operand = exact_plan.prepare(codes, scale)
    operands = [plan.prepare(codes, scale)]
    total = num_copies(operands[0].nbytes)
    operands += [plan.prepare(random_codes(codes.shape), scale) for _ in range(total - 1)]

    def gate(batch: Batch) -> str | None:
        expected = exact_plan.linear(batch.x[:8], exact_operand).float()
        error = float((plan.linear(batch.x, operands[0])[:8].float() - expected).norm() / expected.norm())
        return None if error < 2e-3 else f"relative error {error:.4f}"

    yield Contender(
        name="w4a16_quattuor",
        granularity=f"group{group_size}",
        includes_activation_quantization=False,
        copies=total,
        gate=gate,
        describe=plan.implementation,
        run=lambda batch, i: plan.linear(batch.x, operands[i % total]),
    )


def cublas(weight: Tensor) -> Iterator[Contender]:
    """The library products of PyTorch: fp16, int8 sums without scaling, fp8 with scales per row."""
    total = num_copies(2 * weight.numel())
    dense = [weight] + [torch.randn_like(weight) for _ in range(total - 1)]
    yield Contender(
        name="cublas_fp16",
        granularity="none",
        includes_activation_quantization=False,
        copies=total,
        run=lambda batch, i: batch.x @ dense[i % total].T,
    )
    total8 = num_copies(weight.numel())
    codes = [torch.randint(-127, 128, weight.shape, dtype=torch.int8, device="cuda") for _ in range(total8)]
    for quantizes in (False, True):
        yield Contender(
            name="cublas_int8",
            granularity="channel",
            includes_activation_quantization=quantizes,
            copies=total8,
            run=lambda batch, i, quantizes=quantizes: torch._int_mm(
                token_quantize(batch.x)[0] if quantizes else batch.x_codes, codes[i % total8].T
            ),
            takes=lambda num_tokens: num_tokens > 16,
        )
    narrow = [torch.randn_like(weight).to(torch.float8_e4m3fn) for _ in range(total8)]
    row_scale = weight.new_ones((1, weight.shape[0]), dtype=torch.float32)

    def scaled(codes: Tensor, scale: Tensor, i: int) -> Tensor:
        return torch._scaled_mm(
            codes,
            narrow[i % total8].T,
            scale_a=scale[:, None],
            scale_b=row_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    for quantizes in (False, True):
        yield Contender(
            name="cublas_fp8",
            granularity="channel",
            includes_activation_quantization=quantizes,
            copies=total8,
            run=lambda batch, i, quantizes=quantizes: scaled(
                *(quantize_tokens_fp8(batch.x) if quantizes else (batch.x_narrow, batch.x_scale)), i
            ),
            takes=lambda num_tokens: num_tokens % 16 == 0,
        )
