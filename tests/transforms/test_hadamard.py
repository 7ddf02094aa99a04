# SPDX-License-Identifier: Apache-2.0
"""Orders of Hadamard matrices, their constructions and their refusals."""

import pytest
import torch

from quattuor.errors import UnsupportedError
from quattuor.transforms.hadamard import hadamard, hadamard_base, has_hadamard

# Hidden, head and intermediate sizes of published models, and the smallest base order that reaches them.
MODEL_SIZES = {
    64: 1,
    80: 20,
    96: 12,
    112: 28,
    120: 60,
    576: 36,
    896: 28,
    960: 60,
    1152: 36,
    1536: 12,
    2048: 1,
    2560: 20,
    2880: 180,
    3072: 12,
    3584: 28,
    3840: 60,
    4864: 76,
    5120: 20,
    5376: 84,
    6912: 108,
    8192: 1,
    8960: 140,
    11008: 172,
    13824: 108,
    18944: 148,
    25600: 100,
    29568: 924,
}


def is_hadamard(matrix: torch.Tensor) -> bool:
    """Check the definition in exact arithmetic: entries +-1, orthogonal rows."""
    order = matrix.shape[0]
    product = matrix.double() @ matrix.double().T
    return bool((matrix.abs() == 1).all()) and torch.equal(product, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, *range(4, 261, 4)])
def test_small_orders_are_orthogonal_or_refused(order):
    known_gaps = {188, 236, 260}
    assert has_hadamard(order) == (order not in known_gaps)
    if has_hadamard(order):
        matrix = hadamard(order)
        assert matrix.dtype == torch.float64
        assert (matrix @ matrix.T - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-12
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), rtol=1e-15)
        assert (matrix[:, 0] > 0).all()


@pytest.mark.parametrize(("order", "base"), MODEL_SIZES.items())
def test_model_sizes_are_reached_from_verified_bases(order, base):
    base_matrix, num_doublings = hadamard_base(order)
    assert base_matrix.shape == (base, base)
    assert base * 2**num_doublings == order
    assert is_hadamard(base_matrix)


@pytest.mark.parametrize("order", [576, 960, 1536, 2048])
def test_doubling_keeps_orthogonality_at_full_size(order):
    matrix = hadamard(order)
    assert (matrix @ matrix.T - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("order", [92, 116, 156, 172])
def test_williamson_orders(order):
    matrix, num_doublings = hadamard_base(order)
    assert num_doublings == 0
    assert is_hadamard(matrix)


@pytest.mark.parametrize("order", [52, 100])
def test_orders_over_a_field_of_prime_squares(order):
    """25 and 49 are not prime: the quadratic character needs the field of p^2 elements."""
    assert is_hadamard(hadamard_base(order)[0])


def test_cached_base_cannot_be_changed_by_a_caller():
    hadamard_base(12)[0].zero_()
    assert is_hadamard(hadamard_base(12)[0])


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (0, "is not a positive size"),
        (-4, "is not a positive size"),
        (3, "is a multiple of 4"),
        (6, "is a multiple of 4"),
        (575, "is a multiple of 4"),
        (188, "none of the constructions"),
    ],
)
def test_refusal_names_the_order_the_reason_and_the_remedy(order, reason):
    assert not has_hadamard(order)
    with pytest.raises(UnsupportedError, match=f"order={order} .*{reason}.*random orthogonal matrix"):
        hadamard(order)
