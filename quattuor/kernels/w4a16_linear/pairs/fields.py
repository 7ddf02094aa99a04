# SPDX-License-Identifier: Apache-2.0
"""Fields of words as the tensor cores multiply them: masked, not moved; the token makes up for their place.

Two pieces of a block, a pair, are summed at once: one in four columns of a product, one in the other four. A
register of the weight holds two words. With 2, 4 and 8 bits their low bytes belong to one piece of a pair, their
high bytes to the other, and one mask makes them an operand; with 3 bits low and high bytes are put apart first. A
masked byte is 2^s times the code of a plane, or a part of it, and the token meets it times 2^e, such that all
products of a format have one factor, 2^`FACTOR_BITS`, see `lanes/fields.py`.

A slot is a part of each piece of a pair, multiplied together; with 3 bits, one may be missing.
"""

import triton

__all__ = [
    "both_mask",
    "byte_mask",
    "byte_of",
    "expands",
    "first_slot",
    "half_of",
    "has_part",
    "pair_of",
    "slot_code",
    "slots",
    "word_of",
]


@triton.constexpr_function
def expands(bits):
    """Return whether lanes put the bytes of the token in their places, where memory would hold half zeros.

    Fewer bits are more products for each block, and the token then takes more of the cache than it spares.
    """
    return bits < 4


@triton.constexpr_function
def parts_of(bits, planes, word, is_high):
    """Return what a byte of a word holds: plane, mask and exponent of each part."""
    if bits != 3:
        own = [plane for plane in range(planes) if plane * bits // 8 == is_high]
        return [(p, ((1 << bits) - 1) << (p * bits % 8), 8 - bits - p * bits % 8) for p in own]
    first = 5 * word
    if is_high:
        return [(first + 2, 0x01, 9), (first + 3, 0x0E, 6), (first + 4, 0x70, 3), (15, 0x80, word)]
    return [(first, 0x07, 7), (first + 1, 0x38, 4), (first + 2, 0xC0, 1)]


@triton.constexpr_function
def pair_of(bits, pieces, piece):
    """Return the pair of a piece: with 3 bits its neighbour's, else that of the other byte of a word."""
    return piece // 2 if bits == 3 else piece % (pieces // 2)


@triton.constexpr_function
def half_of(bits, pieces, piece):
    """Return which of the two of a pair a piece is."""
    return piece % 2 if bits == 3 else piece // (pieces // 2)


@triton.constexpr_function
def slots(bits, planes, pieces):
    """Return pair, and parts of both pieces, or None, of each slot: word, byte, plane, mask and exponent."""
    found = []
    for pair in range(pieces // 2):
        own = [[], []]
        for word in range(3 if bits == 3 else 1):
            for is_high in range(2):
                for plane, mask, exponent in parts_of(bits, planes, word, is_high):
                    piece = plane * pieces // planes
                    if pair_of(bits, pieces, piece) == pair:
                        own[half_of(bits, pieces, piece)].append((word, is_high, plane, mask, exponent))
        for index in range(max(len(own[0]), len(own[1]))):
            found.append((pair, *(parts[index] if index < len(parts) else None for parts in own)))
    return found


@triton.constexpr_function
def first_slot(bits, planes, pieces, pair):
    """Return how many slots the pairs before have."""
    return sum(slot[0] < pair for slot in slots(bits, planes, pieces))


@triton.constexpr_function
def has_part(bits, planes, pieces, slot, half):
    """Return whether a slot has a part of a piece."""
    return slots(bits, planes, pieces)[slot][1 + half] is not None


@triton.constexpr_function
def word_of(bits, planes, pieces, slot, half):
    """Return the word of a part."""
    return slots(bits, planes, pieces)[slot][1 + half][0]


@triton.constexpr_function
def byte_of(bits, planes, pieces, slot, half):
    """Return the byte of a part: 0 or 1."""
    return slots(bits, planes, pieces)[slot][1 + half][1]


@triton.constexpr_function
def signed(word):
    """Return a mask as a signed int32."""
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.constexpr_function
def byte_mask(bits, planes, pieces, slot, half):
    """Return the mask of a part in four bytes of its own."""
    return signed(slots(bits, planes, pieces)[slot][1 + half][3] * 0x01010101)


@triton.constexpr_function
def both_mask(bits, planes, pieces, slot):
    """Return the mask of both parts in words that have one in the low and the other in the high bytes."""
    low, high = slots(bits, planes, pieces)[slot][1:]
    return signed((low[3] | high[3] << 8) * 0x10001)


@triton.constexpr_function
def slot_code(bits, planes, pieces, slot, half):
    """Return plane + 16 exponent of the part of a piece in a slot; -1 if it has none."""
    part = slots(bits, planes, pieces)[slot][1 + half]
    return -1 if part is None else part[2] + 16 * part[4]
