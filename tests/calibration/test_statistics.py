# SPDX-License-Identifier: Apache-2.0
"""Statistics against float64 definitions; how tokens are cut into batches does not matter."""

import pytest
import torch
from torch import Tensor

from quattuor.calibration.statistics import STATISTICS, AbsMax, Cross, Hessian, Statistic, make_statistics
from quattuor.errors import CalibrationError, InputError

SPLITS = [(60,), (1, 59), (20, 20, 20), (7, 0, 13, 40), (1,) * 60]


@pytest.fixture
def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what a layer sees and what it saw originally, with channels of different size."""
    x = torch.randn(60, 9, generator=generator) * torch.logspace(-2, 2, 9)
    return x, x + 0.3 * torch.randn(60, 9, generator=generator)


def collect(statistic: Statistic, tokens: tuple[Tensor, Tensor], split: tuple[int, ...]) -> Tensor:
    for x, original in zip(tokens[0].split(split), tokens[1].split(split), strict=True):
        statistic.update(x, original)
    return statistic.result()


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_hessian_is_the_mean_outer_product(tokens: tuple[Tensor, Tensor], split: tuple[int, ...]) -> None:
    hessian = collect(Hessian(), tokens, split)
    expected = sum(torch.outer(x, x) for x in tokens[0].double()) / 60
    assert hessian.dtype == torch.float32
    # Rounding of a float32 sum of 60 terms, relative to the largest possible entry.
    size = expected.diagonal().sqrt()
    assert ((hessian - expected).abs() <= 1e-6 * torch.outer(size, size)).all()
    assert not torch.allclose(hessian, 2 * expected.float())


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_cross_is_original_times_seen(tokens: tuple[Tensor, Tensor], split: tuple[int, ...]) -> None:
    cross = collect(Cross(), tokens, split)
    expected = (
        sum(torch.outer(original, x) for x, original in zip(*(t.double() for t in tokens), strict=True)) / 60
    )
    assert torch.allclose(cross.double(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cross.double(), expected.T, rtol=1e-2), "the orientation matters"


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_abs_max(tokens: tuple[Tensor, Tensor], split: tuple[int, ...]) -> None:
    largest = collect(AbsMax(), tokens, split)
    assert largest.tolist() == [max(abs(value) for value in channel) for channel in tokens[0].T.tolist()]


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_inputs_are_accumulated_in_float32(
    name: str, dtype: torch.dtype, tokens: tuple[Tensor, Tensor]
) -> None:
    rounded = (tokens[0].to(dtype), tokens[1].to(dtype))
    first = collect(STATISTICS[name](), rounded, (20, 40))
    second = collect(STATISTICS[name](), (rounded[0].float(), rounded[1].float()), (20, 40))
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_lose_nothing_of_a_half_precision_hessian(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = (torch.randn(4096, 192, generator=generator) * torch.logspace(-1, 1, 192)).to(dtype)
    hessian = collect(Hessian(), (x.cuda(), x.cuda()), (1024, 3072)).cpu()
    expected = x.double().T @ x.double() / len(x)
    size = expected.diagonal().sqrt()
    assert hessian.dtype == torch.float32
    assert ((hessian - expected).abs() <= 1e-5 * torch.outer(size, size)).all()


@pytest.mark.parametrize("name", STATISTICS)
def test_input_is_left_alone(name: str, tokens: tuple[Tensor, Tensor]) -> None:
    kept = tuple(tensor.clone() for tensor in tokens)
    statistic = STATISTICS[name]()
    collect(statistic, tokens, (30, 30))
    before = statistic.result().clone()
    assert all(torch.equal(*pair) for pair in zip(tokens, kept, strict=True))
    tokens[0].zero_()
    assert torch.equal(statistic.result(), before), "a result does not look back at the tokens"


@pytest.mark.parametrize("name", STATISTICS)
def test_no_tokens(name: str) -> None:
    for batches in ([], [torch.empty(0, 4)]):
        statistic = STATISTICS[name]()
        for batch in batches:
            statistic.update(batch, batch)
        with pytest.raises(CalibrationError, match=r"tokens=0 reached this layer; calibrate with data"):
            statistic.result()


def test_make_statistics() -> None:
    made = make_statistics(frozenset({"abs_max", "hessian"}))
    assert list(made) == ["abs_max", "hessian"]
    assert isinstance(made["hessian"], Hessian)
    assert made["hessian"] is not make_statistics(frozenset({"hessian"}))["hessian"]
    with pytest.raises(InputError, match=r"statistic=fisher does not exist; use one of hessian, abs_max"):
        make_statistics(frozenset({"fisher"}))


@pytest.mark.parametrize("num_tokens", [1, 511, 512, 513, 1023, 1024, 5000])
@pytest.mark.parametrize("batch", [1, 7, 600, 10000])
def test_sample_is_spread_evenly_and_does_not_depend_on_batches(num_tokens: int, batch: int) -> None:
    if num_tokens / batch > 600:
        pytest.skip("thousands of updates of one token say nothing more")
    tokens = torch.arange(num_tokens, dtype=torch.float32)[:, None].expand(-1, 3)
    statistic = STATISTICS["inputs"]()
    for part in tokens.split(batch):
        statistic.update(part)
    kept = statistic.result()[:, 0]
    assert len(kept) == min(num_tokens, 512)
    assert kept[0] == 0
    distances = kept.diff()
    assert (distances >= 1).all()
    if num_tokens > 512:
        assert distances.max() <= 4 * distances.min()
        assert kept[-1] > num_tokens * (1 - 2 / 512) - 16
