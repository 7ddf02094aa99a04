# SPDX-License-Identifier: Apache-2.0
"""Uniform weights with floating-point activations, and the kernels of others, prepared for timing."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.timing import Batch, Contender, num_copies
from quattuor.kernels import w4a16_linear
from quattuor.kernels.dispatch import LinearProblem, Operand, describe_device
from quattuor.kernels.w4a16_linear.reference import decoded_weight

__all__ = [
    "FORMATS",
    "Packed",
    "Uniform",
    "cold_layers",
    "cublas_fp16",
    "gate_of",
    "humming",
    "layers_of",
    "uniform",
]

#: Largest relative error against float64 that a float16 result may have: rounding alone gives 2e-4.
LARGEST_ERROR = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A contender, the format that it multiplies and the bytes of one weight with its scales."""

    contender: Contender
    format: str
    bits: int
    group_size: int | None
    weight_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """A uniform format: `zero_point` adds an integer zero point per group."""

    bits: int
    group_size: int | None = None
    zero_point: bool = False

    @property
    def name(self) -> str:
        """As rows say it."""
        return "integer_zero_point" if self.zero_point else "integer"

    def weight_bytes(self, out_features: int, in_features: int) -> float:
        """Codes, float16 scales and 8-bit zero points of a layer."""
        groups = out_features * (in_features // self.group_size if self.group_size else 1)
        return out_features * in_features * self.bits / 8 + groups * (3 if self.zero_point else 2)


#: What the record compares.
FORMATS = (
    *(Uniform(bits=bits, group_size=128) for bits in (4, 3, 2)),
    Uniform(bits=4, group_size=128, zero_point=True),
    *(Uniform(bits=bits) for bits in (4, 3, 2, 8)),
    *(Uniform(bits=bits, group_size=64) for bits in (3, 2)),
)


def gate_of(run: Callable[[Batch, int], Tensor], weight_NK: Tensor) -> Callable[[Batch], str | None]:
    """Return a check: close to the product with the decoded weight, and the same bits in a second run."""

    def gate(batch: Batch) -> str | None:
        rows = torch.arange(0, batch.x.shape[0], max(1, batch.x.shape[0] // 8), device="cuda")
        expected = batch.x[rows].float() @ weight_NK.float().T
        found = run(batch, 0)
        error = float((found[rows].float() - expected).norm() / expected.norm())
        if not error < LARGEST_ERROR:
            return f"relative error {error:.4f}"
        return None if torch.equal(found, run(batch, 0)) else "a second run gives other bits"

    return gate


def problem_of(shape: tuple[int, int], kind: Uniform) -> LinearProblem:
    """Describe a layer of a format on this device."""
    return LinearProblem(
        out_features=shape[0],
        in_features=shape[1],
        weight_bits=kind.bits,
        group_size=kind.group_size,
        zero_point=kind.zero_point,
        activation_bits=16,
        **describe_device("cuda"),
    )


def cold_layers(first: Operand, num_layers: int) -> list[Operand]:
    """Return a packed layer and others of random codes after it; scales and counters are as cold as the weight."""
    layers = [first]
    for _ in range(num_layers - 1):
        fresh = {name: tensor.clone() for name, tensor in first.tensors().items()}
        packed = next(name for name in fresh if name.endswith(".packed"))
        fresh[packed] = torch.randint_like(fresh[packed], -(2**15), 2**15)
        layers.append(Operand(fresh))
    return layers


def layers_of(shape: tuple[int, int], kind: Uniform) -> tuple[Tensor, list[Operand]]:
    """Return the weight of a random layer as float32, and enough packed layers, it first, to stay cold."""
    problem = problem_of(shape, kind)
    plan = w4a16_linear.plan(problem, force="triton")
    half = 2 ** (kind.bits - 1)
    codes = torch.randint(2**kind.bits, shape, device="cuda")
    codes = codes.to(torch.uint8) if kind.zero_point else (codes - half).to(torch.int8)
    groups = (shape[0], problem.num_groups)
    scale = (torch.rand(groups, device="cuda") + 0.5).half()
    zero = torch.randint(2**kind.bits, groups, device="cuda").float() if kind.zero_point else None
    decoded = decoded_weight(problem, codes, scale, zero)
    first = plan.prepare(codes, scale, zero)
    return decoded, cold_layers(first, num_copies(first.nbytes))


def uniform(shape: tuple[int, int], kinds: Sequence[Uniform] = FORMATS) -> Iterator[Packed]:
    """Prepare Quattuor's layers of each format."""
    for kind in kinds:
        plan = w4a16_linear.plan(problem_of(shape, kind))
        decoded, layers = layers_of(shape, kind)

        def run(batch: Batch, i: int, plan=plan, layers=layers) -> Tensor:
            return plan.linear(batch.x, layers[i % len(layers)])

        yield Packed(
            contender=Contender(
                name="quattuor",
                granularity="channel" if kind.group_size is None else f"group{kind.group_size}",
                includes_activation_quantization=False,
                copies=len(layers),
                gate=gate_of(run, decoded),
                describe=plan.implementation,
                run=run,
            ),
            format=kind.name,
            bits=kind.bits,
            group_size=kind.group_size,
            weight_bytes=kind.weight_bytes(*shape),
        )


def cublas_fp16(shape: tuple[int, int]) -> Packed:
    """The dense product of PyTorch."""
    total = num_copies(2 * shape[0] * shape[1])
    dense = [torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(total)]
    contender = Contender(
        name="cublas_fp16",
        granularity="none",
        includes_activation_quantization=False,
        copies=total,
        run=lambda batch, i: batch.x @ dense[i % total].T,
    )
    size = 2.0 * shape[0] * shape[1]
    return Packed(contender=contender, format="float16", bits=16, group_size=None, weight_bytes=size)


def humming(shape: tuple[int, int], token_counts: tuple[int, ...]) -> Iterator[Packed]:
    """W4A16 of the package humming-kernels, where it is installed."""
    if importlib.util.find_spec("humming") is None:
        return
    weight = torch.randn(shape, dtype=torch.float16, device="cuda")
    configs = [config for config in peers.HUMMING_CONFIGS if config[3] is None]
    for contender in peers.humming(weight, token_counts, configs):
        kind = Uniform(bits=4, group_size=128)
        yield Packed(
            contender=contender,
            format="integer",
            bits=4,
            group_size=128,
            weight_bytes=kind.weight_bytes(*shape),
        )
