# SPDX-License-Identifier: Apache-2.0
"""LDLQ of arXiv:2307.13304 as plainly as possible: float64, linear feedback with the factor of H itself."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ldlq"]


def ldlq(weight: Tensor, hessian: Tensor, round_column: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, float]:
    """Round from the last column to the first; column i aims at w_i + (W - Q)[:, i+1:] L[i+1:, i].

    H = L diag(d) L^T with unit lower triangular L. No inverse, no update of the weight.

    Returns:
        The rounded weight, and tr(E diag(d) E^T) with E the rounding errors of the aims (section 4.1, eq. 3).
    """
    factor = torch.linalg.cholesky(hessian.double())
    lower = factor / factor.diagonal()
    weight, rounded, loss = weight.double(), torch.zeros(weight.shape, dtype=torch.float64), 0.0
    for i in reversed(range(weight.shape[1])):
        aim = weight[:, i] + (weight - rounded)[:, i + 1 :] @ lower[i + 1 :, i]
        rounded[:, i] = round_column(aim, i).double()
        loss += float(factor[i, i].square() * (aim - rounded[:, i]).square().sum())
    return rounded, loss
