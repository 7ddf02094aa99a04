# SPDX-License-Identifier: Apache-2.0
"""Incoherence: the layer's function and error stay, concentrated entries go (2307.13304)."""

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.transforms.incoherence import Incoherence, balanced_factors, column_scale

KINDS = (Incoherence(), Incoherence(rescale=False), Incoherence(kind="hadamard"))
every_kind = pytest.mark.parametrize("transform", KINDS, ids=lambda value: f"{value.kind}-{value.rescale}")


def problem(num_rows=40, num_columns=48, *, seed=0, outliers=True):
    """Return a weight with planted outliers, the Hessian of inputs with an outlier channel, and these, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
    x = torch.randn(300, num_columns, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(num_columns) + 0.3 * torch.randn(num_columns, num_columns, generator=generator)).double()
    if outliers:
        weight[3, 7], weight[20] = 60.0, weight[20] * 5
        x[:, 11] *= 30
    return weight, x.T @ x / len(x), x


def matrix(online_map, size):
    """Return T of a map x @ T, as it is stored."""
    return online_map.apply(torch.eye(size, dtype=torch.float64))


@every_kind
def test_layer_computes_what_it_did(transform):
    weight, hessian, x = problem()
    changed = transform.transform(weight, hessian, 5)
    y = changed.output_map.apply(changed.input_map.apply(x) @ changed.weight.T)
    assert (y - x @ weight.T).norm() / y.norm() < 1e-13
    single = transform.transform(weight.float(), hessian.float(), 5)
    y = single.output_map.apply(single.input_map.apply(x.float()) @ single.weight.T)
    assert (y - (x @ weight.T).float()).norm() / y.norm() < 1e-5


@every_kind
def test_weight_and_hessian_are_in_the_basis_of_the_stored_maps(transform):
    weight, hessian, x = problem()
    changed = transform.transform(weight, hessian, 5)
    to_input, to_output = matrix(changed.input_map, 48), matrix(changed.output_map, 40)
    torch.testing.assert_close(to_output.T @ changed.weight @ to_input.T, weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(changed.hessian, to_input.T @ hessian @ to_input, rtol=1e-10, atol=1e-10)
    mapped = changed.input_map.apply(x)
    torch.testing.assert_close(changed.hessian, mapped.T @ mapped / len(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(changed.hessian, changed.hessian.T)


@every_kind
def test_error_of_the_codes_is_the_error_of_the_layer(transform):
    """tr(E~ H~ E~^T) = tr(E H E^T) up to the rounding of the stored output factors to float16."""
    weight, hessian, _ = problem()
    changed = transform.transform(weight, hessian, 5)
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mapped = changed.output_map.apply((error @ matrix(changed.input_map, 48).T).T).T
    inside = ((error @ changed.hessian) * error).sum()
    outside = ((mapped @ hessian) * mapped).sum()
    assert float(inside / outside) == pytest.approx(1, abs=2e-3)


@every_kind
def test_stored_maps_are_orthogonal_to_half_precision_beside_the_diagonal(transform):
    weight, hessian, _ = problem()
    changed = transform.transform(weight, hessian, 5)
    before = changed.input_map.before
    to_input = matrix(changed.input_map, 48)
    if before is not None:
        to_input = to_input / before.double()[:, None]
    for turn in (to_input, matrix(changed.output_map, 40)):
        assert (turn @ turn.T - torch.eye(len(turn))).abs().max() < 2e-3
        assert (turn.abs() > 1e-6).double().mean() > 0.99, "every output mixes every input"


def test_outputs_may_stay_as_they_are():
    weight, hessian, x = problem()
    changed = Incoherence(outputs=False).transform(weight, hessian, 5)
    assert changed.output_map is None
    assert (changed.input_map.apply(x) @ changed.weight.T - x @ weight.T).norm() / (x @ weight.T).norm() < 1e-13
    both = Incoherence().transform(weight, hessian, 5)
    assert torch.equal(changed.hessian, both.hessian), "the basis of the inputs is the same one"


def test_only_small_tensors_are_stored():
    weight, hessian, _ = problem()
    changed = Incoherence().transform(weight, hessian, 5)
    stored = {name: (value.dtype, tuple(value.shape)) for name, value in changed.input_map.tensors().items()}
    assert stored == {
        "left": (torch.float16, (8, 8)),
        "right": (torch.float16, (6, 6)),
        "gather": (torch.int16, (48,)),
        "before": (torch.float16, (48,)),
    }
    assert set(changed.output_map.tensors()) == {"left", "right", "scatter"}
    for online_map in (changed.input_map, changed.output_map):
        assert all(value.is_contiguous() for value in online_map.tensors().values()), "as it will be reloaded"
    signed = Incoherence(kind="hadamard").transform(weight, hessian, 5)
    assert set(signed.input_map.tensors()) == {"left", "right", "before"}
    assert set(signed.output_map.tensors()) == {"left", "right", "after"}


def test_rescaling_makes_energies_proportional_and_their_product_least():
    weight, hessian, _ = problem()
    scale = column_scale(weight, hessian)
    scaled_weight, energy = weight * scale, hessian.diagonal() / scale.square()
    ratio = energy / scaled_weight.square().sum(dim=0)
    torch.testing.assert_close(ratio, ratio.mean().expand(48), rtol=1e-10, atol=0)
    before = hessian.trace() * weight.square().sum()
    after = energy.sum() * scaled_weight.square().sum()
    assert after < 0.5 * before
    for seed in range(20):
        other = scale * torch.randn(48, generator=torch.Generator().manual_seed(seed)).mul(0.1).exp()
        assert (hessian.diagonal() / other.square()).sum() * (weight * other).square().sum() >= after


def test_dead_and_empty_columns_keep_a_finite_scale():
    weight, hessian, x = problem()
    weight[:, 4] = 0
    hessian[9], hessian[:, 9] = 0, 0
    x[:, 9] = 0
    changed = Incoherence().transform(weight, hessian, 5)
    assert torch.isfinite(changed.weight).all()
    assert float(changed.input_map.before.max() / changed.input_map.before.min()) < 1.1e4
    y = changed.output_map.apply(changed.input_map.apply(x) @ changed.weight.T)
    assert (y - x @ weight.T).norm() / y.norm() < 1e-12


@pytest.mark.parametrize("kind", ["orthogonal", "hadamard"])
def test_largest_entries_come_close_to_the_mean(kind):
    """Planted outliers spread over all entries of the weight and of its Hessian's diagonal."""
    weight, hessian, _ = problem()
    changed = Incoherence(kind=kind).transform(weight, hessian, 5)

    def concentration(values):
        return float(values.abs().max() / values.square().mean().sqrt())

    assert concentration(changed.weight) < 0.45 * concentration(weight)
    diagonal = hessian.diagonal()
    assert concentration(diagonal) > 6
    assert concentration(changed.hessian.diagonal()) < 3.5


def test_seed_alone_decides():
    weight, hessian, _ = problem()
    torch.manual_seed(1)
    first = Incoherence().transform(weight, hessian, 5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again = Incoherence().transform(weight, hessian, 5)
    assert torch.equal(again.weight, first.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = Incoherence().transform(weight, hessian, 6)
    assert not torch.equal(other.input_map.gather, first.input_map.gather)
    assert not torch.equal(first.input_map.left[:6, :6], first.output_map.left[:6, :6])


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        (4096, (64, 64)),
        (11008, (128, 86)),
        (768, (32, 24)),
        (576, (24, 24)),
        (7, (7, 1)),
        (1, (1, 1)),
        (2, (2, 1)),
    ],
)
def test_factors_are_balanced(size, factors):
    assert balanced_factors(size) == factors


@pytest.mark.parametrize(("size", "factors"), [(576, (24, 24)), (1536, (48, 32)), (192, (16, 12)), (8, (4, 2))])
def test_hadamard_factors_both_have_a_matrix(size, factors):
    assert balanced_factors(size, hadamard_only=True) == factors


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 2)])
def test_sizes_that_are_prime_or_one(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = torch.eye(shape[1], dtype=torch.float64)
    changed = Incoherence().transform(weight, hessian, 0)
    x = torch.randn(5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = changed.output_map.apply(changed.input_map.apply(x) @ changed.weight.T)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_sizes_that_do_not_split_are_refused():
    with pytest.raises(
        UnsupportedError, match="Incoherence: size=2053 is no product of two numbers up to 1024; keep"
    ):
        balanced_factors(2053)
    with pytest.raises(UnsupportedError, match=r'size=14 .* Hadamard matrices .*; use kind="orthogonal"'):
        balanced_factors(14, hadamard_only=True)


@pytest.mark.usefixtures("unchecked")
def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match=r"Incoherence: kind=fourier is not one of .*; use kind="):
        Incoherence(kind="fourier")
