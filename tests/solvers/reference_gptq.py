# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1 of arXiv:2210.17323 as plainly as possible: float64, one column at a time, one inverse each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["column_feedback", "damp"]


def damp(hessian: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in float64."""
    hessian = hessian.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def column_feedback(
    weight: Tensor, hessian: Tensor, order: Sequence[int], round_column: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, float]:
    """Round columns in the given order; after each, move the free columns to their least-squares optimum.

    After column k is fixed the best the free set F can do is W_F -= d (H_F^-1)_k,: / (H_F^-1)_kk, with the inverse
    taken over k and the columns still free (optimal brain surgeon). No Cholesky factor, no update formulas.

    Args:
        weight: [N, K].
        hessian: The damped Hessian [K, K].
        order: Columns in the order in which they are rounded.
        round_column: (values [N], column index) -> their nearest numbers on the grid.

    Returns:
        The rounded weight, and the sum of the losses d^2 / (H_F^-1)_kk of all columns.
    """
    current, rounded = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    free, loss = list(order), 0.0
    while free:
        k = free[0]
        inverse = torch.linalg.inv(hessian[free][:, free])
        rounded[:, k] = round_column(current[:, k], k).double()
        difference = current[:, k] - rounded[:, k]
        loss += float(difference.square().sum() / inverse[0, 0])
        current[:, free] -= torch.outer(difference / inverse[0, 0], inverse[0])
        free = free[1:]
    return rounded, loss
