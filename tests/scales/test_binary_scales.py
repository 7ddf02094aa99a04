# SPDX-License-Identifier: Apache-2.0
"""Scales of binary coding: claims of the paper as inequalities, and exact conversion."""

import pytest
import torch
from torch import Tensor

from quattuor.errors import InputError, UnsupportedError
from quattuor.formats import BinaryCoding, Codebook, Format, Integer
from quattuor.scales import AbsMax, Alternating, ClipSearch, ScaleRule, UniformPlanes


def error(values: Tensor, number_format: Format, rule: ScaleRule, importance: Tensor | None = None) -> Tensor:
    parameters = rule.fit(values, number_format, importance)
    squared = (number_format.fake_quantize(values, parameters) - values).double().square()
    return (squared if importance is None else squared * importance).sum(dim=-1)


def make(generator: torch.Generator, *, heavy: bool = False) -> Tensor:
    values = torch.randn(8, 4, 64, generator=generator)
    return values * values.abs().pow(1.5) if heavy else values


def test_one_plane_is_sign_times_mean_magnitude(generator: torch.Generator) -> None:
    values = make(generator)
    for rounds in (0, 5):
        rule = Alternating(rounds=rounds, offset=False, scale_dtype="float32")
        parameters = rule.fit(values, BinaryCoding(1))
        torch.testing.assert_close(parameters["alpha"].squeeze(-1), values.abs().mean(dim=-1))
        codes = BinaryCoding(1).encode(values, parameters)
        assert torch.equal(codes == 1, values > 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_error_never_rises_over_rounds(
    bits: int, offset: bool, weighted: bool, generator: torch.Generator
) -> None:
    values = make(generator, heavy=True)
    importance = torch.rand(values.shape, generator=generator) if weighted else None
    rules = [
        Alternating(rounds=rounds, offset=offset, start="greedy", scale_dtype="float32") for rounds in range(8)
    ]
    errors = torch.stack([error(values, BinaryCoding(bits), rule, importance) for rule in rules])
    # The scales are solved for in float64 from float32 sums of 64 terms.
    assert (errors.diff(dim=0) <= 1e-5 * errors[:-1]).all()
    assert errors[-1].sum() < 0.95 * errors[0].sum()


def test_greedy_error_falls_with_every_plane(generator: torch.Generator) -> None:
    values = make(generator)
    rule = Alternating(rounds=0, start="greedy", offset=False, scale_dtype="float32")
    errors = torch.stack([error(values, BinaryCoding(bits), rule) for bits in range(1, 9)])
    assert (errors.diff(dim=0) < 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("heavy", [False, True])
def test_best_of_starts_is_never_above_rounding_to_nearest(
    bits: int, heavy: bool, generator: torch.Generator
) -> None:
    values = make(generator, heavy=heavy)
    ours = error(values, BinaryCoding(bits), Alternating(rounds=4))
    theirs = error(values, Integer(bits), AbsMax(scale_dtype="float16"))
    # Equal grids are decoded by different sums: a rounding of float32 per plane.
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.75 * theirs.sum()


def test_greedy_alone_loses_to_rounding_at_many_bits(generator: torch.Generator) -> None:
    # Why there are two starts: alternation is a local search.
    values = make(generator)
    greedy = error(values, BinaryCoding(6), Alternating(start="greedy", offset=False)).sum()
    assert greedy > error(values, Integer(6), AbsMax(scale_dtype="float16")).sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_planes_decode_like_the_uniform_grid(
    bits: int, symmetric: bool, generator: torch.Generator
) -> None:
    values, inner = make(generator, heavy=True), ClipSearch(num_steps=10, smallest=0.5, scale_dtype="float16")
    uniform, binary = Integer(bits, symmetric=symmetric), BinaryCoding(bits)
    parameters = UniformPlanes(inner=inner, symmetric=symmetric).fit(values, binary)
    expected = uniform.decode(
        (torch.arange(2**bits) + uniform.code_range[0]).expand(8, 4, -1), inner.fit(values, uniform)
    )
    decoded = binary.decode(torch.arange(2**bits).to(torch.uint8).expand(8, 4, -1), parameters)
    # float16 scales times powers of two, and an offset of at most eight bits more, are exact in float32
    assert torch.equal(decoded, expected)


def test_planes_that_coincide_share_their_scale() -> None:
    values = torch.tensor([[[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0]]])
    for offset in (True, False):
        decoded = BinaryCoding(3).fake_quantize(
            values, Alternating(rounds=6, offset=offset).fit(values, BinaryCoding(3))
        )
        torch.testing.assert_close(decoded, values, rtol=1e-3, atol=1e-3)


def test_shapes_dtypes_and_zero_groups(generator: torch.Generator) -> None:
    values = make(generator)
    values[2, 1] = 0
    parameters = Alternating(rounds=2).fit(values, BinaryCoding(3))
    assert parameters["alpha"].shape == (8, 4, 3)
    assert parameters["offset"].shape == (8, 4)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float16}
    assert set(Alternating(offset=False).fit(values, BinaryCoding(3))) == {"alpha"}
    decoded = BinaryCoding(3).fake_quantize(values, Alternating(offset=False).fit(values, BinaryCoding(3)))
    assert not decoded[2, 1].any()


def test_importance_moves_the_scales(generator: torch.Generator) -> None:
    values = make(generator)
    importance = torch.rand(values.shape, generator=generator).pow(-1.5)
    weighted = error(values, BinaryCoding(3), Alternating(), importance).sum()
    rule = Alternating(weighted=False)
    assert weighted < 0.9 * error(values, BinaryCoding(3), rule, importance).sum()


def test_refusals(generator: torch.Generator) -> None:
    for rule in (Alternating(), UniformPlanes()):
        with pytest.raises(UnsupportedError, match=r"use BinaryCoding\(bits\)"):
            rule.check(Codebook(4))
    with pytest.raises(InputError, match="bits=1"):
        UniformPlanes().check(BinaryCoding(1))
    with pytest.raises(UnsupportedError, match='use scale_dtype="float32"'):
        Alternating(rounds=1).fit(make(generator) * 1e6, BinaryCoding(2))
    for wrong in ({"rounds": -1}, {"rounds": -7}):
        with pytest.raises(InputError, match="do not describe an alternation"):
            Alternating(**wrong)
