# SPDX-License-Identifier: Apache-2.0
"""The unpacking assembly of the GPU kernels, emulated: every code against the definition.

The interpreter of Triton does not know inline assembly, so its text is run here by a small emulator of the PTX
instructions that it uses, on 32-bit numbers in NumPy arrays.
"""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from quattuor.kernels.w4a8_linear import narrow, unpacking
from quattuor.kernels.w4a8_linear.planes import pack_planes
from quattuor.kernels.w4a16_linear import planes
from quattuor.kernels.w4a16_linear import unpacking as fields
from quattuor.kernels.w4a16_linear.digits import unpacking as digits


def halves(value):
    """View 32-bit registers as pairs of float16, in float64 so that one rounding follows."""
    return value.view(np.float16).astype(np.float64).reshape(-1, 2)


def from_halves(value):
    """Round pairs to float16 once and put them back into registers."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(value.astype(np.float16)).view(np.uint32).reshape(-1)


def bfloats(value):
    """View 32-bit registers as pairs of bfloat16, in float64."""
    return np.stack(((value << 16).view(np.float32), (value & 0xFFFF0000).view(np.float32)), axis=1).astype(
        np.float64
    )


def from_bfloats(value):
    """Round pairs to bfloat16 and put them back into registers."""
    rounded = torch.from_numpy(value).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return np.ascontiguousarray(rounded).view(np.uint32).reshape(-1)


def lop3(a, b, c, table):
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    result = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            terms = (x if index >> shift & 1 else ~x for x, shift in ((a, 2), (b, 1), (c, 0)))
            first, second, third = terms
            result |= first & second & third
    return result


def permute(a, b, selector):
    """Four bytes of the eight of b:a, chosen by the nibbles of the selector."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for position in range(4):
        chosen = np.uint64((int(selector[0]) >> 4 * position & 7) * 8)
        result |= (both >> chosen & np.uint64(255)).astype(np.uint32) << np.uint32(8 * position)
    return result


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": permute,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "sub.rn.f16x2": lambda a, b: from_halves(halves(a) - halves(b)),
    "fma.rn.f16x2": lambda a, b, c: from_halves(halves(a) * halves(b) + halves(c)),
    "max.f16x2": lambda a, b: from_halves(np.maximum(halves(a), halves(b))),
    "min.f16x2": lambda a, b: from_halves(np.minimum(halves(a), halves(b))),
    "fma.rn.bf16x2": lambda a, b, c: from_bfloats(bfloats(a) * bfloats(b) + bfloats(c)),
}


def run(text, registers):
    """Execute the assembly on named registers, arrays of uint32, and return them all."""
    registers = dict(registers)
    size = len(next(iter(registers.values())))

    def operand(name):
        if name in registers:
            return registers[name]
        return np.full(size, int(name, 0), dtype=np.uint32)

    for statement in str(getattr(text, "value", text)).strip("{} \n").split(";"):
        words = re.split(r"[\s,]+", statement.strip())
        if words == [""] or words[0] == ".reg":
            continue
        opcode, target, *sources = words
        registers[target] = INSTRUCTIONS[opcode](*(operand(name) for name in sources))
    return registers


def every_byte():
    """All 256 bytes, four to a register, and their signed low and high nibbles."""
    packed = np.arange(256, dtype=np.uint8)
    low = ((packed << 4).astype(np.uint8).view(np.int8) >> 4).astype(np.int64)
    high = (packed.view(np.int8) >> 4).astype(np.int64)
    return packed.view(np.uint32), low, high


PLANES = pytest.mark.parametrize("plane", ["LOW", "HIGH"])


def codes_of(plane, low, high):
    """Codes of the plane that the assembly unpacks."""
    return low if plane == "LOW" else high


@PLANES
def test_channel_operands_are_16_times_the_code(plane):
    packed, low, high = every_byte()
    found = run(getattr(unpacking, f"{plane}_CHANNEL"), {"$1": packed})["$0"].view(np.int8)
    assert (found == 16 * codes_of(plane, low, high)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_operands_of_every_width_are_codes_at_the_top_of_their_byte(bits):
    block = narrow.BLOCKS[bits]
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (128, block.elements), dtype=torch.int8)
    packed = pack_planes(codes) if bits == 4 else narrow.pack_narrow(codes, bits)
    chunks = [tile.numpy().view(np.uint32).reshape(-1) for tile in packed[0]]
    assert len(chunks) == block.chunks
    for plane in range(block.planes):
        if bits == 3 and plane >= 6:
            text = unpacking.joined_assembly(4 if plane == 6 else 5)
            registers = {"$1": chunks[0 if plane == 6 else 2], "$2": chunks[1]}
        elif bits == 3:
            text, registers = unpacking.plane_assembly(3, plane % 2 * 3), {"$1": chunks[plane // 2]}
        else:
            text, registers = unpacking.plane_assembly(bits, 8 - bits * (plane + 1)), {"$1": chunks[0]}
        found = run(text, registers)["$0"].view(np.int8).reshape(128, 128)
        expected = codes[:, 128 * plane : 128 * (plane + 1)].numpy() * 2 ** (8 - bits)
        assert (found == expected).all(), plane


@PLANES
def test_integer_operands_for_every_scale(plane):
    packed, low, high = every_byte()
    for r in (*range(-15, 0), *range(1, 17)):
        scale = np.full(64, r, dtype=np.int32).view(np.uint32)
        addend = np.uint32(0x80808080) - scale * np.uint32(0x08080808)
        found = run(getattr(unpacking, f"{plane}_INTEGER"), {"$1": packed, "$2": scale, "$6": addend})["$0"]
        assert (found.view(np.int8) == r * codes_of(plane, low, high)).all()


@PLANES
def test_half_operands_for_every_kind_of_scale(plane):
    packed, low, high = every_byte()
    codes = torch.from_numpy(codes_of(plane, low, high))
    every_half = np.arange(0, 65536, 257, dtype=np.uint16)
    rounding = np.arange(-260, 261).astype(np.float16) / 16  # products that end in a half, and at the clamps
    scales = np.concatenate((every_half.view(np.float16), rounding))
    for scale in scales[np.isfinite(scales)]:
        both = np.full(64, scale.view(np.uint16).astype(np.uint32) * np.uint32(0x10001), dtype=np.uint32)
        found = run(getattr(unpacking, f"{plane}_HALF"), {"$1": packed, "$2": both})["$0"].view(np.int8)
        expected = torch.round(codes.float() * float(scale)).clamp(-128, 127).to(torch.int8)
        assert (found == expected.numpy()).all(), scale


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_floating_point_codes_less_their_zero_point_are_exact(bits, is_half):
    layout = planes.Layout(bits, 16)
    codes = torch.randint(2**bits, (128, layout.block_k))
    words = planes.pack(codes, layout).numpy().reshape(layout.words, -1).view(np.uint32)
    view = halves if is_half else bfloats
    for plane in range(layout.planes):
        expected = codes[:, plane * 16 : plane * 16 + 16].reshape(-1, 2).double().numpy()
        registers = {f"${index + 1}": word for index, word in enumerate(words)}
        if fields.arity(bits, plane) == 1:
            registers = {"$1": words[fields.word_of(bits, plane)]}
        found = run(fields.assembly(bits, plane, is_half, False), registers)["$0"]
        assert (view(found) == expected - 2 ** (bits - 1)).all(), plane
        for zero in (0, 1, 2**bits - 1):
            # what the kernel passes: the zero point where the field's own last bit is, and the magic number
            place = 2 ** -fields.position(bits, plane, is_half)
            rest = -(1024 * place + zero) if is_half else -(zero + (128 if bits < 8 else 0))
            dtype = torch.float16 if is_half else torch.bfloat16
            both = torch.full((2 * len(words[0]),), rest, dtype=torch.float64).to(dtype)
            addend = both.view(torch.int16).numpy().view(np.uint32)
            text = fields.assembly(bits, plane, is_half, True)
            found = run(text, registers | {f"${fields.arity(bits, plane) + 1}": addend})["$0"]
            assert (view(found) == expected - zero).all(), (plane, zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_signed_codes_at_the_top(bits):
    layout = planes.Layout(bits, 32)
    codes = torch.randint(2**bits, (128, layout.block_k))
    pairs = (
        planes.pack(codes, layout).numpy().reshape(layout.words, -1).view(np.uint32).reshape(layout.words, -1, 2)
    )
    for plane in range(layout.planes):
        index = fields.word_of(bits, plane)
        registers = [pairs[word][:, half] for word in ([index] if index < 3 else range(3)) for half in range(2)]
        assert digits.byte_constraints(bits, plane).count("r") == 1 + len(registers)
        text = digits.byte_assembly(bits, plane)
        found = run(text, {f"${i + 1}": register for i, register in enumerate(registers)})["$0"]
        expected = (codes[:, plane * 32 : plane * 32 + 32].numpy() - 2 ** (bits - 1)) * 2 ** (8 - bits)
        assert (found.view(np.int8).reshape(128, 32) == expected).all(), plane
