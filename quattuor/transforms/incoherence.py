# SPDX-License-Identifier: Apache-2.0
"""A random basis for each weight, so that neither it nor its Hessian has concentrated entries.

The basis stays at run time: inputs go through a map before the codes, outputs through one after them. What is
stored is rounded first, and the weight is then moved with the exact inverse of the stored maps, so that before any
rounding of codes the layer computes what it did.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.online_maps import Kronecker
from quattuor.transforms.base import TransformedWeight, WeightTransform
from quattuor.transforms.hadamard import hadamard, has_hadamard
from quattuor.transforms.rotation import random_orthogonal, random_signs

__all__ = ["Incoherence", "balanced_factors"]

Kind = Literal["orthogonal", "hadamard"]
LARGEST_FACTOR = 1024
"""A stored factor beyond this costs as much as the codes that it serves."""
SMALLEST_SHARE = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoherence(WeightTransform):
    """Rescale the columns, then turn inputs and outputs by random Kronecker products.

    D   = (diag(H) / diag(W^T W))^(1/4), each clamped at 1e-8 of its maximum; geometric mean 1
    T   = diag(1 / D) P (V1 x V2),   G = (U1 x U2) P'
    W~  = G^-T W T^-T,   H~ = T^T H T,   and W = G^T W~ T^T

    so that y = x @ W.T is ((x @ T) @ W~.T) @ G. After D alone, diag(H~) is proportional to the squared norms of
    the columns of W~, and tr(H~) |W~|^2 is the least that a diagonal can reach. V1, V2, U1, U2 have sizes next to
    the square root. With "orthogonal" they are uniform over the orthogonal group, and P, P' random permutations;
    with "hadamard" they are Hadamard matrices, and P, P' random signs. Computes in float64; diagonals and factors
    are stored as float16.

    Only one permutation per side is kept. A second one, between the product and the codes, would rename the
    columns of W~ and change nothing else.

    Turning outputs spreads the error of a weight evenly over them, which is right when all matter equally. Without
    it, G = 1, a row keeps its norm and the errors stay in proportion to it where every row has its own scale.

    Args:
        kind: Which factors.
        rescale: Use D; off leaves D = 1.
        outputs: Turn the outputs; off leaves G = 1 and stores no map behind the codes.

    References:
        Chee et al., 2023, arXiv:2307.13304, sections 4.1 and 4.2, algorithm 1; "hadamard": Tseng et al., 2024,
        arXiv:2402.04396, section 3.
    """

    kind: Kind = "orthogonal"
    rescale: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        """Reject kinds that do not exist."""
        if self.kind not in get_args(Kind):
            raise InputError(
                compose(
                    subject="kind",
                    value=self.kind,
                    constraint=f"is not one of {get_args(Kind)}",
                    place="Incoherence",
                    remedy='use kind="orthogonal"',
                )
            )

    def transform(
        self, weight: Float[Tensor, "N K"], hessian: Float[Tensor, "K K"], seed: int
    ) -> TransformedWeight:
        """Return the weight in its random basis.

        Raises:
            UnsupportedError: A side of the weight has no two factors that are small enough, or none with Hadamard
                matrices.
        """
        generator = torch.Generator().manual_seed(seed)
        device = weight.device
        scale_K = torch.ones(weight.shape[1], dtype=torch.float64, device=device)
        if self.rescale:
            scale_K = column_scale(weight, hessian)
        input_map = self._input_map(scale_K, generator)
        output_map = self._output_map(weight.shape[0], generator, device) if self.outputs else None
        weight_NK = _inverse_input(input_map).apply(weight.double())
        if output_map is not None:
            weight_NK = _inverse_output(output_map).apply(weight_NK.T).T
        hessian_KK = input_map.apply(input_map.apply(hessian.double()).T)
        return TransformedWeight(
            weight=weight_NK.to(weight.dtype).contiguous(),
            hessian=((hessian_KK + hessian_KK.T) / 2).to(hessian.dtype),
            input_map=input_map,
            output_map=output_map,
        )

    def _input_map(self, scale: Float[Tensor, " K"], generator: torch.Generator) -> Kronecker:
        """Return T with its tensors as they are stored."""
        size = scale.numel()
        left_PP, right_QQ = self._factors(size, generator)
        if self.kind == "hadamard":
            signs_K = random_signs(size, generator).to(scale.device)
            before_K, gather_K = signs_K / scale, None
        else:
            before_K, gather_K = 1 / scale, _permutation(size, generator).to(scale.device)
        return Kronecker(
            left=left_PP.to(scale.device),
            right=right_QQ.to(scale.device),
            gather=gather_K,
            before=before_K.half() if self.kind == "hadamard" or self.rescale else None,
        )

    def _output_map(self, size: int, generator: torch.Generator, device: torch.device) -> Kronecker:
        """Return G with its tensors as they are stored."""
        left_PP, right_QQ = self._factors(size, generator)
        is_hadamard = self.kind == "hadamard"
        return Kronecker(
            left=left_PP.to(device),
            right=right_QQ.to(device),
            scatter=None if is_hadamard else _permutation(size, generator).to(device),
            after=random_signs(size, generator).half().to(device) if is_hadamard else None,
        )

    def _factors(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return two orthogonal matrices whose sizes multiply to `size`, as they are stored."""
        if self.kind == "hadamard":
            first, second = balanced_factors(size, hadamard_only=True)
            return hadamard(first).half(), hadamard(second).half()
        first, second = balanced_factors(size)
        factors = random_orthogonal(first, generator), random_orthogonal(second, generator)
        # QR lays columns out in memory; a product with them differs in its last bits from one with a reloaded map.
        return factors[0].half().contiguous(), factors[1].half().contiguous()


def column_scale(weight: Float[Tensor, "N K"], hessian: Float[Tensor, "K K"]) -> Float[Tensor, " K"]:
    """Return D = (diag(H) / diag(W^T W))^(1/4) with geometric mean 1, float64."""
    energy_K = hessian.diagonal().double()
    norm_K = weight.double().square().sum(dim=0)
    tiny = torch.finfo(torch.float64).tiny
    energy_K = energy_K.clamp(min=SMALLEST_SHARE * float(energy_K.max()) + tiny)
    norm_K = norm_K.clamp(min=SMALLEST_SHARE * float(norm_K.max()) + tiny)
    logarithm_K = (energy_K.log() - norm_K.log()) / 4
    return (logarithm_K - logarithm_K.mean()).exp()


def balanced_factors(size: int, *, hadamard_only: bool = False) -> tuple[int, int]:
    """Return p >= q with p * q = size and p as small as possible.

    The authors multiply alternate prime factors: 688 * 16 for 11008, where 128 * 86 stores 20 times less.

    Args:
        size: What to split.
        hadamard_only: Both factors must have a Hadamard matrix.

    Raises:
        UnsupportedError: The smallest p is beyond 1024, or no two factors have Hadamard matrices.
    """
    for second in range(isqrt(size), 0, -1):
        first, rest = divmod(size, second)
        if rest or (hadamard_only and not (has_hadamard(first) and has_hadamard(second))):
            continue
        if first <= LARGEST_FACTOR:
            return first, second
        break
    raise UnsupportedError(
        compose(
            subject="size",
            value=size,
            constraint=f"is no product of two {'orders of Hadamard matrices' if hadamard_only else 'numbers'} "
            f"up to {LARGEST_FACTOR}",
            place="Incoherence",
            remedy='use kind="orthogonal"' if hadamard_only else "keep this linear out with a skip rule",
        )
    )


def _permutation(size: int, generator: torch.Generator) -> Integer[Tensor, " K"]:
    dtype = torch.int16 if size <= 2**15 else torch.int32
    return torch.randperm(size, generator=generator).to(dtype)


def _inverse_input(input_map: Kronecker) -> Kronecker:
    """Return T^-T, which moves the rows of a weight whose inputs go through T."""
    return Kronecker(
        left=torch.linalg.inv(input_map.left.double()).T,
        right=torch.linalg.inv(input_map.right.double()).T,
        gather=input_map.gather,
        before=None if input_map.before is None else 1 / input_map.before.double(),
    )


def _inverse_output(output_map: Kronecker) -> Kronecker:
    """Return G^-1, which moves the columns of a transposed weight whose outputs go through G."""
    scatter = output_map.scatter
    return Kronecker(
        left=torch.linalg.inv(output_map.left.double()),
        right=torch.linalg.inv(output_map.right.double()),
        gather=None if scatter is None else torch.argsort(scatter.long()).to(scatter.dtype),
        before=None if output_map.after is None else 1 / output_map.after.double(),
    )
