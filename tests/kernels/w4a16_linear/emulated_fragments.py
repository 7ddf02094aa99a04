# SPDX-License-Identifier: Apache-2.0
"""Run the Gluon kernel for few tokens in NumPy: Triton interprets no Gluon, and no inline assembly.

A tensor of the kernel has one element per thread, so that an array is a register of all threads; memory is one
array of bytes. The functions that hold assembly are replaced by what the instructions do, a product of a warp by
its definition in the PTX manual. The rest is the kernel's own code.
"""

import builtins
import types

import numpy as np
import torch
import triton

from quattuor.kernels.dispatch import LinearProblem
from quattuor.kernels.w4a16_linear.decode_kernel import constants
from quattuor.kernels.w4a16_linear.fragments import block, finish, kernel, loads
from quattuor.kernels.w4a16_linear.fragments.text import BFLOAT, EXACT, RAW
from quattuor.kernels.w4a16_linear.planes import FewTile, layout_of, prepare_tensors

SUBNORMAL = 2.0**-24
DTYPES = {
    torch.int16: "int16",
    torch.int32: "int32",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.uint8: "uint8",
    torch.bfloat16: "uint16",
}


class Lanes(np.ndarray):
    """A register of every thread."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else np.asarray(self).astype(dtype).view(Lanes)


def lanes(value, dtype=None):
    return np.atleast_1d(np.asarray(value, dtype=dtype)).view(Lanes)


class Memory:
    """Bytes that tensors are copied to; address 0 is where masked lanes look."""

    def __init__(self):
        self.bytes = np.zeros(1 << 23, np.uint8)
        self.end = 256

    def pointer(self, tensor):
        content = tensor.contiguous().view(torch.uint8).numpy().ravel()
        address = self.end
        self.bytes[address : address + content.size] = content
        self.end += -(-content.size // 256) * 256
        assert self.end <= self.bytes.size
        return Pointer(address, DTYPES[tensor.dtype])

    def read(self, address, dtype):
        size = np.dtype(dtype).itemsize
        where = np.asarray(address)[:, None] + np.arange(size)
        return self.bytes[where].view(dtype)[:, 0].view(Lanes)

    def load(self, pointer, mask=True, other=0, cache_modifier=""):
        address = pointer.addresses()
        mask = np.broadcast_to(mask, address.shape)
        return np.where(mask, self.read(np.where(mask, address, 0), pointer.name), 0).view(Lanes)

    def store(self, pointer, value, mask=True):
        address = pointer.addresses()
        value = np.broadcast_to(np.asarray(value, dtype=pointer.name), address.shape)
        for place, item, wanted in zip(address, value, np.broadcast_to(mask, address.shape), strict=True):
            if wanted:
                content = np.frombuffer(item.tobytes(), np.uint8)
                self.bytes[place : place + content.size] = content

    def atomic_add(self, pointer, value, sem=""):
        before = self.read(pointer.addresses(), pointer.name)
        self.store(pointer, np.asarray(before) + value)
        return before


class Pointer:
    """Addresses of elements."""

    def __init__(self, base, name, offset=0):
        self.base, self.name, self.offset = base, name, offset
        size = np.dtype(name).itemsize
        element = type("Element", (str,), {"primitive_bitwidth": 8 * size})(name)
        self.dtype = types.SimpleNamespace(element_ty=element)

    def to(self, dtype):
        return lanes(self.base, dtype)

    def __add__(self, offset):
        return Pointer(self.base, self.name, self.offset + np.asarray(offset))

    def addresses(self):
        return self.base + np.atleast_1d(self.offset).astype(np.int64) * np.dtype(self.name).itemsize


def language(memory, program):
    """Return what the kernel calls `gl`; `program` holds the index of the program and the number of them."""
    return types.SimpleNamespace(
        int16="int16",
        int32="int32",
        int64="int64",
        float16="float16",
        float32="float32",
        static_range=builtins.range,
        program_id=lambda axis: lanes(program[0], np.int32),
        num_programs=lambda axis: lanes(program[1], np.int32),
        cdiv=lambda a, b: -(-a // b),
        BlockedLayout=lambda *sizes: None,
        arange=lambda start, end, layout: np.arange(start, end, dtype=np.int32).view(Lanes),
        minimum=lambda a, b: np.minimum(a, b).view(Lanes),
        where=lambda condition, a, b: lanes(np.where(condition, a, b), np.int32),
        zeros=lambda shape, dtype, layout: np.zeros(shape, dtype).view(Lanes),
        convert_layout=lambda value, layout: value,
        reshape=lambda value, shape: value.reshape(shape),
        sum=lambda value, axis: np.asarray(value).sum(axis, dtype=np.float32).view(Lanes),
        thread_barrier=lambda: None,
        load=memory.load,
        store=memory.store,
        atomic_add=memory.atomic_add,
    )


def span(start, end):
    """Count as the kernel does, in registers."""
    return (lanes(i, np.int32) for i in builtins.range(int(start[0]), int(end[0])))


def halves(register, kind):
    """Return both 16-bit floats [32 W, 2] of each thread."""
    pairs = np.ascontiguousarray(register, dtype=np.int32).view(np.uint16).reshape(-1, 2)
    if kind == BFLOAT:
        return (pairs.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return pairs.view(np.float16).astype(np.float64)


def product(a, b, acc, kind):
    """mma.m16n8k16 of every warp: a [4 registers of pairs], b [2] and the sums [4]."""
    warps = len(acc[0]) // 32
    left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for i, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        left[:, row : row + 8, column : column + 8] = a[i].reshape(warps, 8, 8)
    for i in builtins.range(2):
        right[:, 8 * i : 8 * i + 8] = halves(b[i], kind).reshape(warps, 8, 8).transpose(0, 2, 1)
    out = left @ right
    return tuple(
        (np.asarray(acc[i]) + out[:, i // 2 * 8 : i // 2 * 8 + 8, i % 2 :: 2].reshape(-1))
        .astype(np.float32)
        .view(Lanes)
        for i in builtins.range(4)
    )


def multiply(words, x, acc, spans, bits, position, kind):
    """`product_text`: the operands are the codes in the unit of the kind."""
    mask = ((1 << bits) - 1) << position
    pairs = [np.ascontiguousarray(word, dtype=np.int32).view(np.uint16).reshape(-1, 2) & mask for word in words]
    unit = SUBNORMAL if kind == RAW else 2.0**-position
    a = [pair * unit for pair in pairs]
    out = ()
    for t in builtins.range(spans):
        part = product((a[0], a[4], a[1], a[5]), x[4 * t : 4 * t + 2], acc[4 * t : 4 * t + 4], kind)
        out += product((a[2], a[6], a[3], a[7]), x[4 * t + 2 : 4 * t + 4], part, kind)
    return out


def add_tokens(x, acc, kind):
    """`ones_text`."""
    ones = [np.full((len(acc[0]), 2), SUBNORMAL if kind == RAW else 1.0)] * 4
    return product(ones, x[2:], product(ones, x[:2], acc, kind), kind)


def emulate(problem: LinearProblem, weight, x, bias, tile: FewTile, kind=None) -> torch.Tensor:
    """Return the outputs float32 [M, N], programs in reverse order; `weight` is what `prepare` takes."""
    memory, program = Memory(), [0, 1]
    operand = prepare_tensors(problem, *weight)
    layout = layout_of(problem)
    zero_point = operand.get("zero_point", operand.get("offset"))
    num_blocks = operand["packed"].shape[1]
    num_steps = -(-num_blocks // tile.num_warps)
    num_tiles = -(-problem.out_features // (16 * tile.fragments))
    spans = -(-x.shape[0] // 8)
    program[1] = min(tile.programs, num_tiles * num_steps)
    out = memory.pointer(torch.zeros(x.shape[0], problem.out_features))
    arrivals = memory.pointer(operand["arrivals"])
    scale = memory.pointer(operand["scale"])
    fields = constants(layout, problem.group_size, zero_point, False)
    fields = {name: getattr(value, "value", value) for name, value in fields.items() if name != "ASM"}
    if kind is None:
        kind = BFLOAT if x.dtype == torch.bfloat16 else EXACT
    namespace = {}
    for module in (loads, block, finish, kernel):
        namespace |= vars(module)
    for name, value in namespace.items():
        if isinstance(value, triton.JITFunction):
            namespace[name] = types.FunctionType(value.fn.__code__, namespace, name)
        elif isinstance(value, triton.language.constexpr):
            namespace[name] = value.value
    namespace |= {
        "gl": language(memory, program),
        "range": span,
        "load_vector": lambda address, count, streams: tuple(
            memory.read(address + 4 * i, np.int32) for i in builtins.range(count)
        ),
        "load_if": lambda address, condition: tuple(
            np.where(condition != 0, memory.read(np.where(condition != 0, address + 4 * i, 0), np.int32), 0)
            for i in builtins.range(4)
        ),
        "load_short": lambda address: memory.read(address, np.uint16).to("int32"),
        "hold_loads": lambda value: None,
        "multiply": multiply,
        "add_tokens": add_tokens,
    }
    tensors = {
        "x": memory.pointer(x),
        "packed": memory.pointer(operand["packed"]),
        "scale": scale,
        "zero_point": scale if zero_point is None else memory.pointer(zero_point),
        "bias": memory.pointer(bias),
        "out": out,
        "partial": memory.pointer(torch.zeros(program[1] * 2 * 32 * 4 * tile.fragments * spans)),
        "arrivals": arrivals,
    }
    for index in reversed(builtins.range(program[1])):
        program[0] = index
        namespace["fragments_kernel"](
            **tensors,
            M=x.shape[0],
            N=problem.out_features,
            K=problem.in_features,
            stride_xm=lanes(x.stride(0), np.int32),
            N_PADDED=operand["packed"].shape[0] * 128,
            NUM_BLOCKS=num_blocks,
            NUM_STEPS=num_steps,
            R=tile.fragments,
            T=spans,
            W=tile.num_warps,
            HAS_BIAS=True,
            IS_SPLIT=num_tiles % program[1] != 0,
            EVEN_K=problem.in_features % layout.block_k == 0,
            AHEAD=tile.ahead,
            KIND=kind,
            **fields,
        )
    assert not memory.bytes[arrivals.base : arrivals.base + operand["arrivals"].nbytes].any()
    found = memory.bytes[out.base : out.base + 4 * x.shape[0] * problem.out_features].copy()
    return torch.from_numpy(found.view(np.float32).reshape(x.shape[0], -1))
