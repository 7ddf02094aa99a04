# SPDX-License-Identifier: Apache-2.0
"""Scales of binary coding: converted from a uniform grid, or alternated with the signs."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.formats.base import Format, Parameters
from quattuor.formats.binary import BinaryCoding, binary_parameters, levels
from quattuor.formats.integer import Integer
from quattuor.scales.absmax import AbsMax
from quattuor.scales.base import ScaleDtype, ScaleRule
from quattuor.scales.clustering import SortedRows

__all__ = ["Alternating", "UniformPlanes"]

# Relative to the mean of the diagonal: splits the scale between planes that coincide, and moves no other.
RIDGE = 1e-9
# With more planes alternation from the greedy start ends far above that from the uniform grid.
MAX_GREEDY_BITS = 5


def require_binary(number_format: Format, place: str) -> BinaryCoding:
    """Return the format as BinaryCoding, or refuse."""
    if isinstance(number_format, BinaryCoding):
        return number_format
    raise UnsupportedError(
        compose(
            subject="format",
            value=number_format,
            constraint="has no binary planes",
            place=place,
            remedy="use BinaryCoding(bits), or AbsMax() as the scale rule of Integer(bits)",
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPlanes(ScaleRule):
    """The binary coding of a uniform grid: `inner` fits the grid, and every number of it is kept.

    With GPTQ as the solver the codes are those of GPTQ on the uniform grid, read as planes.

    Args:
        inner: Fits the uniform grid.
        symmetric: Which uniform grid, see `Integer`.
        scale_dtype: How alpha and offset are stored; float16 may round them.

    References:
        Park et al., 2022, arXiv:2206.09557 (LUT-GEMM), section 3.2.
    """

    inner: ScaleRule = field(default_factory=AbsMax)
    symmetric: bool = True
    scale_dtype: ScaleDtype = "float32"

    def check(self, number_format: Format) -> None:
        """Refuse what is not binary coding, and a width that has no uniform grid."""
        self.inner.check(self._uniform(number_format))

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `alpha` and `offset`."""
        uniform = self._uniform(number_format)
        exact = binary_parameters(uniform, self.inner.fit(values, uniform, importance))
        return _store(exact, self.scale_dtype)

    def _uniform(self, number_format: Format) -> Integer:
        return Integer(require_binary(number_format, "UniformPlanes").bits, symmetric=self.symmetric)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternating(ScaleRule):
    """Alternate between the scales that fit the signs best and the signs that fit the scales best.

    greedy start: for each plane, B_i = sign(r), alpha_i = mean |r|, r <- r - alpha_i B_i, from r = x - offset
    a round:      alpha, offset = argmin sum_j importance_j (x_j - sum_i alpha_i B_ij - offset)^2, a linear system
                  every element takes the nearest of the 2^bits numbers

    The error of a group never rises from round to round. It is a local search: from the greedy start it may end
    above rounding to nearest at 5 bits and more. It is therefore also run from a uniform grid (the asymmetric one,
    given an offset), from 6 bits on from that alone, and each group keeps the best of all and of the uniform grids
    themselves, as stored. With an offset the error, weighted by the importance, is never above that of `AbsMax`
    with the same `scale_dtype` on a symmetric grid. Groups whose scales no longer move are left alone.

    Args:
        rounds: Rounds of alternation at most; 0 keeps the starts.
        offset: Whether the sum has a constant term, 16 bits per group.
        start: "best", or only the "greedy" one, as the authors' code does.
        weighted: Use the importance that the solver offers.
        scale_dtype: How alpha and offset are stored.

    References:
        Park et al., 2022, arXiv:2206.09557 (LUT-GEMM), section 3.1; Xu et al., 2018, arXiv:1802.00150, section 3.
    """

    rounds: int = 15
    offset: bool = True
    start: Literal["best", "greedy"] = "best"
    weighted: bool = True
    scale_dtype: ScaleDtype = "float16"

    def __post_init__(self) -> None:
        """Reject a negative number of rounds and a start that does not exist."""
        if self.rounds < 0 or self.start not in ("best", "greedy"):
            raise InputError(
                compose(
                    subject="rounds, start",
                    value=(self.rounds, self.start),
                    constraint="do not describe an alternation",
                    place="Alternating",
                    remedy='use rounds >= 0 and start "best" or "greedy"',
                )
            )

    def check(self, number_format: Format) -> None:
        """Refuse what is not binary coding."""
        require_binary(number_format, "Alternating")

    def fit(
        self,
        values: Float[Tensor, "R G S"],
        number_format: Format,
        importance: Float[Tensor, "*R G S"] | None = None,
    ) -> Parameters:
        """Return `alpha` `[R, G, bits]`, and `offset` `[R, G]` when there is one."""
        binary = require_binary(number_format, "Alternating")
        weight = torch.ones_like(values)
        if importance is not None and self.weighted:
            importance = importance.expand(values.shape)
            mean_RG1 = importance.mean(dim=-1, keepdim=True)
            weight = torch.where(mean_RG1 > 0, importance / torch.where(mean_RG1 > 0, mean_RG1, 1), weight)
        best: Parameters | None = None
        best_error = torch.zeros(())
        for candidate in self._candidates(values, binary, weight):
            error = self.error(values, binary, candidate, weight)
            if best is None:
                best, best_error = candidate, error
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = Parameters(
                **{
                    name: torch.where(better.view(*better.shape, *[1] * (old.dim() - 2)), candidate[name], old)
                    for name, old in best.items()
                }
            )
        assert best is not None, "there is at least one start"
        return best

    def error(
        self,
        values: Float[Tensor, "R G S"],
        number_format: BinaryCoding,
        parameters: Parameters,
        weight: Float[Tensor, "R G S"],
    ) -> Float[Tensor, "R G"]:
        """Return the weighted error of each group under the given parameters."""
        residual = number_format.fake_quantize(values, parameters).sub_(values)
        return residual.square_().mul_(weight).sum(dim=-1)

    def _candidates(
        self, values: Float[Tensor, "R G S"], number_format: BinaryCoding, weight: Float[Tensor, "R G S"]
    ) -> list[Parameters]:
        """Return what the groups choose from, as stored."""
        starts: list[Parameters] = []
        kept: list[Parameters] = []
        if self.start == "best" and number_format.bits > 1:
            # They stay candidates as they are, so that rounding to nearest is never better.
            kept = self._uniform(values, number_format.bits)
            starts.append(kept[-1])
        if not starts or number_format.bits <= MAX_GREEDY_BITS:
            starts.insert(0, self._greedy(values, number_format.bits, weight))
        rows = SortedRows.of(values.flatten(0, 1), weight.flatten(0, 1))
        refined = [self._refine(rows, number_format, start) for start in starts]
        return [_store(item, self.scale_dtype) for item in (*kept, *refined)]

    def _greedy(self, values: Float[Tensor, "R G S"], bits: int, weight: Float[Tensor, "R G S"]) -> Parameters:
        """Return scales found plane by plane; a zero counts as positive."""
        total_RG = weight.sum(dim=-1)
        offset_RG = (weight * values).sum(dim=-1) / total_RG if self.offset else torch.zeros_like(total_RG)
        residual, alphas = values - offset_RG.unsqueeze(-1), []
        for _ in range(bits):
            alphas.append((weight * residual.abs()).sum(dim=-1) / total_RG)
            step = alphas[-1].unsqueeze(-1)
            residual = residual - torch.where(residual >= 0, step, -step)
        alpha = torch.stack(alphas, dim=-1)
        return Parameters(alpha=alpha, offset=offset_RG) if self.offset else Parameters(alpha=alpha)

    def _uniform(self, values: Float[Tensor, "R G S"], bits: int) -> list[Parameters]:
        """Return uniform grids; without an offset the one whose numbers are odd multiples of half a step."""
        rule = AbsMax(scale_dtype=self.scale_dtype)
        if not self.offset:
            step = values.abs().amax(dim=-1) * 2 / (2**bits - 1)
            exact = binary_parameters(Integer(bits), Parameters(scale=step))
            return [Parameters(alpha=exact["alpha"])]
        formats = [Integer(bits), Integer(bits, symmetric=False)]
        exact_grids = [binary_parameters(uniform, rule.fit(values, uniform)) for uniform in formats]
        return [
            Parameters(alpha=item["alpha"].to(values.dtype), offset=item["offset"].to(values.dtype))
            for item in exact_grids
        ]

    def _refine(self, rows: SortedRows, number_format: BinaryCoding, parameters: Parameters) -> Parameters:
        """Run the rounds. Elements of a code are a run of the sorted group, so a round looks at codes only."""
        bits, dtype = number_format.bits, parameters["alpha"].dtype
        scales_PT = parameters["alpha"].flatten(0, 1)
        if self.offset:
            scales_PT = torch.cat([scales_PT, parameters["offset"].flatten().unsqueeze(-1)], dim=1)
        active = torch.arange(len(scales_PT), device=scales_PT.device)
        for _ in range(self.rounds):
            part, current = rows.at(active), scales_PT[active]
            table_PC = levels(current[:, :bits].double(), current[:, bits].double() if self.offset else None)
            solved = _least_squares(part, table_PC, bits, self.offset).to(dtype)
            # A negative scale only swaps codes; the next assignment finds them.
            solved[:, :bits].abs_()
            scales_PT[active] = solved
            active = active[(solved != current).any(dim=1)]
            if not active.numel():
                break
        shape = parameters["alpha"].shape
        refined = Parameters(alpha=scales_PT[:, :bits].reshape(shape))
        return Parameters(**refined, offset=scales_PT[:, bits].reshape(shape[:2])) if self.offset else refined


def _least_squares(
    rows: SortedRows, table: Float[Tensor, "P C"], bits: int, offset: bool
) -> Float[Tensor, "P terms"]:
    """Return the scales, and the offset last, that fit the signs best when elements take their nearest numbers."""
    ascending_PC, order_PC = table.sort(dim=1, stable=True)
    limits_PC = ((ascending_PC[:, 1:] + ascending_PC[:, :-1]) / 2).contiguous()
    inner = torch.searchsorted(rows.points, limits_PC)
    ends = torch.tensor([0, rows.points.shape[1]], device=inner.device).expand(len(inner), 2)
    bounds = torch.cat([ends[:, :1], inner, ends[:, 1:]], dim=1)
    weight_PC, moment_PC = (
        torch.zeros_like(table).scatter_(1, order_PC, sums.gather(1, bounds).diff(dim=1))
        for sums in (rows.weights, rows.moments)
    )
    codes_C = torch.arange(2**bits, device=table.device)
    sign_CP = ((codes_C[:, None] >> torch.arange(bits, device=table.device)) & 1).to(table.dtype) * 2 - 1
    if offset:
        sign_CP = torch.cat([sign_CP, torch.ones_like(sign_CP[:, :1])], dim=1)
    products_CPP = sign_CP[:, :, None] * sign_CP[:, None, :]
    gram_PPP = (weight_PC @ products_CPP.flatten(1)).unflatten(1, products_CPP.shape[1:])
    diagonal = gram_PPP.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(dim=-1, keepdim=True)
    solved: Tensor = torch.linalg.solve(gram_PPP, (moment_PC @ sign_CP).unsqueeze(-1)).squeeze(-1)
    return solved


def _store(parameters: Parameters, scale_dtype: ScaleDtype) -> Parameters:
    """Round to the stored dtype. Raises UnsupportedError when a number is beyond its range."""
    stored = {name: tensor.to(getattr(torch, scale_dtype)) for name, tensor in parameters.items()}
    for name, tensor in stored.items():
        if bool(tensor.isinf().any()):
            raise UnsupportedError(
                compose(
                    subject=name,
                    value=float(parameters[name].abs().max()),
                    constraint=f"is beyond the range of {scale_dtype}",
                    place="BinaryCoding",
                    remedy='use scale_dtype="float32", or repair the weight it comes from',
                )
            )
    return Parameters(**stored)
