# SPDX-License-Identifier: Apache-2.0
"""Claims of the weight-only papers, each where its condition is planted: less error for no more stored bits."""

import pytest
import torch
from torch import Tensor

from quattuor.recipe import Recipe
from quattuor.solvers import WeightToQuantize, hessian_error
from quattuor.systems import gptq, owq, rtn, spqr, squeezellm


def heavy_tails(generator: torch.Generator, num_rows: int, num_columns: int) -> Tensor:
    """Return normal numbers over the root of a gamma variable: Student's distribution with three degrees."""
    chi = torch.randn(3, num_rows, num_columns, generator=generator).square().sum(dim=0) / 3
    return torch.randn(num_rows, num_columns, generator=generator) / chi.sqrt()


def correlated(generator: torch.Generator, num_columns: int) -> Tensor:
    """Return the Hessian of inputs that share a few directions."""
    mixing = torch.randn(num_columns // 8, num_columns, generator=generator)
    x = torch.randn(4 * num_columns, num_columns // 8, generator=generator) @ mixing
    x = x + 0.7 * torch.randn(x.shape, generator=generator)
    return x.T @ x / len(x)


def cost(recipe: Recipe, weight: Tensor, hessian: Tensor, **own: Tensor) -> tuple[float, float]:
    """Return bits per weight and the relative output error."""
    assert recipe.weights is not None
    item = WeightToQuantize(name="linear", weight=weight, statistics=own)
    tensor = recipe.weights.solve([item], {"hessian": hessian})[0].tensor
    return tensor.bits_per_weight, hessian_error(weight, tensor.decode(), hessian)


def test_spqr_beats_gptq_where_single_weights_are_large(generator: torch.Generator) -> None:
    weight, hessian = heavy_tails(generator, 128, 512), correlated(generator, 512)
    bits, error = cost(spqr(3, 64, outlier_threshold=1.5, damping=0.05), weight, hessian)
    for group_size in (64, 32):
        other_bits, other_error = cost(gptq(3, group_size), weight, hessian)
        assert error < 0.8 * other_error
    assert bits < other_bits


@pytest.mark.parametrize("bits", [3, 4])
def test_squeezellm_beats_the_uniform_grid_where_tails_are_heavy(bits: int, generator: torch.Generator) -> None:
    # A diagonal Hessian, with which column feedback is rounding: the codebook alone makes the difference.
    weight = heavy_tails(generator, 32, 2048)
    energy = torch.rand(2048, generator=generator).pow(-0.5)
    own = {"fisher": energy.expand(weight.shape).contiguous()}
    spent, error = cost(squeezellm(bits), weight, torch.diag(energy), **own)
    other_spent, other_error = cost(gptq(bits, 64), weight, torch.diag(energy))
    assert spent < other_spent
    assert error < 0.6 * other_error


def test_owq_beats_gptq_where_few_inputs_are_loud(generator: torch.Generator) -> None:
    weight, hessian = torch.randn(64, 512, generator=generator), correlated(generator, 512)
    loud = torch.ones(512)
    loud[::128] = 40
    hessian = loud[:, None] * hessian * loud
    spent, error = cost(owq(3), weight, hessian)
    other_spent, other_error = cost(gptq(3, 64), weight, hessian)
    plain_spent, plain_error = cost(rtn(3, 64, symmetric=False), weight, hessian)
    assert spent < other_spent == plain_spent
    assert error < other_error < 0.7 * plain_error
