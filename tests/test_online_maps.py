# SPDX-License-Identifier: Apache-2.0
"""Online maps equal the matrices they stand for, and survive storage."""

import pytest
import torch

from quattuor.errors import InputError
from quattuor.online_maps import ONLINE_MAPS, Kronecker, Permutation


def full(generator):
    return Kronecker(
        left=torch.randn(3, 3, generator=generator),
        right=torch.randn(4, 4, generator=generator),
        gather=torch.randperm(12, generator=generator).int(),
        scatter=torch.randperm(12, generator=generator).int(),
        before=torch.rand(12, generator=generator) + 0.5,
        after=torch.rand(12, generator=generator) + 0.5,
    )


def test_without_diagonals_it_is_the_kronecker_product(generator):
    online = Kronecker(left=torch.randn(3, 3, generator=generator), right=torch.randn(4, 4, generator=generator))
    x = torch.randn(5, 12, generator=generator)
    assert torch.allclose(online.apply(x), x @ torch.kron(online.left, online.right), atol=1e-5)


def test_every_step_in_its_order(generator):
    online = full(generator)
    gather, scatter = (torch.eye(12)[:, index.long()] for index in (online.gather, online.scatter))
    matrix = online.before.diag() @ gather @ torch.kron(online.left, online.right) @ scatter @ online.after.diag()
    x = torch.randn(2, 5, 12, generator=generator)
    assert torch.allclose(online.apply(x), x @ matrix, atol=1e-4)


def test_permutation_gathers():
    online = Permutation(indices=torch.tensor([2, 0, 1], dtype=torch.int32))
    assert torch.equal(online.apply(torch.tensor([[10.0, 11.0, 12.0]])), torch.tensor([[12.0, 10.0, 11.0]]))


@pytest.mark.parametrize(
    "online", [full, lambda generator: Permutation(indices=torch.arange(11, -1, -1, dtype=torch.int32))]
)
def test_tensors_make_the_map_again(online, generator):
    online = online(generator)
    again = ONLINE_MAPS[type(online).__name__](**online.tensors())
    x = torch.randn(3, 12, generator=generator)
    assert torch.equal(again.apply(x), online.apply(x))


def test_half_precision_comes_back_as_it_went_in(generator):
    assert full(generator).apply(torch.ones(1, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"gather=5 is not 2 \* 3"):
        Kronecker(left=torch.eye(2), right=torch.eye(3), gather=torch.arange(5).int())
