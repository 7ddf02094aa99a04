# SPDX-License-Identifier: Apache-2.0
"""What is particular to each rotation, and the functions that fold it."""

import pytest
import torch

from quattuor.errors import InputError, UnsupportedError
from quattuor.transforms.rotation import (
    RotateHeads,
    RotateResidual,
    fold_gain,
    fold_norm_bias,
    rotate_embedding,
    rotate_heads_input,
    rotate_heads_output,
    rotate_input,
    rotate_output,
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("kind", "size"), [("hadamard", 96), ("orthogonal", 96), ("orthogonal", 63), ("orthogonal", 1)]
)
def test_keep_mean_maps_all_ones_to_itself(kind, size):
    rotation = RotateResidual(kind=kind, keep_mean=True).matrix(size, 5)
    ones = torch.ones(size, dtype=torch.float64)
    assert (rotation @ rotation.T - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    assert (ones @ rotation - ones).abs().max() < 1e-12


def test_keep_mean_is_settled_by_the_norm_unless_it_is_given():
    assert RotateResidual().for_norm("layer").keep_mean is True
    assert RotateResidual().for_norm("rms").keep_mean is False
    assert RotateResidual(keep_mean=False).for_norm("layer").keep_mean is False
    assert torch.equal(RotateResidual().for_norm("rms").matrix(64, 3), RotateResidual().matrix(64, 3))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_keep_mean_still_mixes_every_channel(kind):
    """Without mixing, an outlier channel would stay one: no entry may hold most of a row's unit norm."""
    rotation = RotateResidual(kind=kind, keep_mean=True).matrix(256, 5)
    assert rotation.abs().max() < 0.5


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_layer_norm_commutes_only_when_the_mean_is_kept(kind):
    x = random(7, 64) + 3

    def deviation(keep_mean):
        rotation = RotateResidual(kind=kind, keep_mean=keep_mean).matrix(64, 1)
        norm = torch.nn.functional.layer_norm
        return (norm(x @ rotation, (64,)) - norm(x, (64,)) @ rotation).abs().max()

    assert deviation(True) < 1e-10
    assert deviation(False) > 1e-3


def test_hadamard_rotation_spreads_an_outlier_evenly():
    """QuaRot's claim: one large channel becomes equal magnitudes everywhere."""
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 11] = 1000.0
    rotated = x @ RotateResidual().matrix(576, 0)
    assert torch.allclose(rotated.abs(), torch.full_like(rotated, 1000 / 24), rtol=1e-12)


def test_hadamard_rotation_spreads_a_constant_vector():
    """Random signs matter: without them the first column would collect the whole mean."""
    rotated = torch.ones(1, 576, dtype=torch.float64) @ RotateResidual().matrix(576, 0)
    assert rotated.abs().max() < 6


def test_random_orthogonal_is_uniform_in_sign():
    """QR without the sign fix has a first column whose first entry is never positive."""
    signs = [RotateResidual(kind="orthogonal").matrix(3, seed).diagonal() > 0 for seed in range(64)]
    fractions = torch.stack(signs).double().mean(dim=0)
    assert ((fractions > 0.25) & (fractions < 0.75)).all()


def test_heads_use_a_hadamard_matrix_where_one_exists():
    assert torch.allclose(RotateHeads().matrix(80, 0).abs(), torch.full((80, 80), 80**-0.5, dtype=torch.float64))
    assert torch.equal(RotateHeads().matrix(80, 0), RotateHeads(kind="hadamard").matrix(80, 1))
    assert torch.equal(RotateHeads().matrix(50, 3), RotateHeads(kind="orthogonal").matrix(50, 3))


@pytest.mark.parametrize(
    "rotation", [RotateResidual(), RotateResidual(keep_mean=True), RotateHeads(kind="hadamard")]
)
def test_size_without_hadamard_matrix_is_refused_with_a_remedy(rotation):
    with pytest.raises(UnsupportedError, match=r'hadamard: order=574 .*kind="orthogonal"'):
        rotation.matrix(574, 0)


@pytest.mark.parametrize("rotation", [RotateResidual, RotateHeads])
@pytest.mark.usefixtures("unchecked")
def test_unknown_kind_is_refused(rotation):
    with pytest.raises(InputError, match=f"{rotation.__name__}: kind=fourier .*use kind="):
        rotation(kind="fourier")


def test_rotate_input_and_embedding_undo_a_rotated_input():
    x, weight = random(5, 64), random(10, 64, seed=1)
    rotation = RotateResidual().matrix(64, 0)
    assert torch.allclose((x @ rotation) @ rotate_input(weight, rotation).T, x @ weight.T, atol=1e-10)
    assert torch.allclose(rotate_embedding(weight, rotation), weight @ rotation, atol=1e-12)


def test_rotate_input_in_row_blocks_equals_one_product(monkeypatch):
    monkeypatch.setattr("quattuor.transforms.rotation.ROW_BLOCK", 3)
    weight, rotation = random(10, 16), RotateResidual().matrix(16, 0)
    assert torch.allclose(rotate_input(weight, rotation), weight @ rotation, atol=1e-12)


@pytest.mark.parametrize("has_bias", [True, False])
def test_rotate_output_rotates_what_a_linear_writes(has_bias):
    x, weight, bias = random(5, 10), random(64, 10, seed=1), random(64, seed=2) if has_bias else None
    rotation = RotateResidual().matrix(64, 0)
    new_weight, new_bias = rotate_output(weight, bias, rotation)
    assert (new_bias is not None) == has_bias
    linear = torch.nn.functional.linear
    assert torch.allclose(linear(x, new_weight, new_bias), linear(x, weight, bias) @ rotation, atol=1e-10)


def test_rotate_heads_output_rotates_each_head_by_itself():
    x, weight, bias = random(5, 10), random(3 * 8, 10, seed=1), random(3 * 8, seed=2)
    rotation = RotateHeads(kind="orthogonal").matrix(8, 0)
    new_weight, new_bias = rotate_heads_output(weight, bias, rotation, 3)
    expected = (x @ weight.T + bias) @ torch.block_diag(rotation, rotation, rotation)
    assert torch.allclose(x @ new_weight.T + new_bias, expected, atol=1e-10)
    assert rotate_heads_output(weight, None, rotation, 3)[1] is None


def test_rotate_heads_input_reads_each_rotated_head():
    weight = random(10, 3 * 8)
    rotation = RotateHeads(kind="orthogonal").matrix(8, 0)
    expected = weight @ torch.block_diag(rotation, rotation, rotation)
    assert torch.allclose(rotate_heads_input(weight, rotation, 3), expected, atol=1e-12)


def test_wrong_head_count_is_refused():
    rotation = torch.eye(8, dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"rotate_heads_output: num_heads=4 heads of size 8 .* 24 rows .*key-value"
    ):
        rotate_heads_output(random(24, 10), None, rotation, 4)
    with pytest.raises(InputError, match=r"rotate_heads_input: num_heads=2 heads of size 8 .* 24 columns"):
        rotate_heads_input(random(10, 24), rotation, 2)


@pytest.mark.parametrize("has_bias", [True, False])
def test_folding_a_norm_keeps_what_its_readers_compute(has_bias):
    normalized, gain, norm_bias = random(5, 16), random(16, seed=1), random(16, seed=2)
    weight, bias = random(10, 16, seed=3), random(10, seed=4) if has_bias else None
    linear = torch.nn.functional.linear
    expected = linear(normalized * gain + norm_bias, weight, bias)
    folded = linear(normalized, fold_gain(weight, gain), fold_norm_bias(weight, bias, norm_bias))
    assert torch.allclose(folded, expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folds_compute_in_double_and_round_once(dtype):
    weight, bias, rotation = random(64, 64, dtype=dtype), random(64, dtype=dtype), RotateResidual().matrix(64, 0)
    exact = (weight.double() @ rotation).to(dtype)
    assert torch.equal(rotate_input(weight, rotation), exact)
    new_weight, new_bias = rotate_output(weight, bias, rotation)
    assert torch.equal(new_weight, (rotation.T @ weight.double()).to(dtype))
    assert torch.equal(new_bias, (bias.double() @ rotation).to(dtype))
    assert fold_gain(weight, bias).dtype == fold_norm_bias(weight, bias, bias).dtype == dtype


def test_folds_of_trainable_parameters_build_no_graph():
    weight = torch.nn.Parameter(random(16, 16))
    bias = torch.nn.Parameter(random(16))
    rotation = RotateResidual().matrix(16, 0)
    results = (
        rotate_input(weight, rotation),
        *rotate_output(weight, bias, rotation),
        *rotate_heads_output(weight, bias, rotation, 1),
        rotate_heads_input(weight, rotation, 1),
        fold_gain(weight, bias),
        fold_norm_bias(weight, bias, bias),
    )
    assert not any(result.requires_grad for result in results)
