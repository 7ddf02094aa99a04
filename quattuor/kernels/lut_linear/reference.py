# SPDX-License-Identifier: Apache-2.0
"""The definition of the operation in plain PyTorch: decode the weight, multiply in float32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation
from quattuor.kernels.lut_linear.problem import LutProblem
from quattuor.kernels.sparse_product import reference as sparse_product

__all__ = ["Float32", "Reference", "add_sparse", "decoded_weight"]

NAMES = ("codes", "table", "offset", "row_offsets", "columns", "values")


def decoded_weight(problem: LutProblem, codes: Tensor, table: Tensor, offset: Tensor | None) -> Tensor:
    """Return the weight in float32, without the single entries."""
    group_K = torch.arange(problem.in_features, device=codes.device) // (problem.group_size or problem.in_features)
    weight_NK = torch.zeros(codes.shape, device=codes.device)
    if problem.kind == "codebook":
        size = problem.group_size or problem.in_features
        for group in range(problem.num_groups):
            columns = slice(group * size, (group + 1) * size)
            weight_NK[:, columns] = table[:, group].float().gather(1, codes[:, columns].long())
        return weight_NK
    for plane in range(problem.weight_bits):
        sign_NK = ((codes >> plane) & 1).float() * 2 - 1
        weight_NK = weight_NK + table[..., plane].float()[:, group_K] * sign_NK
    return weight_NK if offset is None else weight_NK + offset.float()[:, group_K]


def add_sparse(out_MN: Tensor, x_MK: Tensor, operand: Mapping[str, Tensor]) -> Tensor:
    """Return out + x @ D.T for the single entries D, in float32."""
    if "values" not in operand:
        return out_MN
    entries = (operand[name] for name in ("row_offsets", "columns", "values"))
    return out_MN + sparse_product.multiply(x_MK, *entries)


def finish(out_MN: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Add the bias in float32 and round once."""
    return (out_MN if bias is None else out_MN + bias.float()).to(out_dtype)


class Reference(Implementation):
    """y = x @ (decoded codes + single entries).T (+ bias), decoding the weight anew for each call."""

    name = "reference"
    layout = "codes"
    stored_bits = dict.fromkeys(range(1, 9), 8)

    def supports(self, problem: LutProblem) -> str | None:
        return None

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        named = zip(NAMES, tensors, strict=True)
        return {name: tensor.contiguous() for name, tensor in named if tensor is not None}

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        (x,) = inputs
        weight_NK = decoded_weight(problem, operand["codes"], operand["table"], operand.get("offset"))
        return finish(add_sparse(x.float() @ weight_NK.T, x, operand), bias, out_dtype)


class Float32(Implementation):
    """Keeps codes and single entries decoded as one float32 weight: fast on CPU, where half precision is not."""

    name = "float32"
    layout = "float32"
    stored_bits = dict.fromkeys(range(1, 9), 32)

    def supports(self, problem: LutProblem) -> str | None:
        if problem.device_type != "cpu":
            return "a decoded float32 weight would take more memory than the layer before quantization"
        return None

    def prepare(self, problem: LutProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        codes, table, offset, row_offsets, columns, values = tensors
        weight_NK = decoded_weight(problem, codes, table, offset)
        if values is not None:
            rows = torch.arange(len(codes), device=codes.device).repeat_interleave(row_offsets.long().diff())
            weight_NK[rows, columns.long()] += values.float()
        return {"weight": weight_NK}

    def linear(
        self,
        problem: LutProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return finish(inputs[0].float() @ operand["weight"].T, bias, out_dtype)
