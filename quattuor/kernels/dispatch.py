# SPDX-License-Identifier: Apache-2.0
"""Choose the implementation of a linear kernel once per layer, and explain the choice.

The implementations of one operation are an ordered tuple, fastest first, the reference last. Each answers two
questions about a problem with None (yes) or a reason: `supports` (can it compute this at all) and `declines`
(should a later implementation compute this range of token counts instead). The first that says yes to both is
chosen for the range. Nothing is tried and caught.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.kernels.launch import is_recording

__all__ = [
    "MAX_IN_FEATURES",
    "OUTPUT_DTYPES",
    "TOKEN_RANGES",
    "Implementation",
    "LinearProblem",
    "Operand",
    "Row",
    "Schedule",
    "TokenRange",
    "check",
    "check_tensor",
    "choose",
    "describe_device",
    "is_plain_call",
]

#: The largest K whose int32 sum of products -128..127 x -128..127 cannot overflow.
MAX_IN_FEATURES = 2**31 // (128 * 128) - 1

#: Floating-point types that every linear kernel takes and returns.
OUTPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(condition: bool, subject: str, value: object, constraint: str, place: str, remedy: str) -> None:
    """Raise `InputError` with the five parts of a message unless the condition holds."""
    if not condition:
        raise InputError(compose(subject=subject, value=value, constraint=constraint, place=place, remedy=remedy))


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    place: str,
) -> None:
    """Raise `InputError` unless the tensor has this shape, one of the dtypes, and lies on the device."""
    if tensor.dtype in dtypes and tensor.shape == shape and tensor.device == device:
        return  # before any message is made: this runs several times on each call of a layer
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(tensor.dtype in dtypes, f"{name}.dtype", tensor.dtype, f"is not {allowed}", place, "convert it")
    check(
        tuple(tensor.shape) == shape,
        f"{name}.shape",
        tuple(tensor.shape),
        f"is not {shape}",
        place,
        "pass the tensors of the layer that the problem describes",
    )
    check(
        tensor.device == device,
        f"{name}.device",
        tensor.device,
        f"is not {device}, where the other tensors are",
        place,
        "move all tensors to one device",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearProblem:
    """What a linear kernel must compute, as far as it is known when the layer is built.

    Attributes:
        out_features: N, at least 1.
        in_features: K, at least 1; with 8-bit activations at most `MAX_IN_FEATURES`: int32 sums are exact.
        weight_bits: Bits per code, 2 to 8; codes lie in [-2^(b-1), 2^(b-1) - 1].
        group_size: Weights along K that share a scale; None for one scale per output channel.
        integer_group_scale: Promises that every group scale is an integer from 1 to 2^(8-b), or from -1 to
            -(127 // 2^(b-1)), so that code * group_scale is an int8 without rounding. Only with
            `activation_bits=8` and a group size.
        zero_point: Whether codes have a zero point. Only with `activation_bits=16`.
        activation_bits: 8 (int8 codes with one scale per token) or 16 (floating point).
        activation_zero_point: Whether tokens have a zero point. Only with `activation_bits=8`, and then
            `in_features` is at most half of `MAX_IN_FEATURES`: differences of codes need one more bit.
        output_dtype: float16, bfloat16 or float32.
        device_type: "cpu", "cuda", ...
        compute_capability: (major, minor) of a CUDA device, else None.
    """

    out_features: int
    in_features: int
    weight_bits: int = 4
    group_size: int | None = None
    integer_group_scale: bool = False
    zero_point: bool = False
    activation_bits: int = 8
    activation_zero_point: bool = False
    output_dtype: torch.dtype = torch.float16
    device_type: str = "cpu"
    compute_capability: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        place = "LinearProblem"
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            check(value >= 1, name, value, "is not a positive size", place, "pass the weight's shape")
        bits = self.weight_bits
        check(2 <= bits <= 8, "weight_bits", bits, "is outside 2 .. 8", place, "use 2 to 8 bits")
        check(
            self.activation_bits in (8, 16),
            "activation_bits",
            self.activation_bits,
            "is neither 8 nor 16",
            place,
            "use 8 (integer codes) or 16 (floating point)",
        )
        check(
            self.group_size is None or self.group_size >= 1,
            "group_size",
            self.group_size,
            "is not a positive size",
            place,
            "use None for one scale per channel, or 32, 64 or 128",
        )
        longest = MAX_IN_FEATURES // 2 if self.activation_zero_point else MAX_IN_FEATURES
        check(
            self.activation_bits == 16 or self.in_features <= longest,
            "in_features",
            self.in_features,
            f"exceeds {longest}, beyond which an int32 sum can overflow",
            place,
            "split the layer along its input features",
        )
        check(
            not self.activation_zero_point or self.activation_bits == 8,
            "activation_zero_point",
            self.activation_zero_point,
            "is not defined with 16-bit activations",
            place,
            "leave it False, or use activation_bits=8",
        )
        check(
            not self.integer_group_scale or (self.group_size is not None and self.activation_bits == 8),
            "integer_group_scale",
            self.integer_group_scale,
            f"needs a group size and 8-bit activations, not group_size={self.group_size} and "
            f"activation_bits={self.activation_bits}",
            place,
            "leave it False",
        )
        check(
            not self.zero_point or self.activation_bits == 16,
            "zero_point",
            self.zero_point,
            "is not defined with 8-bit activations",
            place,
            "use signed codes, or activation_bits=16",
        )
        check(
            self.output_dtype in OUTPUT_DTYPES,
            "output_dtype",
            self.output_dtype,
            "is not a supported floating-point type",
            place,
            "use float16, bfloat16 or float32",
        )

    @property
    def num_groups(self) -> int:
        """G: scales per output channel, 1 when there is one scale per channel."""
        return 1 if self.group_size is None else -(-self.in_features // self.group_size)

    @property
    def max_code(self) -> int:
        """The largest absolute value that a code can take: 2^(b-1)."""
        return 2 ** (self.weight_bits - 1)


def is_plain_call(x: Tensor) -> bool:
    """Return whether an implementation may be called directly, because nothing watches operators.

    A registered operator shows a call to compilers, tracers, fake tensors and autograd. PyTorch takes about ten
    times as long to call one as a function, and longer than a small layer takes on a GPU.
    """
    if torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and not is_recording()):
        return False
    return type(x) is Tensor and not (x.requires_grad and torch.is_grad_enabled())


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """Return `device_type` and `compute_capability` of a device, as `LinearProblem` takes them."""
    device = torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {"device_type": device.type, "compute_capability": capability}


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The token counts first .. last, both included; last None means without end."""

    first: int
    last: int | None

    def __contains__(self, num_tokens: int) -> bool:
        return num_tokens >= self.first and (self.last is None or num_tokens <= self.last)

    def __str__(self) -> str:
        return f"{self.first}+" if self.last is None else f"{self.first}-{self.last}"


#: One sequence, a few at once, batched decoding, where memory and tensor cores balance, prefill. Consecutive, and
#: complete from 0.
TOKEN_RANGES = (
    TokenRange(0, 1),
    TokenRange(2, 16),
    TokenRange(17, 32),
    TokenRange(33, 64),
    TokenRange(65, 128),
    TokenRange(129, None),
)


class Implementation(ABC):
    """One way to compute a linear operation. Stateless: one instance serves every layer.

    Attributes:
        name: Unique within the operation; what `force` takes.
        layout: Name of the weight layout that `prepare` makes. Implementations of one operation that share a
            layout name share its tensors.
        stored_bits: Memory of one code in the layout, by `weight_bits`; `explain` says where it is more.
    """

    name: str
    layout: str
    stored_bits: Mapping[int, int]

    @abstractmethod
    def supports(self, problem: LinearProblem) -> str | None:
        """Return None when this can compute the problem, else the reason why not."""

    def declines(self, problem: LinearProblem, tokens: TokenRange) -> str | None:
        """Return None when this should compute the range, else why a later implementation is better there."""
        return None

    def remark(self, problem: LinearProblem, tokens: TokenRange) -> str:
        """Return what `explain` should add about how this computes the range, or nothing."""
        return ""

    def memory_bits(self, problem: LinearProblem) -> int:
        """Return the memory of one code in the layout, where it depends on more than the width."""
        return self.stored_bits[problem.weight_bits]

    @abstractmethod
    def prepare(self, problem: LinearProblem, *tensors: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors of the layout, named; the arguments are those of the operation's `prepare`."""

    @abstractmethod
    def linear(
        self,
        problem: LinearProblem,
        inputs: Sequence[Tensor | None],
        operand: Mapping[str, Tensor],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Compute the operation: a tensor [M, N] of `out_dtype`; inputs are checked already."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of `explain()`: whether an implementation computes a range of token counts, and why."""

    tokens: str
    implementation: str
    is_chosen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """The implementation of each range of token counts, with the reasons.

    `chosen` has one implementation for each of `TOKEN_RANGES`; `rows` is the table behind the choice.
    """

    chosen: tuple[Implementation, ...]
    rows: tuple[Row, ...]

    def implementation(self, num_tokens: int) -> Implementation:
        """Return the implementation that computes this number of tokens."""
        for tokens, implementation in zip(TOKEN_RANGES, self.chosen, strict=True):
            if num_tokens in tokens:
                return implementation
        raise InputError(
            compose(
                subject="num_tokens",
                value=num_tokens,
                constraint="is negative",
                place="Schedule.implementation",
                remedy="pass a count of tokens",
            )
        )

    def layouts(self) -> dict[str, Implementation]:
        """Return each weight layout that some range needs, with an implementation that can prepare it."""
        return {implementation.layout: implementation for implementation in self.chosen}


@dataclass(frozen=True, slots=True)
class Operand:
    """A prepared weight: the named tensors of every layout that a plan needs.

    Invariant: each key is "<layout>.<name>" and the implementations of the layout know its names.
    """

    entries: Mapping[str, Tensor]
    _layouts: dict[str, dict[str, Tensor]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for key, tensor in self.entries.items():
            layout, _, name = key.partition(".")
            self._layouts.setdefault(layout, {})[name] = tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for registering as buffers or moving between devices."""
        return dict(self.entries)

    def layout(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one layout, without the layout's name in their keys."""
        return self._layouts.get(name, {})

    @property
    def nbytes(self) -> int:
        """Device memory of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.entries.values())


def storage_remark(implementation: Implementation, problem: LinearProblem) -> str:
    """Return what to add to a reason when codes take more memory than their width."""
    stored = implementation.memory_bits(problem)
    if stored == problem.weight_bits:
        return ""
    return f"; keeps each {problem.weight_bits}-bit code in {stored} bits of memory"


def choose(
    operation: str,
    implementations: Sequence[Implementation],
    problem: LinearProblem,
    force: str | None = None,
) -> Schedule:
    """Choose an implementation for each range of token counts.

    Args:
        operation: Name for messages ("w4a8_linear").
        implementations: Fastest first; the last supports every legal problem.
        problem: What the layer computes.
        force: Name of the one implementation to use for every range, or None to choose.

    Raises:
        InputError: `force` names no implementation.
        UnsupportedError: The forced implementation refuses the problem; the message holds its reason.
    """
    names = [implementation.name for implementation in implementations]
    check(
        force is None or force in names,
        "force",
        force,
        "names no implementation",
        operation,
        f"use one of {', '.join(names)}",
    )
    refusals = {implementation.name: implementation.supports(problem) for implementation in implementations}
    if force is not None and refusals[force] is not None:
        able = [name for name in names if refusals[name] is None]
        raise UnsupportedError(
            compose(
                subject="force",
                value=force,
                constraint=f"cannot compute this layer: {refusals[force]}",
                place=operation,
                remedy=f"use one of {', '.join(able)}, or leave force=None",
            )
        )
    chosen: list[Implementation] = []
    rows: list[Row] = []
    for tokens in TOKEN_RANGES:
        winner: Implementation | None = None
        for implementation in implementations:
            reason = refusals[implementation.name]
            if reason is None and force is not None and implementation.name != force:
                reason = f"{force} is forced"
            if reason is None and force is None:
                reason = implementation.declines(problem, tokens)
            if reason is None and winner is not None:
                reason = f"ranked after {winner.name}"
            if reason is None:
                winner = implementation
            if reason is None:
                reason = "forced" if force else "first that supports the layer"
                reason += storage_remark(implementation, problem)
                remark = implementation.remark(problem, tokens)
                reason += f"; {remark}" if remark else ""
            rows.append(Row(str(tokens), implementation.name, implementation is winner, reason))
        assert winner is not None, f"{operation}: the last implementation must support every legal problem"
        chosen.append(winner)
    return Schedule(tuple(chosen), tuple(rows))
