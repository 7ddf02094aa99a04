# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels for a GPU that is not there, and read their machine code."""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
CUOBJDUMP = NVDISASM.with_name("cuobjdump")


@dataclass(frozen=True)
class Binary:
    """Machine code of one kernel and what the assembler says of its resources."""

    sass: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int

    def count(self, pattern: str) -> int:
        """Return the instructions whose opcode matches a regular expression from its start."""
        return sum(n for opcode, n in self.opcodes().items() if re.match(pattern, opcode))

    def opcodes(self) -> collections.Counter:
        """Return how often each opcode occurs."""
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", self.sass)
        return collections.Counter(found)


def read_binary(compiled) -> Binary:
    """Disassemble a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([NVDISASM, "-c", path], check=True, capture_output=True, text=True).stdout
        usage = subprocess.run([CUOBJDUMP, "-res-usage", path], check=True, capture_output=True, text=True)
    text = usage.stdout + usage.stderr
    figure = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Binary(sass, figure["REG"], figure["STACK"], figure["LOCAL"], compiled.metadata.shared)


def compile_kernel(kernel, signature, constexprs, *, capability, divisible=(), **options) -> Binary:
    """Compile for a compute capability such as 80 or 90.

    Args:
        kernel: The decorated function.
        signature: Type of each argument that is no constant, such as "*i8" or "i32".
        constexprs: Value of each constant.
        capability: Ten times major plus minor.
        divisible: Arguments that are divisible by 16 (or aligned to 16 bytes).
        options: num_warps, num_stages and others that a launch takes.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(
        kernel,
        types,
        {(index[name],): value for name, value in constexprs.items()},
        {(index[name],): [["tt.divisibility", 16]] for name in divisible},
    )
    return read_binary(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def product_loops(binary, opcode):
    """Return the machine code of the product loop of each consumer: from its barrier wait to its release.

    Args:
        binary: A kernel with two consumers.
        opcode: Of its warpgroup products.
    """
    lines = binary.sass.splitlines()
    products = [i for i, line in enumerate(lines) if opcode in line]
    half = len(products) // 2
    loops = []
    for first, last in ((products[0], products[half - 1]), (products[half], products[-1])):
        start = max(i for i in range(first) if "SYNCS.PHASECHK" in lines[i])
        stop = min(i for i in range(last, len(lines)) if "SYNCS.ARRIVE" in lines[i])
        loops.append("\n".join(lines[start:stop]))
    return loops
