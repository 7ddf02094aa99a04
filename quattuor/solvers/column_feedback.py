# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round column by column and push each column's error onto the columns that are still free.

With H the Hessian of the layer's output error and U the upper Cholesky factor of its inverse, H^-1 = U^T U, the
error of column k, e = (w_k - q_k) / U_kk, is taken back by W[:, k+1:] -= e U[k, k+1:]. Two facts serve as tests:
a diagonal H makes U diagonal, which is rounding to nearest; and the sum of all e^2 equals tr(D H D^T).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from quattuor.deltas import ColumnDelta, Delta, ElementDelta
from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose
from quattuor.online_maps import Permutation
from quattuor.outliers.base import OutlierRule, Selection
from quattuor.outliers.error_threshold import ErrorThreshold
from quattuor.quantized_tensor import QuantizedTensor
from quattuor.scales.base import Grid
from quattuor.solvers.base import Solution, Solver, hessian_error, require_statistic
from quattuor.solvers.column_loop import ColumnLoop, GroupFit, Rounded

__all__ = ["GPTQ"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQ(Solver):
    """Column feedback with damping, column order, groups, outliers and blocked updates.

    1. dead columns (H_kk = 0): W[:, k] = 0, and H_kk = the mean of the others. (The authors' code has H_kk = 1, so
       that dead columns raise the damping when activations are small.)
    2. parameters of every group are fitted to W before any update, in the original column order
       (`groups="static"`), with importance diag(H)
    3. columns are permuted by descending diag(H) (`order="activation"`)
    4. H += damping * mean(diag(H)) * I,   U = cholesky(H^-1, upper)
    5. for each column k: q_k = Q(w_k), e = (w_k - q_k) / U_kk, W[:, k+1:] -= e U[k, k+1:], where columns beyond
       the current column block are updated once per block

    With static groups the codes come back in the original order, so act-order needs no index at inference. With
    `groups="fresh"` the parameters of a group are fitted when its first column is reached, to columns that have
    taken back all errors so far. In the order of activations the groups then are runs of that order: the weight is
    stored permuted, and the input is permuted at run time.

    Outliers: columns that a rule selects come last and are not rounded. They take back errors to the end, and
    become the exact optimum given the rounded part. Single entries keep what they hold when their column is
    reached. `ErrorThreshold` finds them on the way. Both are stored as float16 additions to the decoded codes.

    Computes in float32, or in float64 when the weight is.

    Args:
        damping: Fraction of the mean diagonal added to the diagonal.
        order: "activation" takes columns by descending diag(H); "natural" takes them as they are.
        groups: "static", "fresh", or "stale": as fresh, but without the errors of the current column block, as in
            the authors' code.
        column_block: Columns handled before the rest is updated; changes speed, and results of stale groups only.

    References:
        Frantar et al., 2022, arXiv:2210.17323, Algorithm 1. Lee et al., 2023, arXiv:2306.02272 (columns kept).
        Dettmers et al., 2023, arXiv:2306.03078, Algorithm 1 (entries kept).
    """

    damping: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    groups: GroupFit = "static"
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
        if self.groups not in ("static", "fresh", "stale"):
            raise InputError(
                compose(
                    subject="groups",
                    value=self.groups,
                    constraint="is not a time at which groups are fitted",
                    place="GPTQ",
                    remedy='use "static", "fresh" or "stale"',
                )
            )

    @property
    def needs(self) -> frozenset[str]:
        """The Hessian."""
        return frozenset({"hessian"})

    @property
    def rows_interact(self) -> bool:
        """Weights stored in the order of activations have a permutation of their own."""
        return self.groups != "static" and self.order == "activation"

    def reason_against(self, outliers: OutlierRule) -> str | None:
        """Accept every rule."""
        return None

    def solve(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        statistics: Mapping[str, Tensor],
        outliers: OutlierRule | None = None,
    ) -> Solution:
        """Return the packed weight. Raises CalibrationError when the damped Hessian is not positive definite."""
        self._check_groups(grid, weight.shape[1])
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        hessian = require_statistic(weight, statistics, "hessian", "GPTQ")
        dead_K = self._dead(hessian)
        weight_NK = torch.where(dead_K, torch.zeros_like(weight), weight)
        importance_K = torch.where(dead_K, torch.ones_like(hessian.diagonal()), hessian.diagonal())
        selection = Selection() if outliers is None else outliers.select(weight_NK, grid, statistics)
        num_kept = 0 if selection.columns is None else selection.columns.numel()
        order_K = self._order(importance_K, selection)
        factor_KK = self._factor(hessian, dead_K, order_K)
        permutation: Permutation | None = None
        elements = selection.elements
        if self.rows_interact and grid.granularity.num_groups(weight.shape[1]) > 1:
            # Groups are runs of the order, so from here on the columns are those that are stored.
            permutation = Permutation(indices=order_K.to(torch.int32))
            weight, weight_NK, hessian = weight[:, order_K], weight_NK[:, order_K], hessian[order_K][:, order_K]
            importance_K, elements = importance_K[order_K], None if elements is None else elements[:, order_K]
            order_K = torch.arange(order_K.numel(), device=order_K.device)
        rounded = ColumnLoop(
            weight_NK,
            grid,
            importance_K,
            order=order_K,
            factor=factor_KK,
            num_rounded=order_K.numel() - num_kept,
            kept=elements,
            threshold=outliers if isinstance(outliers, ErrorThreshold) else None,
            group_fit=self.groups,
            column_block=self.column_block,
        ).run()
        tensor = self._pack(rounded, grid)
        num_dead = int(dead_K.sum())
        return Solution(
            tensor=replace(tensor, input_map=permutation),
            error=hessian_error(weight, tensor.decode(), hessian),
            notes=(f"{num_dead} dead input columns set to zero",) if num_dead else (),
        )

    def _check_groups(self, grid: Grid, num_columns: int) -> None:
        """Refuse to fit groups one after another whose parameters depend on each other."""
        is_one_fit = self.groups == "static" or grid.granularity.num_groups(num_columns) == 1
        if is_one_fit or not grid.scales.couples_groups:
            return
        raise UnsupportedError(
            compose(
                subject="groups",
                value=self.groups,
                constraint=f"fits one group at a time, but {type(grid.scales).__name__} couples those of a row",
                place="GPTQ",
                remedy='use groups="static"',
            )
        )

    def _pack(self, rounded: Rounded, grid: Grid) -> QuantizedTensor:
        """Pack the codes, and what is added to them."""
        tensor = QuantizedTensor.from_codes(
            rounded.codes, rounded.parameters, grid.number_format, grid.granularity
        )
        delta: Delta | None = None
        if rounded.columns.numel():
            additions_Nk = rounded.values - tensor.decode_codes()[:, rounded.columns].to(rounded.values.dtype)
            values_Nk = additions_Nk.to(torch.float16)
            if bool(values_Nk.isinf().any()):
                raise InputError(
                    compose(
                        subject="weight of a column that is kept",
                        value=float(additions_Nk.abs().max()),
                        constraint="is beyond the range of float16",
                        place="GPTQ",
                        remedy="repair the weight, or keep this linear in high precision with a skip rule",
                    )
                )
            delta = ColumnDelta(indices=rounded.columns.to(torch.int32), values=values_Nk)
        if rounded.additions is not None and bool((rounded.additions != 0).any()):
            assert delta is None, "a rule keeps columns or entries"
            delta = ElementDelta.from_dense(rounded.additions, rounded.additions != 0)
        return tensor if delta is None else replace(tensor, delta=delta)

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

    def _order(self, importance: Float[Tensor, " K"], selection: Selection) -> Int64[Tensor, " K"]:
        """Return the columns in the order they are rounded; equal importance keeps the original order.

        Columns that are kept come last.
        """
        if self.order == "natural":
            order_K = torch.arange(importance.numel(), device=importance.device)
        else:
            order_K = torch.argsort(importance, descending=True, stable=True)
        if selection.columns is None:
            return order_K
        is_kept_K = torch.zeros_like(order_K, dtype=torch.bool)
        is_kept_K[selection.columns] = True
        return torch.cat([order_K[~is_kept_K[order_K]], order_K[is_kept_K[order_K]]])

    def _factor(
        self, hessian: Float[Tensor, "K K"], dead: Bool[Tensor, " K"], order: Int64[Tensor, " K"]
    ) -> Float[Tensor, "K K"]:
        """Return U with H^-1 = U^T U for the damped, permuted Hessian.

        Read backwards in rows and columns, the Cholesky factor L of the Hessian read backwards is an upper R with
        H = R R^T. Then U = R^-1, which is L^-1 read backwards: H itself is never inverted.
        """
        backwards_K = order.flip(0)
        damped_KK = hessian[backwards_K][:, backwards_K]
        diagonal_K = damped_KK.diagonal()
        mean = diagonal_K.sum() / (~dead).sum()
        diagonal_K.masked_fill_(dead[backwards_K], mean)
        diagonal_K += self.damping * mean
        lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
        del damped_KK, diagonal_K  # one of a wide layer has almost a gigabyte
        identity_KK = torch.eye(len(order), dtype=lower_KK.dtype, device=lower_KK.device)
        factor_KK: Tensor = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False).flip(0, 1)
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
