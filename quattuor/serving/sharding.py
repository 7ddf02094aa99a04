# SPDX-License-Identifier: Apache-2.0
"""Which part of a stored tensor one device holds: merged linears, and tensor parallelism.

A serving engine merges linears that read the same input (query, key and value; gate and up) into one, and cuts it
along its outputs or its inputs over several devices. A packed weight must be cut where its storage allows it:
between bytes, between groups that share a scale, between blocks whose columns are permuted together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from quattuor.errors import CheckpointError, InputError, compose

__all__ = ["Axis", "MergedLinear", "Piece", "StoredTensor", "fill_"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """How a dimension of a stored tensor counts the features of a linear.

    stored = features * per_feature, and only multiples of `block` features can be cut off.

    Args:
        dim: Of the stored tensor.
        per_feature: Stored elements for each feature, for example 1/2 for bytes of two 4-bit codes.
        block: Features that lie in one piece.
    """

    dim: int
    per_feature: Fraction = Fraction(1)
    block: int = 1

    def stored(self, num_features: int) -> int:
        """Return the stored elements of a number of features, which is a multiple of `block`."""
        count = num_features * self.per_feature
        assert count.denominator == 1, "checked when the linear is built"
        return int(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a packed linear [N, K], as its checkpoint stores it.

    Args:
        name: Last part of its name.
        dtype: Of its elements.
        outputs: Its axis along N.
        inputs: Its axis along K; None when it has none, so that every part of K needs all of it.
        legal: Smallest and largest legal integer, for filling a linear without a checkpoint; None when floating.
    """

    name: str
    dtype: torch.dtype
    outputs: Axis
    inputs: Axis | None
    legal: tuple[int, int] | None = None

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Return the shape for a linear of this size; an axis that counts nothing has one element."""
        sizes = [1, 1]
        sizes[self.outputs.dim] = self.outputs.stored(out_features)
        if self.inputs is not None:
            sizes[self.inputs.dim] = self.inputs.stored(in_features)
        return tuple(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of output features: where it starts in the checkpoint's tensor, where here, and its length."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedLinear:
    """The share of one device in linears that were merged along their outputs.

    Args:
        name: Full name of the merged linear, for messages.
        parts: Names in the checkpoint of the linears it is made of.
        out_features: Of each part, on this device.
        replicas: Devices that hold the same share of a part: more than one for key and value when there are more
            devices than key-value heads.
        in_features: On this device.
        all_in_features: On all devices together.
        rank: Of this device.
        world_size: Devices that share the outputs; 1 when every device holds all of them.
        input_rank: Which part of the inputs this device holds.
    """

    name: str
    parts: tuple[str, ...]
    out_features: tuple[int, ...]
    replicas: tuple[int, ...]
    in_features: int
    all_in_features: int
    rank: int
    world_size: int
    input_rank: int

    def whole(self, part: int) -> int:
        """Return the output features of a part on all devices together."""
        return self.out_features[part] * self.world_size // self.replicas[part]

    def pieces(self, part: int | None) -> Iterator[Piece]:
        """Yield what to copy from a tensor that holds one part, or with None all parts one after another."""
        source = 0
        for index in range(len(self.parts)):
            if part in (None, index):
                length = self.out_features[index]
                start = (self.rank // self.replicas[index]) * length if self.world_size > 1 else 0
                yield Piece(source=source + start, target=sum(self.out_features[:index]), length=length)
            if part is None:
                source += self.whole(index)

    def check(self, tensors: Sequence[StoredTensor]) -> None:
        """Refuse a share that cuts through bytes, groups or blocks.

        Raises:
            InputError: With the tensor, the size and the nearest remedy.
        """
        for tensor in tensors:
            for name, size in zip(self.parts, self.out_features, strict=True):
                if size % tensor.outputs.block:
                    raise self._uncuttable(f"{name}.{tensor.name}", "outputs", size, tensor.outputs.block)
            if tensor.inputs is not None and self.in_features % tensor.inputs.block:
                raise self._uncuttable(
                    f"{self.name}.{tensor.name}", "inputs", self.in_features, tensor.inputs.block
                )

    def _uncuttable(self, name: str, axis: str, size: int, block: int) -> InputError:
        return InputError(
            compose(
                subject=f"{axis} of {name} on one device",
                value=size,
                constraint=f"is no multiple of {block}, the features that are stored together",
                place="tensor parallelism",
                remedy="use fewer devices, or quantize with a smaller group size",
            )
        )


def fill_(target: Tensor, loaded: Tensor, tensor: StoredTensor, linear: MergedLinear, part: int | None) -> None:
    """Copy this device's share of a checkpoint's tensor into place.

    Args:
        target: Memory of the merged linear's tensor.
        loaded: The whole tensor of one part, or with `part` None of all parts in one.
        tensor: Which tensor it is.
        linear: The share of this device.
        part: Index of the part.

    Raises:
        CheckpointError: The tensor has another shape or dtype than the linear needs.
    """
    indices = range(len(linear.parts)) if part is None else (part,)
    wanted = tensor.shape(sum(linear.whole(index) for index in indices), linear.all_in_features)
    if tuple(loaded.shape) != wanted or loaded.dtype != tensor.dtype:
        name = linear.name if part is None else linear.parts[part]
        raise CheckpointError(
            compose(
                subject=f"{name}.{tensor.name}",
                value=f"{loaded.dtype} {tuple(loaded.shape)}",
                constraint=f"is not the {tensor.dtype} {wanted} of this model",
                place="checkpoint",
                remedy="serve the folder that was written for this architecture, whole",
            )
        )
    if tensor.inputs is not None:
        length = tensor.inputs.stored(linear.in_features)
        loaded = loaded.narrow(tensor.inputs.dim, linear.input_rank * length, length)
    axis = tensor.outputs
    for piece in linear.pieces(part):
        length = axis.stored(piece.length)
        share = loaded.narrow(axis.dim, axis.stored(piece.source), length)
        target.narrow(axis.dim, axis.stored(piece.target), length).copy_(share)
