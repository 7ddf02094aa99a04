# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column and push each column's error onto the columns that are still free.

With H the Hessian of the layer's output error and U the upper Cholesky factor of its inverse, H^-1 = U^T U, the
error of column k, e = (w_k - q_k) / U_kk, is taken back by W[:, k+1:] -= e U[k, k+1:]. Two facts serve as tests:
a diagonal H makes U diagonal, which is rounding to nearest; and the sum of all e^2 equals tr(D H D^T).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic
from quattuor.solvers.captured import run_captured

__all__ = ["GPTQ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ(Solver):
    """Column feedback with damping, column order, static groups and blocked updates.

    1. dead columns (H_kk = 0): W[:, k] = 0, and H_kk = the mean of the others. (The authors' code has H_kk = 1, so
       that dead columns raise the damping when activations are small.)
    2. parameters of every group are fitted to W before any update, in the original column order (static groups),
       with importance diag(H)
    3. columns are permuted by descending diag(H) (`order="activation"`)
    4. H += damping * mean(diag(H)) * I,   U = cholesky(H^-1, upper)
    5. for each column k: q_k = Q(w_k), e = (w_k - q_k) / U_kk, W[:, k+1:] -= e U[k, k+1:], where columns beyond
       the current column block are updated once per block

    The codes come back in the original order, so act-order needs no index at inference. Computes in float32.

    Args:
        damping: Fraction of the mean diagonal added to the diagonal.
        order: "activation" takes columns by descending diag(H); "natural" takes them as they are.
        column_block: Columns handled before the rest is updated; changes speed, not results.

    References:
        Frantar et al., 2022, arXiv:2210.17323, Algorithm 1.
    """

    damping: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    column_block: int = 128

    def __post_init__(self) -> None:
        """Reject values that cannot be run."""
        if not 0 < self.damping < 1e3 or self.column_block < 1 or self.order not in ("activation", "natural"):
            raise InputError(
                compose(
                    subject="damping, order, column_block",
                    value=(self.damping, self.order, self.column_block),
                    constraint="are out of range",
                    place="GPTQ",
                    remedy='use damping > 0, order "activation" or "natural" and column_block >= 1',
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})

    def solve(self, weight: Float[Tensor, "N K"], grid: Grid, statistics: Mapping[str, Tensor]) -> Solution:
        """Return the packed weight. Raises CalibrationError when the damped Hessian is not positive definite."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian = require_statistic(weight, statistics, "hessian", "GPTQ")
        dead_K = self._dead(hessian)
        weight_NK = torch.where(dead_K, torch.zeros_like(weight), weight)
        importance_K = torch.where(dead_K, torch.ones_like(hessian.diagonal()), hessian.diagonal())
        parameters = grid.fit(weight_NK, importance_K)
        order_K = self._order(importance_K)
        factor_KK = self._factor(hessian, dead_K, order_K)
        codes_NK = self._feed_back(weight_NK[:, order_K], grid, parameters, factor_KK, order_K)
        tensor = QuantizedTensor.from_codes(codes_NK, parameters, grid.number_format, grid.granularity)
        num_dead = int(dead_K.sum())
        return Solution(
            tensor=tensor,
            error=hessian_error(weight, tensor.decode(), hessian),
            notes=(f"{num_dead} dead input columns set to zero",) if num_dead else (),
        )

    def _dead(self, hessian: Float[Tensor, "K K"]) -> Bool[Tensor, " K"]:
        """Return which inputs are always zero. Raises CalibrationError when all are."""
        dead_K = hessian.diagonal() == 0
        if bool(dead_K.all()):
            raise CalibrationError(
                compose(
                    subject="hessian",
                    value=tuple(hessian.shape),
                    constraint="is zero: every calibration token is zero at this layer's input",
                    place="GPTQ",
                    remedy="use data that reaches the layer, or keep it in high precision with a skip rule",
                )
            )
        return dead_K

    def _order(self, importance: Float[Tensor, " K"]) -> Int64[Tensor, " K"]:
        """Return the columns in the order they are rounded; equal importance keeps the original order."""
        if self.order == "natural":
            return torch.arange(importance.numel(), device=importance.device)
        return torch.argsort(importance, descending=True, stable=True)

    def _factor(
        self, hessian: Float[Tensor, "K K"], dead: Bool[Tensor, " K"], order: Int64[Tensor, " K"]
    ) -> Float[Tensor, "K K"]:
        """Return U with H^-1 = U^T U for the damped, permuted Hessian."""
        damped_KK = hessian[order][:, order].clone()
        diagonal_K = damped_KK.diagonal()
        mean = diagonal_K.sum() / (~dead).sum()
        diagonal_K.masked_fill_(dead[order], mean)
        diagonal_K += self.damping * mean
        factor_KK: Tensor
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        if int(info) == 0:
            factor_KK, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
        if int(info) != 0 or not bool(torch.isfinite(factor_KK).all()):
            raise CalibrationError(
                compose(
                    subject="hessian",
                    value=f"{tuple(hessian.shape)}, mean diagonal {float(hessian.diagonal().mean()):.3g}",
                    constraint=f"is not positive definite with damping={self.damping}",
                    place="GPTQ",
                    remedy="raise damping to 0.1, or calibrate with more tokens than input features",
                )
            )
        return factor_KK

    def _feed_back(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        parameters: Parameters,
        factor: Float[Tensor, "K K"],
        order: Int64[Tensor, " K"],
    ) -> Integer[Tensor, "N K"]:
        """Run the loop on the permuted weight; return codes in the original order."""
        num_columns = weight.shape[1]
        group_size = num_columns // grid.granularity.num_groups(num_columns)
        columns = parameters.columns(order // group_size)
        weight_NK, codes = weight.clone(), []
        for start in range(0, num_columns, self.column_block):
            stop = min(start + self.column_block, num_columns)
            block = columns.slice(start, stop)
            codes_NB, error_NB = run_captured(
                round_columns,
                (grid.number_format, tuple(block)),
                weight_NK[:, start:stop],
                factor[start:stop, start:stop],
                *block.values(),
            )
            weight_NK[:, stop:].addmm_(error_NB, factor[start:stop, stop:], alpha=-1)
            codes.append(codes_NB)
        codes_NK = torch.empty(weight.shape, dtype=codes[0].dtype, device=weight.device)
        codes_NK[:, order] = torch.cat(codes, dim=1)
        return codes_NK


def round_columns(
    number_format: Format, names: tuple[str, ...], weight: Tensor, factor: Tensor, *parameters: Tensor
) -> tuple[Tensor, ...]:
    """Round the columns of a block in turn, each with the errors of those before it taken back.

    Args:
        number_format: Encodes and decodes a column.
        names: Names of `parameters`, each [R, B] or [R, 1].
        weight: The block, [N, B].
        factor: Its part of U, [B, B].
        parameters: What the format reads, column by column.

    Returns:
        Codes and errors e = (w - q) / U_kk, each [N, B].
    """
    columns = Parameters(**dict(zip(names, parameters, strict=True)))
    weight_NB, codes, errors = weight.clone(), [], []
    for k in range(weight.shape[1]):
        column_N11, group = weight_NB[:, k, None, None], columns.group(k)
        codes_N11 = number_format.encode(column_N11, group)
        error_N = (column_N11 - number_format.decode(codes_N11, group)).view(-1) / factor[k, k]
        weight_NB[:, k + 1 :].addr_(error_N, factor[k, k + 1 :], alpha=-1)
        codes.append(codes_N11.view(-1))
        errors.append(error_N)
    return torch.stack(codes, dim=1), torch.stack(errors, dim=1)
