# SPDX-License-Identifier: Apache-2.0
"""Codebooks with single entries and binary planes, prepared for timing.

    python -m benchmarks.kernels.weight_only_tables

compiles their kernels in parallel, so that a run within a time limit finds them in the cache.
"""

import dataclasses
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from benchmarks.kernels.timing import Batch, Contender, num_copies
from benchmarks.kernels.weight_only_uniform import Packed, cold_layers, gate_of
from quattuor.kernels import lut_linear
from quattuor.kernels.dispatch import Operand, describe_device
from quattuor.kernels.lut_linear import LutProblem
from quattuor.kernels.lut_linear.reference import decoded_weight

__all__ = ["FORMATS", "SPARSE_SHARE", "Table", "compile_all", "layers_of", "problem_of", "tables"]

#: Weights that SqueezeLLM keeps as single entries.
SPARSE_SHARE = 0.0045


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A codebook or planes; `sparse` adds single entries, `offset` a constant per group of planes."""

    kind: Literal["codebook", "planes"]
    bits: int
    group_size: int | None = None
    sparse: bool = False
    offset: bool = False

    @property
    def name(self) -> str:
        """As rows say it."""
        return self.kind + "_sparse" * self.sparse + "_offset" * self.offset

    def weight_bytes(self, out_features: int, in_features: int) -> float:
        """Codes, float16 numbers of the tables, and single entries with 16-bit columns."""
        groups = out_features * (in_features // self.group_size if self.group_size else 1)
        numbers = (2**self.bits if self.kind == "codebook" else self.bits) + self.offset
        entries = out_features * (4 + 4 * SPARSE_SHARE * in_features) if self.sparse else 0
        return out_features * in_features * self.bits / 8 + 2 * groups * numbers + entries


#: What the record compares.
FORMATS = (
    Table(kind="codebook", bits=4, sparse=True),
    Table(kind="codebook", bits=3, sparse=True),
    Table(kind="planes", bits=2),
    Table(kind="planes", bits=2, group_size=128, offset=True),
    Table(kind="planes", bits=3),
    Table(kind="planes", bits=4),
)


def problem_of(shape: tuple[int, int], kind: Table) -> LutProblem:
    """Describe a layer of a format on this device."""
    return LutProblem(
        out_features=shape[0],
        in_features=shape[1],
        weight_bits=kind.bits,
        kind=kind.kind,
        group_size=kind.group_size,
        offset=kind.offset,
        sparse=kind.sparse,
        **describe_device("cuda"),
    )


def single_entries(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return random entries in compressed rows, at distinct columns of each row."""
    mask = torch.rand(shape, device="cuda") < SPARSE_SHARE
    row_offsets = torch.zeros(shape[0] + 1, dtype=torch.int32, device="cuda")
    row_offsets[1:] = mask.sum(dim=1).cumsum(0)
    columns = mask.nonzero()[:, 1].to(torch.int16)
    return row_offsets, columns, torch.randn(columns.shape, device="cuda").half()


def layers_of(
    shape: tuple[int, int], kind: Table, num_layers: int | None = None, force: str | None = None
) -> tuple[Tensor, list[Operand]]:
    """Return the weight of a random layer as float32, and enough packed layers, it first, to stay cold."""
    problem = problem_of(shape, kind)
    plan = lut_linear.plan(problem, force)
    codes = torch.randint(2**kind.bits, shape, device="cuda", dtype=torch.uint8)
    table = torch.randn(shape[0], problem.num_groups, problem.table_size, device="cuda").half()
    offset = torch.randn(shape[0], problem.num_groups, device="cuda").half() if kind.offset else None
    decoded = decoded_weight(problem, codes, table, offset)
    entries = None
    if kind.sparse:
        entries = single_entries(shape)
        row_offsets, columns, values = entries
        rows = torch.arange(shape[0], device="cuda").repeat_interleave(row_offsets.long().diff())
        decoded[rows, columns.long()] += values.float()
    first = plan.prepare(codes, table, offset, entries)
    return decoded, cold_layers(first, num_layers or num_copies(first.nbytes))


def tables(shape: tuple[int, int], kinds: Sequence[Table] = FORMATS, force: str | None = None) -> Iterator[Packed]:
    """Prepare Quattuor's layers of each format, for what is chosen or for one implementation."""
    for kind in kinds:
        plan = lut_linear.plan(problem_of(shape, kind), force)
        decoded, layers = layers_of(shape, kind, force=force)

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


def compile_one(job: tuple[Table, int, str | None]) -> None:
    """Run one format once at a token count, on a small layer."""
    kind, num_tokens, force = job
    shape = (1024, 4096)
    plan = lut_linear.plan(problem_of(shape, kind), force)
    _, layers = layers_of(shape, kind, num_layers=1, force=force)
    plan.linear(torch.randn(num_tokens, shape[1], device="cuda").half(), layers[0])
    torch.cuda.synchronize()


def compile_all(num_workers: int = 14, force: str | None = None) -> None:
    """Compile every kernel of the record; they serve every layer whose sizes are multiples of 1024."""
    jobs = [(kind, num_tokens, force) for kind in FORMATS for num_tokens in (1, 4, 16, 64, 1024)]
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        pool.map(compile_one, jobs, chunksize=1)


if __name__ == "__main__":
    compile_all()
