# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices: entries +-1 and orthogonal rows, H @ H.T = n I.

An order is n = b * 2^d. The base of order b comes from the first construction below that serves it, with b as
small as possible; Sylvester doubling, [[H, H], [H, -H]], does the rest. Every base is verified when it is made.

| construction | order | condition |
| --- | --- | --- |
| Sylvester | 1, 2 | |
| Paley I | q + 1 | q = p or p^2 with p prime, q = 3 mod 4 |
| Paley II | 2 (q + 1) | q = p or p^2 with p prime, q = 1 mod 4 |
| Williamson | 4 m | four symmetric circulants of odd order m, stored for the orders that Paley leaves out |
"""

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt, sqrt

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from quattuor.errors import UnsupportedError, compose

__all__ = ["hadamard", "hadamard_base", "has_hadamard"]

# First (m + 1) / 2 entries of the symmetric circulants A, B, C, D, A^2 + B^2 + C^2 + D^2 = 4 m I.
WILLIAMSON: dict[int, tuple[str, str, str, str]] = {
    92: ("+--++-+-+---", "+-+--+++++--", "+-+++--++-+-", "+++++-++---+"),
    116: ("+++--++-+-+----", "+++---+++-+-+--", "+--+-+++++--++-", "+++-++-+--+++-+"),
    156: ("+---+---+-++-++----+", "++--+++-+--++-+-----", "+---+--++++----+-+-+", "+-++------++--+-+-++"),
    172: (
        "+++++-++----+-++--++-+",
        "+++---++--+-+-+-++----",
        "++-+-++++-+--+--+++--+",
        "+-++-----++++-+-+++-++",
    ),
}


def hadamard(order: int) -> Float[Tensor, "K K"]:
    """Return a Hadamard matrix divided by sqrt(order), float64: T @ T.T = I.

    Its first column is constant and positive. The matrix is made anew by each call; only its base is cached.

    Raises:
        UnsupportedError: No construction here reaches the order; `has_hadamard` tells beforehand.
    """
    base_BB, num_doublings = hadamard_base(order)
    matrix_KK = base_BB.double() / sqrt(order)
    for _ in range(num_doublings):
        top_BK = torch.cat((matrix_KK, matrix_KK), dim=1)
        matrix_KK = torch.cat((top_BK, torch.cat((matrix_KK, -matrix_KK), dim=1)), dim=0)
    return matrix_KK


def has_hadamard(order: int) -> bool:
    """Tell whether `hadamard(order)` has a construction."""
    return _split(order) is not None


def hadamard_base(order: int) -> tuple[Int8[Tensor, "B B"], int]:
    """Return the smallest base of entries +-1 and the number of Sylvester doublings that lead to the order.

    Raises:
        UnsupportedError: No construction here reaches the order.
    """
    split = _split(order)
    if split is None:
        raise UnsupportedError(
            compose(
                subject="order",
                value=order,
                constraint=_why_not(order),
                place="hadamard",
                remedy='use a random orthogonal matrix, kind="orthogonal" (or "auto" for RotateHeads)',
            )
        )
    base, num_doublings = split
    return _base(base).clone(), num_doublings


def _why_not(order: int) -> str:
    if order < 1:
        return "is not a positive size"
    if order > 2 and order % 4:
        return "has no Hadamard matrix: an order above 2 is a multiple of 4"
    return "is reached by none of the constructions of Sylvester, Paley and Williamson"


def _split(order: int) -> tuple[int, int] | None:
    """Return (base order, doublings) with base * 2^doublings = order, the smallest base first."""
    if order < 1:
        return None
    odd = order // (order & -order)
    base = 1 if odd == 1 else 4 * odd
    while base <= order:
        if base == 1 or base in WILLIAMSON or _paley_1_field(base) or _paley_2_field(base):
            return base, (order // base).bit_length() - 1
        base *= 2
    return None


@lru_cache(maxsize=32)
def _base(order: int) -> Int8[Tensor, "B B"]:
    """Construct and verify a base of entries +-1 whose first column is +1."""
    if order == 1:
        matrix_BB = torch.ones(1, 1, dtype=torch.int64)
    elif order in WILLIAMSON:
        matrix_BB = _williamson(WILLIAMSON[order])
    elif (field := _paley_1_field(order)) is not None:
        matrix_BB = _paley_1(_jacobsthal(*field))
    else:
        field = _paley_2_field(order)
        assert field is not None, f"order {order} passed _split without a construction"
        matrix_BB = _paley_2(_jacobsthal(*field))
    matrix_BB = matrix_BB * matrix_BB[:, :1]
    # Products of +-1 sum to at most `order`, which float64 holds exactly; integer matmul has no fast path.
    product_BB = matrix_BB.double() @ matrix_BB.double().T
    is_hadamard = bool((matrix_BB.abs() == 1).all()) and torch.equal(
        product_BB, order * torch.eye(order, dtype=torch.float64)
    )
    assert is_hadamard, f"the construction of order {order} does not satisfy H @ H.T = n I"
    return matrix_BB.to(torch.int8)


def _paley_1_field(order: int) -> tuple[int, int] | None:
    """Return (p, k) with order = p^k + 1 and p^k = 3 mod 4."""
    return _prime_power(order - 1) if order % 4 == 0 else None


def _paley_2_field(order: int) -> tuple[int, int] | None:
    """Return (p, k) with order = 2 (p^k + 1) and p^k = 1 mod 4."""
    return _prime_power(order // 2 - 1) if order % 4 == 0 and order // 2 % 4 == 2 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, 1) for an odd prime, (p, 2) for its square, None otherwise."""
    if _is_odd_prime(q):
        return q, 1
    root = isqrt(max(q, 0))
    return (root, 2) if root * root == q and _is_odd_prime(root) else None


def _is_odd_prime(number: int) -> bool:
    return number > 2 and number % 2 == 1 and all(number % divisor for divisor in range(3, isqrt(number) + 1, 2))


def _jacobsthal(prime: int, degree: int) -> Tensor:
    """Return Q[x, y] = chi(x - y) over the field of prime^degree elements, degree 1 or 2.

    chi is 0 at zero, 1 at the other squares and -1 elsewhere. The field of p^2 elements is a + b i with i^2 = r, r
    the smallest non-square mod p.
    """
    if degree == 1:
        numbers = torch.arange(prime)
        chi = _character(prime, ((int(x) * int(x) % prime,) for x in numbers), (prime,))
        return chi[(numbers[:, None] - numbers[None, :]) % prime]
    squares = {x * x % prime for x in range(prime)}
    r = next(x for x in range(prime) if x not in squares)
    pairs = [(a, b) for a in range(prime) for b in range(prime)]
    products = (((a * a + r * b * b) % prime, 2 * a * b % prime) for a, b in pairs)
    chi = _character(prime, products, (prime, prime))
    a, b = torch.tensor(pairs).unbind(dim=1)
    return chi[(a[:, None] - a[None, :]) % prime, (b[:, None] - b[None, :]) % prime]


def _character(prime: int, squares: Iterator[tuple[int, ...]], shape: tuple[int, ...]) -> Tensor:
    """Return the table of chi: 1 where listed as a square, -1 elsewhere, 0 at zero."""
    chi = torch.full(shape, -1, dtype=torch.int64)
    for element in squares:
        chi[element] = 1
    chi[(0,) * len(shape)] = 0
    return chi


def _bordered(jacobsthal: Tensor, lower_sign: int) -> Tensor:
    """Return [[0, 1], [lower_sign, Q]], a conference matrix."""
    size = jacobsthal.shape[0] + 1
    matrix = torch.zeros(size, size, dtype=torch.int64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, lower_sign, jacobsthal
    return matrix


def _paley_1(jacobsthal: Tensor) -> Tensor:
    """Return I + S with the skew conference matrix S, for q = 3 mod 4."""
    conference = _bordered(jacobsthal, -1)
    return conference + torch.eye(conference.shape[0], dtype=torch.int64)


def _paley_2(jacobsthal: Tensor) -> Tensor:
    """Return C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with the symmetric conference matrix C."""
    conference = _bordered(jacobsthal, 1)
    identity = torch.eye(conference.shape[0], dtype=torch.int64)
    return torch.kron(conference, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
        identity, torch.tensor([[1, -1], [-1, -1]])
    )


def _williamson(halves: tuple[str, str, str, str]) -> Tensor:
    """Return the array of four symmetric circulants.

    References:
        Williamson, 1944, Duke Mathematical Journal 11; Baumert, Golomb and Hall, 1962, for order 92.
    """
    circulants = []
    for half in halves:
        signs = torch.tensor([1 if sign == "+" else -1 for sign in half])
        row = torch.cat((signs, signs[1:].flip(0)))
        circulants.append(torch.stack([row.roll(shift) for shift in range(len(row))]))
    a, b, c, d = circulants
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
