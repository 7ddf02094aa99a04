# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 of arXiv:2306.03078 as plainly as possible: float64, one entry at a time, one inverse per column."""

import torch
from torch import Tensor

from quattuor.formats import BilevelInteger
from quattuor.scales import Bilevel

__all__ = ["leave_one_out_gain", "spqr"]


def group_error(values: list[float], inverse: list[float], num_steps: int) -> float:
    """Return sum (w - q)^2 / (H_F^-1)_jj of a group on its own min-max grid with a real zero point."""
    low, high = min(values), max(values)
    scale = (high - low) / num_steps or 1.0
    total = 0.0
    for value, diagonal in zip(values, inverse, strict=True):
        code = min(max(round((value - low) / scale), 0), num_steps)
        total += (code * scale + low - value) ** 2 / diagonal
    return total


def leave_one_out_gain(values: list[float], inverse: list[float], j: int, num_steps: int) -> float:
    """Return how much the error of a group falls when entry j is left out of range and sum."""
    others = [value for i, value in enumerate(values) if i != j]
    rest = [diagonal for i, diagonal in enumerate(inverse) if i != j]
    return group_error(values, inverse, num_steps) - group_error(others, rest, num_steps)


def spqr(
    weight: Tensor, hessian: Tensor, number_format: BilevelInteger, group_size: int, relative: float
) -> tuple[Tensor, Tensor, float]:
    """Return the weight with its outliers, where they are, and the sum of all losses; natural order.

    Provisional outliers are replaced by the mean of the others of their row and group, as the paper has it.
    """
    num_rows, num_columns = weight.shape
    live, final = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian.double()[j:, j:]) for j in range(num_columns)]
    diagonal = [float(inverse[0, 0]) for inverse in inverses]
    limit = relative * sum(float(live[:, j].var()) / diagonal[j] for j in range(num_columns)) / num_columns
    num_steps, loss, parameters = 2**number_format.bits - 1, 0.0, None
    for j in range(num_columns):
        if j % group_size == 0:
            group = live[:, j : j + group_size].clone()
            share = diagonal[j : j + group_size]
            for row in range(num_rows):
                values = live[row, j : j + group_size].tolist()
                found = [leave_one_out_gain(values, share, i, num_steps) > limit for i in range(group_size)]
                rest = [value for value, is_found in zip(values, found, strict=True) if not is_found]
                for i in range(group_size):
                    if found[i]:
                        group[row, i] = sum(rest) / len(rest)
            parameters = Bilevel().fit(group[:, None], number_format)
        codes = number_format.encode(live[:, j, None, None], parameters)
        nearest = number_format.decode(codes, parameters).view(-1).double()
        difference = live[:, j] - nearest
        kept[:, j] = difference.square() / diagonal[j] > limit
        stored = torch.where(kept[:, j], difference, 0.0).half().double()
        final[:, j] = nearest + stored
        difference = difference - stored
        loss += float(difference.square().sum() / diagonal[j])
        live[:, j:] -= torch.outer(difference / diagonal[j], inverses[j][0])
    return final, kept, loss
