# SPDX-License-Identifier: Apache-2.0
"""Orthogonal changes of basis of the residual stream and of the heads, and how linears absorb them.

With activations as rows and T orthogonal, x' = x @ T and y' = y @ T are absorbed exactly:

    a linear that reads x':   W' = W @ T
    a linear that writes y':  W' = T.T @ W,  b' = b @ T
    an embedding:             E' = E @ T

An RMS norm commutes with T once its gain is folded into the linears that read it; a layer norm does so as well
when T keeps the direction of all ones (`keep_mean`), because then T also commutes with subtracting the mean.
Everything computes in float64 and is cast back once.

References:
    Ashkboos et al., 2024, arXiv:2404.00456 (QuaRot), section 4.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from quattuor.errors import InputError, compose
from quattuor.transforms.base import RotationTransform, Transform
from quattuor.transforms.hadamard import hadamard, has_hadamard

__all__ = [
    "FoldNorms",
    "RotateHeads",
    "RotateResidual",
    "fold_gain",
    "fold_norm_bias",
    "random_orthogonal",
    "random_signs",
    "rotate_embedding",
    "rotate_heads_input",
    "rotate_heads_output",
    "rotate_input",
    "rotate_output",
]

ResidualMatrix = Literal["hadamard", "orthogonal"]
HeadMatrix = Literal["auto", "hadamard", "orthogonal"]

ROW_BLOCK = 8192
"""Rows held in float64 at a time, so that a large embedding is not copied whole in double precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldNorms(Transform):
    """Fold the gain and bias of every norm into the linears that read it; gain one and bias zero remain.

    A rotation of the residual stream needs it first. The arithmetic is `fold_gain` and `fold_norm_bias`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateResidual(RotationTransform):
    """Rotate the residual stream by one random orthogonal matrix for the whole model.

    hadamard:    T = D H / sqrt(K), D a random diagonal of +-1
    orthogonal:  T uniform over the orthogonal group (QR of a Gaussian matrix)
    keep_mean:   T = U diag(1, O) U.T with the first column of U along all ones, so that ones @ T = ones.
                 hadamard: U = H / sqrt(K), O a random signed permutation; orthogonal: U a reflection, O uniform

    Args:
        kind: Which of the above; "hadamard" needs a hidden size that has a Hadamard matrix.
        keep_mean: Map the direction of all ones to itself, which layer norms need and RMS norms do not; None does
            so for layer norms, see `for_norm`.

    References:
        Ashkboos et al., 2024, arXiv:2404.00456, section 4, stage 1a.
    """

    kind: ResidualMatrix = "hadamard"
    keep_mean: bool | None = None

    def __post_init__(self) -> None:
        """Reject kinds of matrix that do not exist."""
        _check_kind(self.kind, get_args(ResidualMatrix), "RotateResidual")

    def for_norm(self, norm: Literal["rms", "layer"]) -> "RotateResidual":
        """Return this rotation with `keep_mean` settled for an architecture's norms."""
        return replace(self, keep_mean=norm == "layer") if self.keep_mean is None else self

    def matrix(self, size: int, seed: int) -> Float[Tensor, "K K"]:
        """Return T, float64 on the CPU, the same for the same arguments; `keep_mean=None` counts as False.

        Raises:
            UnsupportedError: "hadamard" and a size without a Hadamard matrix.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "hadamard":
            basis_KK = hadamard(size)
            if self.keep_mean:
                return _signed_permutation_within(basis_KK, generator)
            return random_signs(size, generator).unsqueeze(1) * basis_KK
        if self.keep_mean:
            return _orthogonal_keeping_mean(size, generator)
        return random_orthogonal(size, generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateHeads(RotationTransform):
    """Rotate the value heads, and the columns of the output linear that read them, by one matrix per layer.

    Softmax weights mix tokens, not the entries of a head, so a rotation within each head passes through attention;
    with grouped queries every query head reads an equally rotated value head. The size is head_dim.

    Args:
        kind: "hadamard" is H / sqrt(D); "orthogonal" is uniform over the orthogonal group; "auto" is
            "hadamard" where head_dim has a Hadamard matrix and "orthogonal" elsewhere.

    References:
        Ashkboos et al., 2024, arXiv:2404.00456, section 4, stage 1c without its online part.
    """

    kind: HeadMatrix = "auto"

    def __post_init__(self) -> None:
        """Reject kinds of matrix that do not exist."""
        _check_kind(self.kind, get_args(HeadMatrix), "RotateHeads")

    def matrix(self, size: int, seed: int) -> Float[Tensor, "K K"]:
        """Return T, float64 on the CPU, the same for the same arguments.

        Raises:
            UnsupportedError: "hadamard" and a size without a Hadamard matrix.
        """
        if self.kind == "hadamard" or (self.kind == "auto" and has_hadamard(size)):
            return hadamard(size)
        return random_orthogonal(size, torch.Generator().manual_seed(seed))


def _check_kind(kind: str, known: tuple[str, ...], place: str) -> None:
    if kind not in known:
        raise InputError(
            compose(
                subject="kind",
                value=kind,
                constraint=f"is not one of {known}",
                place=place,
                remedy='use kind="hadamard"',
            )
        )


def random_signs(size: int, generator: torch.Generator) -> Float[Tensor, " K"]:
    """Draw +1 or -1 for each channel, float64."""
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "K K"]:
    """Draw from the uniform distribution over the orthogonal group.

    The signs make the diagonal of R positive; without them QR is not uniform, and differs between libraries.
    """
    gaussian_KK = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q_KK, r_KK = torch.linalg.qr(gaussian_KK)
    rotation_KK: Tensor = q_KK * torch.where(r_KK.diagonal() < 0, -1.0, 1.0).double()
    return rotation_KK


def _orthogonal_keeping_mean(size: int, generator: torch.Generator) -> Float[Tensor, "K K"]:
    """U diag(1, O) U.T with U the reflection that exchanges the first axis and all ones / sqrt(K)."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    inner_KK = torch.eye(size, dtype=torch.float64)
    inner_KK[1:, 1:] = random_orthogonal(size - 1, generator)
    normal_K = torch.full((size,), 1 / sqrt(size), dtype=torch.float64)
    normal_K[0] -= 1
    normal_K /= normal_K.norm()
    for _ in range(2):  # U inner U, as two reflections from the left and a transpose between them
        inner_KK = (inner_KK - 2 * torch.outer(normal_K, normal_K @ inner_KK)).T
    return inner_KK


def _signed_permutation_within(basis: Float[Tensor, "K K"], generator: torch.Generator) -> Float[Tensor, "K K"]:
    """U diag(1, P) U.T with U the basis and P a random signed permutation."""
    size = basis.shape[0]
    order_K = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(size - 1, generator=generator)))
    signs_K = random_signs(size, generator)
    signs_K[0] = 1
    return (basis * signs_K) @ basis[:, order_K].T


def fold_gain(weight: Float[Tensor, "N K"], gain: Float[Tensor, " K"]) -> Float[Tensor, "N K"]:
    """Return W * gain: the weight of a linear that reads a norm whose gain has been set to one.

    Args:
        weight: Weight of a linear that reads the norm.
        gain: Effective gain, with any offset included (1 + w for Gemma).
    """
    return (weight.detach().double() * gain.detach().double()).to(weight.dtype)


def fold_norm_bias(
    weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, norm_bias: Float[Tensor, " K"]
) -> Float[Tensor, " N"]:
    """Return b + W @ norm_bias: the bias of a linear that reads a norm whose bias has been set to zero.

    Args:
        weight: The weight before `fold_gain`: the norm adds its bias after its gain.
        bias: The linear's bias; None counts as zero, and the linear then gains a bias.
        norm_bias: Bias of the norm.
    """
    folded_N = weight.detach().double() @ norm_bias.detach().double()
    if bias is None:
        return folded_N.to(weight.dtype)
    return (bias.detach().double() + folded_N).to(bias.dtype)


def rotate_input(weight: Float[Tensor, "N K"], rotation: Float[Tensor, "K K"]) -> Float[Tensor, "N K"]:
    """Return W @ T: the weight of a linear whose input is now x @ T.

    This function and those below detach, compute in float64 on the device of the weight and keep its dtype.
    """
    rotation_KK = rotation.to(weight.device, torch.float64)
    rotated_NK = torch.empty_like(weight, requires_grad=False)
    for start in range(0, weight.shape[0], ROW_BLOCK):
        rotated_NK[start : start + ROW_BLOCK] = weight[start : start + ROW_BLOCK].detach().double() @ rotation_KK
    return rotated_NK


def rotate_output(
    weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, rotation: Float[Tensor, "N N"]
) -> tuple[Float[Tensor, "N K"], Float[Tensor, " N"] | None]:
    """Return T.T @ W and b @ T: the parameters of a linear whose output is now y @ T."""
    rotation_NN = rotation.to(weight.device, torch.float64)
    rotated_NK = (rotation_NN.T @ weight.detach().double()).to(weight.dtype)
    return rotated_NK, None if bias is None else (bias.detach().double() @ rotation_NN).to(bias.dtype)


def rotate_embedding(weight: Float[Tensor, "V K"], rotation: Float[Tensor, "K K"]) -> Float[Tensor, "V K"]:
    """Return E @ T: the table of an embedding whose output is now e @ T."""
    return rotate_input(weight, rotation)


def rotate_heads_output(
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None,
    rotation: Float[Tensor, "D D"],
    num_heads: int,
) -> tuple[Float[Tensor, "N K"], Float[Tensor, " N"] | None]:
    """Return the parameters of a linear each of whose output heads is now y_h @ T; N = num_heads * D.

    Raises:
        InputError: The rows are not num_heads heads of the rotation's size.
    """
    _check_heads(weight.shape[0], rotation.shape[0], num_heads, "rows", "rotate_heads_output")
    rotation_DD = rotation.to(weight.device, torch.float64)
    heads_HDK = weight.detach().double().reshape(num_heads, -1, weight.shape[1])
    rotated_NK = (rotation_DD.T @ heads_HDK).flatten(0, 1).to(weight.dtype)
    if bias is None:
        return rotated_NK, None
    return rotated_NK, (bias.detach().double().reshape(num_heads, -1) @ rotation_DD).flatten().to(bias.dtype)


def rotate_heads_input(
    weight: Float[Tensor, "N K"], rotation: Float[Tensor, "D D"], num_heads: int
) -> Float[Tensor, "N K"]:
    """Return the weight of a linear each of whose input heads is now x_h @ T; K = num_heads * D.

    Raises:
        InputError: The columns are not num_heads heads of the rotation's size.
    """
    _check_heads(weight.shape[1], rotation.shape[0], num_heads, "columns", "rotate_heads_input")
    rotation_DD = rotation.to(weight.device, torch.float64)
    heads_NHD = weight.detach().double().reshape(weight.shape[0], num_heads, -1)
    return (heads_NHD @ rotation_DD).flatten(1).to(weight.dtype)


def _check_heads(size: int, head_dim: int, num_heads: int, axis: str, place: str) -> None:
    if size != num_heads * head_dim:
        raise InputError(
            compose(
                subject="num_heads",
                value=num_heads,
                constraint=f"heads of size {head_dim} do not make the {size} {axis} of the weight",
                place=place,
                remedy="count the heads this linear writes or reads: key-value heads for the value linear, "
                "query heads for the output linear",
            )
        )
