# SPDX-License-Identifier: Apache-2.0
"""MigrateScale against its equation and the claims made for it."""

import pytest
import torch

from quattuor.errors import CalibrationError, InputError
from quattuor.transforms.base import max_within_ties
from quattuor.transforms.scaling import MigrateScale


def by_hand(make_problem, input_max, weight_max, **fields):
    """A site with given maxima: the weight's rows hold them once, negated, above smaller entries."""
    weight = torch.tensor([weight_max, weight_max]) * torch.tensor([[-1.0], [0.5]])
    inputs = torch.tensor([[input_max]])
    return make_problem(inputs=inputs, abs_max=torch.tensor(input_max), weight=weight, **fields)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.5, [4**0.5 / 1, 9**0.5 / 2, 1.0, 0.25**0.5 / 0.1]),
        (0.25, [4**0.25, 9**0.25 / 4**0.75, 1 / 1, 0.25**0.25 / 0.01**0.75]),
        (1.0, [4.0, 9.0, 1.0, 0.25]),
        (0.0, [1.0, 0.25, 1.0, 100.0]),
    ],
)
def test_equation_4_by_hand(make_problem, alpha, expected):
    problem = by_hand(make_problem, [4.0, 9.0, 1.0, 0.25], [1.0, 4.0, 1.0, 0.01])
    assert torch.allclose(MigrateScale(alpha=alpha).find(problem), torch.tensor(expected), rtol=1e-6)


def test_dead_channels_keep_one(make_problem):
    problem = by_hand(make_problem, [0.0, 4.0, 4.0, 1e-44], [1.0, 0.0, 4.0, 1.0])
    assert MigrateScale().find(problem).tolist() == [1.0, 1.0, 1.0, 1.0]
    problem = by_hand(make_problem, [0.0, 4.0, 16.0, 9.0], [1.0, 0.0, 4.0, 1.0])
    assert MigrateScale().find(problem).tolist() == [1.0, 1.0, 2.0, 3.0]


def test_tied_channels_take_the_largest_and_ignore_dead_ones(make_problem):
    ties = torch.tensor([5, 9, 5, 9, 2])
    problem = by_hand(make_problem, [4.0, 0.01, 9.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0], ties=ties)
    expected = torch.tensor([3.0, 0.1, 3.0, 0.1, 1.0])
    assert torch.allclose(MigrateScale().find(problem), expected, rtol=1e-6)


def test_half_balances_maxima_and_one_flattens_activations(make_problem):
    problem = make_problem()
    half, whole = MigrateScale(alpha=0.5).find(problem), MigrateScale(alpha=1.0).find(problem)
    weight_max = problem.weight.abs().amax(dim=0)
    assert torch.allclose(problem.abs_max / half, weight_max * half, rtol=1e-5)
    assert torch.allclose(problem.abs_max / whole, torch.ones_like(whole), rtol=1e-5)


def test_all_consumers_count_in_any_order(make_problem):
    problem = make_problem()
    scale = MigrateScale().find(problem)
    assert torch.equal(MigrateScale().find(make_problem(weight=problem.weight.flip(0))), scale)
    louder = problem.weight.clone()
    louder[3, 5] = problem.weight[:, 5].abs().max() * 10
    changed = MigrateScale().find(make_problem(weight=louder)) != scale
    assert changed.nonzero().flatten().tolist() == [5]


def test_per_tensor_rounding_of_outliers_improves_threefold(make_problem):
    """SmoothQuant's claim: with injected outliers, W8A8 per tensor loses at least 3 times less."""

    def error(problem, scale):
        def round_to_int8(x):
            step = x.abs().max() / 127
            return torch.round(x / step) * step

        rounded = round_to_int8(problem.inputs / scale) @ round_to_int8(problem.weight * scale).T
        return (rounded - problem.inputs @ problem.weight.T).abs().mean()

    problem = make_problem(in_features=64, outlier=100.0)
    ones = torch.ones_like(problem.abs_max)
    assert error(problem, MigrateScale().find(problem)) * 3 < error(problem, ones)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(InputError, match=r"MigrateScale: alpha=.* is not between 0 and 1; use 0.5"):
        MigrateScale(alpha=alpha)


@pytest.mark.parametrize("sites", [(), ("qkv", "qkv"), ("o_proj",)])
def test_unknown_or_repeated_sites_are_refused(sites):
    with pytest.raises(InputError, match=r"MigrateScale: sites=.* distinct names .*; name at least one of qkv"):
        MigrateScale(sites=sites)


@pytest.mark.parametrize("subject", ["abs_max", "weight"])
def test_not_finite_data_is_refused(make_problem, subject):
    problem = make_problem()
    broken = getattr(problem, subject).clone()
    broken.view(-1)[3] = float("nan")
    with pytest.raises(CalibrationError, match=rf"MigrateScale: {subject}=1 entries are NaN"):
        MigrateScale().find(make_problem(**{subject: broken}))


def test_max_within_ties_takes_any_labels():
    values = torch.tensor([1.0, -3.0, 2.0, -1.0])
    assert max_within_ties(values, None) is values
    assert max_within_ties(values, torch.tensor([-7, 40, -7, 40])).tolist() == [2.0, -1.0, 2.0, -1.0]
