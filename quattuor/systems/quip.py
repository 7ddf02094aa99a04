# SPDX-License-Identifier: Apache-2.0
"""QuIP: 2-bit weights in a random basis that stays at run time."""

from typing import Literal

from quattuor.formats import MidRise
from quattuor.granularity import PerChannel, PerTensor
from quattuor.recipe import Recipe
from quattuor.scales import RootMeanSquare
from quattuor.solvers import GPTQ, CoordinateDescent, Solver, WeightQuantizer
from quattuor.transforms import Incoherence

__all__ = ["quip"]


def quip(
    bits: int = 2,
    *,
    kind: Literal["orthogonal", "hadamard"] = "orthogonal",
    outputs: bool = True,
    multiple: float | None = 2.4,
    order: Literal["activation", "natural"] = "natural",
    num_passes: int = 0,
    sequential: bool = False,
    damping: float = 0.0201,
) -> Recipe:
    """QuIP: make weight and Hessian incoherent, then round with linear feedback (LDLQ, which is GPTQ).

    Args:
        bits: Width of a weight, 2 to 8; the paper has 2, 3 and 4.
        kind: Random orthogonal Kronecker factors, as in the paper, or Hadamard factors with random signs.
        outputs: Turn the outputs too, with one scale for the matrix, as in the paper; off turns the inputs alone,
            and every output channel has a float16 scale.
        multiple: Where the outermost levels lie, in root mean squares; None for where normal numbers have the
            least error at this width: 1.49, 2.05 and 2.51 for 2, 3 and 4 bits.
        order: Columns as they are, or by descending diagonal of the Hessian ("activation").
        num_passes: Greedy passes over all columns after the feedback; with order "activation" this is LDLQ-RG.
        sequential: Collect the inputs of each site after the earlier ones of its block are quantized.
        damping: Added to the Hessian's diagonal, as a fraction of its mean; the authors add 0.01 twice.

    References:
        Chee et al., 2023, arXiv:2307.13304. See docs/systems/quip.md.
    """
    solver: Solver = GPTQ(damping=damping, order=order)
    if num_passes:
        solver = CoordinateDescent(start=solver, num_passes=num_passes, refit=False, damping=damping)
    return Recipe(
        systems=("quip",),
        weights=WeightQuantizer(
            number_format=MidRise(bits),
            granularity=PerTensor() if outputs else PerChannel(),
            scales=RootMeanSquare(multiple=multiple, scale_dtype="float32" if outputs else "float16"),
            solver=solver,
            transform=Incoherence(kind=kind, outputs=outputs),
        ),
        sequential=sequential,
    )
