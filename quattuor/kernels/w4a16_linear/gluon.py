# SPDX-License-Identifier: Apache-2.0
"""The operation on Hopper in Gluon, for many tokens: which problems it takes, and what it leaves to Triton."""

import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quattuor.kernels.dispatch import Implementation, LinearProblem, TokenRange
from quattuor.kernels.requirements import reason_against_triton
from quattuor.kernels.w4a8_linear.hopper import make_schedule
from quattuor.kernels.w4a8_linear.triton import processors
from quattuor.kernels.w4a16_linear.hopper import choose_hopper_tile
from quattuor.kernels.w4a16_linear.planes import STORED_BITS, layout_of, prepare_tensors
from quattuor.kernels.w4a16_linear.triton import Triton

__all__ = ["FEW_TOKENS", "MIN_HOPPER_PLANE", "Gluon"]

#: Up to so many tokens streaming the weight is the limit, and the smaller programs of Triton hide more of it.
FEW_TOKENS = 16
#: The shortest plane whose rows in shared memory the bulk copies swizzle and the products read in whole steps.
MIN_HOPPER_PLANE = 32

TRITON = Triton()


def is_left_to_triton(x: Tensor, operand: Mapping[str, Tensor]) -> bool:
    """Return whether tokens or weight are what this kernel does not multiply: float32, and real zero points."""
    return x.dtype == torch.float32 or "offset" in operand


class Gluon(Implementation):
    """Bulk copies, warp specialization and register-operand warpgroup products, for compute capability 9.0."""

    name = "gluon"
    layout = "fields"
    stored_bits = STORED_BITS

    def supports(self, problem: LinearProblem) -> str | None:
        reason = reason_against_triton(problem)
        if reason is not None:
            return reason
        if problem.compute_capability is None or problem.compute_capability[0] != 9:
            return f"needs warpgroup instructions (compute capability 9.0), not {problem.compute_capability}"
        if importlib.util.find_spec("triton.experimental.gluon") is None:
            return "the installed triton has no Gluon (pip install 'triton>=3.6')"
        if layout_of(problem).words > 1:
            return f"unpacks codes of one word, and those of {problem.weight_bits} bits lie in three"
        if layout_of(problem).plane_k < MIN_HOPPER_PLANE:
            return f"needs a group size that is a multiple of {MIN_HOPPER_PLANE}, not {problem.group_size}"
        if problem.in_features % 8:
            return f"bulk copies need in_features to be a multiple of 8, not {problem.in_features}"
        return None

    def declines(self, problem: LinearProblem, tokens: TokenRange) -> str | None:
        if tokens.last is not None and tokens.last <= FEW_TOKENS:
            return "streaming the weight is the limit here, and the smaller programs of triton hide more of it"
        return None

    def remark(self, problem: LinearProblem, tokens: TokenRange) -> str:
        others = "tokens of 32 bits"
        if problem.zero_point:
            others += " and zero points that are no integers"
        return f"{others} take the kernels of triton"

    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        return prepare_tensors(problem, *tensors)

    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        from quattuor.kernels.w4a16_linear.gluon_kernel import launch_hopper

        (x,) = inputs
        if is_left_to_triton(x, operand):
            return TRITON.linear(problem, inputs, operand, bias, out_dtype)
        num_tokens = x.shape[0]
        out = torch.empty(num_tokens, problem.out_features, dtype=out_dtype, device=x.device)
        if num_tokens == 0:
            return out
        row_stride = x.stride(0)
        is_regular = x.stride(1) == 1 and row_stride >= problem.in_features
        if not is_regular or row_stride % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        programs = processors(x.device)[0]
        scale = operand["scale"]
        tile = choose_hopper_tile(num_tokens, problem, programs, scale.dtype == torch.float16)
        num_steps = tile.num_steps(operand["packed"].shape[1])
        num_tiles = -(-problem.out_features // tile.rows) * -(-num_tokens // tile.tokens)
        with torch.cuda.device_of(x):
            launch_hopper(
                x,
                operand["packed"],
                scale,
                operand.get("zero_point"),
                operand["arrivals"],
                bias if bias is None else bias.contiguous(),
                out,
                layout=layout_of(problem),
                group_size=problem.group_size,
                tile=tile,
                schedule=make_schedule(num_tiles, num_steps, programs, tile.cut),
            )
        return out
