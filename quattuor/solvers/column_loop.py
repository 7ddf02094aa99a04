# SPDX-License-Identifier: Apache-2.0
"""The loop of column feedback: blocks of columns, groups fitted as they start, entries that are kept.

Columns are taken in a given order. Those rounded so far are final; the errors of a column are taken back by all
that follow it, at once inside a piece of columns, by matrix products for the rest of its block and for the other
blocks.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor

from quattuor.formats.base import Format, Parameters
from quattuor.granularity import PerChannel
from quattuor.outliers.error_threshold import ErrorThreshold
from quattuor.scales.base import Grid
from quattuor.solvers.captured import run_captured

__all__ = ["ColumnLoop", "GroupFit", "Rounded", "fit_without", "round_columns", "round_columns_keeping"]

GroupFit = Literal["static", "fresh", "stale"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """What the loop returns, columns in the order of the weight it was given.

    Args:
        codes: One per entry; where an entry is kept, the code that its addition counts from.
        parameters: Of every group.
        additions: Kept entries minus decoded codes, already rounded to float16; None when no entry may be kept.
        columns: Columns that were not rounded, ascending.
        values: What they hold in the end.
    """

    codes: Integer[Tensor, "N K"]
    parameters: Parameters
    additions: Float[Tensor, "N K"] | None
    columns: Int64[Tensor, " k"]
    values: Float[Tensor, "N k"]


def fit_without(
    grid: Grid,
    weight: Float[Tensor, "N K"],
    importance: Float[Tensor, " K"],
    left_out: Bool[Tensor, "*N K"] | None,
) -> Parameters:
    """Fit parameters to the entries that are rounded: the others are zero, and of no importance."""
    if left_out is None:
        return grid.fit(weight, importance)
    return grid.fit(torch.where(left_out, 0.0, weight), torch.where(left_out, 0.0, importance))


class ColumnLoop:
    """Rounds a weight column by column.

    Args:
        weight: The matrix, columns as they are stored.
        grid: The numbers its entries can take.
        importance: Of each column, for the scale rule.
        order: Columns in the order in which they are taken.
        factor: U with H^-1 = U^T U, in that order.
        num_rounded: How many of them are rounded; those behind only take errors back.
        kept: Entries that keep what they hold when their column is rounded, or None.
        threshold: Keeps further entries, found while rounding, or None.
        group_fit: When the parameters of a group are fitted, see `GPTQ`. The rounded columns of a group must
            follow one another in the order unless it is "static".
        column_block: Columns whose errors the rest of the matrix takes back at once.
    """

    def __init__(
        self,
        weight: Float[Tensor, "N K"],
        grid: Grid,
        importance: Float[Tensor, " K"],
        *,
        order: Int64[Tensor, " K"],
        factor: Float[Tensor, "K K"],
        num_rounded: int,
        kept: Bool[Tensor, "N K"] | None = None,
        threshold: ErrorThreshold | None = None,
        group_fit: GroupFit = "static",
        column_block: int = 128,
    ) -> None:
        """Bring everything into the order of the loop."""
        self.grid, self.order, self.factor, self.num_rounded = grid, order, factor, num_rounded
        self.column_block, self.threshold = column_block, threshold
        self.num_groups = grid.granularity.num_groups(weight.shape[1])
        self.group_of = order // (weight.shape[1] // self.num_groups)
        self.group_fit: GroupFit = group_fit if self.num_groups > 1 else "static"
        self.live = weight[:, order].clone()
        self.importance = importance[order]
        self.kept = None if kept is None else kept[:, order]
        self.limit = None
        if threshold is not None:
            self.limit = threshold.limit(self.live, factor.diagonal())
            self.kept = torch.zeros_like(self.live, dtype=torch.bool) if self.kept is None else self.kept
        self.fitted: dict[int, Parameters] = {}

    def run(self) -> Rounded:
        """Round all columns in turn."""
        static = self._fit_all() if self.group_fit == "static" else None
        columns = None if static is None else static.columns(self.group_of)
        codes, additions = [], []
        for block in self._blocks():
            start, stop, errors = block[0][0], block[-1][1], []
            before = self.live.clone() if self.group_fit == "stale" else self.live
            for first, last in block:
                piece = columns.slice(first, last) if columns is not None else self._fit_group(first, before)
                codes_NB, error_NB, addition_NB = self._round(first, last, piece)
                if last < stop:
                    self.live[:, last:stop].addmm_(error_NB, self.factor[first:last, last:stop], alpha=-1)
                codes.append(codes_NB)
                errors.append(error_NB)
                additions.append(addition_NB)
            self.live[:, stop:].addmm_(torch.cat(errors, dim=1), self.factor[start:stop, stop:], alpha=-1)
        parameters = self._joined() if static is None else static
        return self._result(parameters, codes, additions)

    def _fit_all(self) -> Parameters:
        """Fit every group to the weight before any feedback, columns as they are stored."""
        back = torch.argsort(self.order)
        left_out: Tensor | None = None
        if self.kept is not None:
            left_out = self.kept.clone()
            if self.threshold is not None and self.limit is not None:
                left_out |= self._candidates(self.live[:, back], self.factor.diagonal()[back], self.grid)[
                    :, self.order
                ]
            left_out[:, self.num_rounded :] = True
            left_out = left_out[:, back]
        elif self.num_rounded < len(self.order):
            left_out = torch.zeros_like(self.order, dtype=torch.bool)
            left_out[self.order[self.num_rounded :]] = True
        return fit_without(self.grid, self.live[:, back], self.importance[back], left_out)

    def _fit_group(self, first: int, weight: Float[Tensor, "N K"]) -> Parameters:
        """Fit the group that a column belongs to, when it is the group's first; otherwise recall it."""
        group = int(self.group_of[first])
        if group not in self.fitted:
            last = first + int((self.group_of[first : self.num_rounded] == group).sum())
            members_NS = weight[:, first:last]
            left_out = None if self.kept is None else self.kept[:, first:last]
            if self.threshold is not None and left_out is not None:
                left_out = left_out | self._candidates(
                    members_NS, self.factor.diagonal()[first:last], self._group_grid
                )
            self.fitted[group] = fit_without(self._group_grid, members_NS, self.importance[first:last], left_out)
        return self.fitted[group]

    @property
    def _group_grid(self) -> Grid:
        """The grid of a single group."""
        return Grid(number_format=self.grid.number_format, granularity=PerChannel(), scales=self.grid.scales)

    def _candidates(
        self, weight: Float[Tensor, "N K"], sensitivity: Float[Tensor, " K"], grid: Grid
    ) -> Bool[Tensor, "N K"]:
        """Ask the rule which entries would spoil the range of their group."""
        assert self.threshold is not None, "only a rule has candidates"
        assert self.limit is not None, "a rule has a limit"
        split = grid.granularity.split
        values, inv_RGS = split(weight), split((1 / sensitivity).expand(weight.shape).contiguous())
        found = self.threshold.candidates(values, inv_RGS, self.limit, grid.number_format)
        return grid.granularity.merge(found, (weight.shape[0], weight.shape[1]))

    def _round(
        self, first: int, last: int, parameters: Parameters
    ) -> tuple[Integer[Tensor, "N B"], Float[Tensor, "N B"], Float[Tensor, "N B"] | None]:
        """Return codes, errors, and what is added to kept entries."""
        static = (self.grid.number_format, tuple(parameters))
        block, factor = self.live[:, first:last], self.factor[first:last, first:last]
        if self.kept is None:
            codes, errors = run_captured(round_columns, static, block, factor, *parameters.values())
            return codes, errors, None
        limit = self.limit if self.limit is not None else torch.full_like(factor[0, 0], torch.inf)
        kept = self.kept[:, first:last]
        codes, errors, additions = run_captured(
            round_columns_keeping, static, block, factor, kept, limit, *parameters.values()
        )
        return codes, errors, additions

    def _blocks(self) -> list[list[tuple[int, int]]]:
        """Cut the rounded columns into blocks, and blocks into pieces that share what is fitted while rounding.

        A group that is fitted fresh begins with a piece, and never crosses the end of a block unless it is larger:
        when it starts, all its columns have taken back all errors.
        """
        limits = [*range(0, self.num_rounded, self.column_block), self.num_rounded]
        if self.group_fit == "static":
            return [[span] for span in pairwise(limits)]
        starts = (self.group_of[1 : self.num_rounded].diff(prepend=self.group_of[:1]) != 0).nonzero() + 1
        changes = [0, *starts.flatten().tolist(), self.num_rounded]
        if self.group_fit == "stale":
            cuts = sorted({*limits, *changes})
            return [[span for span in pairwise(cuts) if low <= span[0] < high] for low, high in pairwise(limits)]
        blocks: list[list[tuple[int, int]]] = [[]]
        for start, stop in pairwise(changes):
            cuts = [*range(start, stop, self.column_block), stop]
            if blocks[-1] and stop - blocks[-1][0][0] > self.column_block:
                blocks.append([])
            for span in pairwise(cuts):
                if blocks[-1] and span[1] - blocks[-1][0][0] > self.column_block:
                    blocks.append([])
                blocks[-1].append(span)
        return [block for block in blocks if block]

    def _joined(self) -> Parameters:
        """Put the groups side by side; a group of which no column was rounded is fitted to zeros."""
        zeros = torch.zeros_like(self.live[:, :1])
        for group in range(self.num_groups):
            if group not in self.fitted:
                self.fitted[group] = self._group_grid.fit(zeros, torch.ones_like(zeros[0]))
        parts = [self.fitted[group] for group in range(self.num_groups)]
        return Parameters(**{name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})

    def _result(self, parameters: Parameters, codes: list[Tensor], additions: list[Tensor | None]) -> Rounded:
        """Bring everything back into the order of the weight; columns left alone get the code of zero."""
        number_format, rounded = self.grid.number_format, self.order[: self.num_rounded]
        columns, position = self.order[self.num_rounded :].sort()
        zeros = self.live[:, self.num_rounded :, None] * 0
        group_size = self.order.numel() // self.num_groups
        zero_codes = number_format.encode(zeros, parameters.columns(columns // group_size)).squeeze(-1)
        codes_NK = torch.empty(self.live.shape, dtype=zero_codes.dtype, device=self.live.device)
        codes_NK[:, columns] = zero_codes
        codes_NK[:, rounded] = torch.cat([codes_NK[:, :0], *codes], dim=1)
        additions_NK = None
        if self.kept is not None:
            additions_NK = torch.zeros_like(self.live)
            additions_NK[:, rounded] = torch.cat(
                [self.live[:, :0], *(a for a in additions if a is not None)], dim=1
            )
        return Rounded(
            codes=codes_NK,
            parameters=parameters,
            additions=additions_NK,
            columns=columns,
            values=self.live[:, self.num_rounded :][:, position],
        )


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
    columns = number_format.resolved(Parameters(**dict(zip(names, parameters, strict=True))))
    weight_NB, codes, errors = weight.clone(), [], []
    for k in range(weight.shape[1]):
        column_N11, group = weight_NB[:, k, None, None], columns.group(k)
        codes_N11 = number_format.encode(column_N11, group)
        error_N = (column_N11 - number_format.decode(codes_N11, group)).view(-1) / factor[k, k]
        weight_NB[:, k + 1 :].addr_(error_N, factor[k, k + 1 :], alpha=-1)
        codes.append(codes_N11.view(-1))
        errors.append(error_N)
    return torch.stack(codes, dim=1), torch.stack(errors, dim=1)


def round_columns_keeping(
    number_format: Format,
    names: tuple[str, ...],
    weight: Tensor,
    factor: Tensor,
    kept: Tensor,
    limit: Tensor,
    *parameters: Tensor,
) -> tuple[Tensor, ...]:
    """Round as `round_columns` does, but add to the codes of some entries what they lack, in float16.

    An entry is one of them when `kept` says so, or when rounding it would cost e^2 > limit. What float16 loses is
    left as the entry's error, so that the sum of all e^2 still is the output error.

    Args:
        number_format, names, weight, factor, parameters: As for `round_columns`.
        kept: [N, B], bool.
        limit: Largest error that is accepted, a scalar.

    Returns:
        Codes, errors and additions, each [N, B].
    """
    columns = number_format.resolved(Parameters(**dict(zip(names, parameters, strict=True))))
    weight_NB, codes, errors, additions = weight.clone(), [], [], []
    for k in range(weight.shape[1]):
        column_N11, group = weight_NB[:, k, None, None], columns.group(k)
        codes_N11 = number_format.encode(column_N11, group)
        difference_N = (column_N11 - number_format.decode(codes_N11, group)).view(-1)
        is_kept_N = kept[:, k] | ((difference_N / factor[k, k]).square() > limit)
        addition_N = torch.where(is_kept_N, difference_N, 0.0).to(torch.float16).to(difference_N.dtype)
        error_N = (difference_N - addition_N) / factor[k, k]
        weight_NB[:, k + 1 :].addr_(error_N, factor[k, k + 1 :], alpha=-1)
        codes.append(codes_N11.view(-1))
        errors.append(error_N)
        additions.append(addition_N)
    return torch.stack(codes, dim=1), torch.stack(errors, dim=1), torch.stack(additions, dim=1)
