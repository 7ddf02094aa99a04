# SPDX-License-Identifier: Apache-2.0
"""LUT-GEMM: its parts, binary coding of other solvers' codes, and a model that is stored and read bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from quattuor.checkpoints import save_pretrained
from quattuor.formats import BinaryCoding, Integer
from quattuor.granularity import PerChannel, PerGroup
from quattuor.quantize import quantize
from quattuor.recipe import Recipe
from quattuor.scales import AbsMax, Alternating, UniformPlanes
from quattuor.solvers import GPTQ, Nearest, WeightQuantizer, WeightToQuantize, hessian_error
from quattuor.systems import gptq, lut_gemm, rtn

TOKENS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(3))


def test_defaults() -> None:
    weights = lut_gemm().weights
    assert weights is not None
    assert weights.number_format == BinaryCoding(4)
    assert weights.granularity == PerGroup(128)
    assert weights.scales == Alternating(rounds=15, offset=True)
    assert weights.solver == GPTQ()
    assert lut_gemm().sequential
    assert lut_gemm(rounding="weighted").weights.solver == Nearest(weighted=True)
    without_data = lut_gemm(rounding="nearest")
    assert without_data.weights.needs == frozenset()
    assert not without_data.sequential
    assert lut_gemm(1, None).weights.granularity == PerChannel()
    assert lut_gemm(uniform=True).weights.scales == UniformPlanes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_below_rounding_at_the_same_bits_and_groups(bits: int, generator: torch.Generator) -> None:
    item = WeightToQuantize(name="linear", weight=torch.randn(24, 128, generator=generator))
    binary = lut_gemm(bits, 32, rounding="nearest").weights.solve([item], {})[0]
    uniform = lut_gemm(bits, 32, uniform=True, rounding="nearest").weights.solve([item], {})[0]
    plain = rtn(bits, 32).weights.solve([item], {})[0]
    assert binary.error < 0.8 * plain.error
    # rtn rounds its scale to float16, the conversion keeps float32
    assert uniform.error == pytest.approx(plain.error, rel=1e-2)
    assert binary.tensor.bits_per_weight == bits + 16 * (bits + 1) / 32


@pytest.fixture
def salient(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of inputs of which a few are large, as in a language model.

    The columns that read those inputs hold the large weights, and errors there cost most.
    """
    weight = torch.randn(24, 128, generator=generator)
    x = torch.randn(600, 128, generator=generator) @ torch.eye(128).add(
        torch.randn(128, 128, generator=generator), alpha=0.03
    )
    weight[:, ::17] *= 3
    x[:, ::17] *= 12
    return weight, x.T @ x / 600


def errors_of(weight: torch.Tensor, hessian: torch.Tensor, **recipes: Recipe) -> dict[str, float]:
    """Return the relative output error of each recipe."""
    item = WeightToQuantize(name="linear", weight=weight)
    solved = {name: recipe.weights.solve([item], {"hessian": hessian})[0] for name, recipe in recipes.items()}
    return {name: hessian_error(weight, one.tensor.decode(), hessian) for name, one in solved.items()}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_planes_beat_the_uniform_grid_at_no_more_bits(
    bits: int, salient: tuple[torch.Tensor, torch.Tensor]
) -> None:
    # The paper's claim, where it holds: the scales of the planes are free, those of a grid are powers of two.
    weight, hessian = salient
    errors = errors_of(
        weight,
        hessian,
        planes=lut_gemm(bits, 64),
        feedback=gptq(bits, 16),
        rounding=rtn(bits, 16, symmetric=False),
    )
    bits_of_planes = bits + 16 * (bits + 1) / 64
    assert bits_of_planes <= bits + (16 + 8) / 16
    assert errors["planes"] < 0.9 * errors["feedback"]
    assert errors["planes"] < 0.5 * errors["rounding"]


def test_why_alternation_needs_the_importance(salient: tuple[torch.Tensor, torch.Tensor]) -> None:
    # It clips the rare large weights for the many small ones, and here the large ones matter.
    weight, hessian = salient
    planes = {name: lut_gemm(3, 64, rounding=name) for name in ("nearest", "weighted", "feedback")}
    errors = errors_of(weight, hessian, **planes, rounding=rtn(3, 64, symmetric=False))
    plain = errors_of(weight, torch.eye(128), planes=planes["nearest"], rounding=rtn(3, 64, symmetric=False))
    assert plain["planes"] < 0.8 * plain["rounding"]
    assert errors["nearest"] > errors["rounding"]
    assert errors["weighted"] < 0.7 * errors["rounding"]
    assert errors["feedback"] < 0.9 * errors["weighted"]


def test_converted_grid_with_feedback_has_the_codes_of_gptq(salient: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, hessian = salient
    item = WeightToQuantize(name="linear", weight=weight)
    planes = lut_gemm(3, 32, uniform=True).weights.solve([item], {"hessian": hessian})[0]
    integer = WeightQuantizer(
        number_format=Integer(3), granularity=PerGroup(32), scales=AbsMax(), solver=GPTQ()
    ).solve([item], {"hessian": hessian})[0]
    # Sums of planes and products with codes may differ in the last bit, so a near-tie may fall the other way once.
    same = planes.tensor.codes.int() == integer.tensor.codes.int() + 4
    assert same.float().mean() > 0.99
    assert planes.error == pytest.approx(integer.error, rel=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group_size": 32, "rounding": "nearest"},
        {"bits": 1, "group_size": None, "rounding": "weighted"},
        {"offset": False, "group_size": 32},
    ],
)
def test_model_comes_back_bit_for_bit(options: dict[str, object], tmp_path: Path) -> None:
    model, recipe = tiny_model("llama").float(), lut_gemm(**{"rounds": 2, **options})
    quantize(model, recipe, None if options.get("rounding") == "nearest" else TOKENS)
    with torch.no_grad():
        before = model(TOKENS).logits
        save_pretrained(model, tmp_path / "out", recipe=recipe)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, before)


def test_uniform_is_the_model_of_rtn() -> None:
    converted, plain = tiny_model("llama").float(), tiny_model("llama").float()
    quantize(converted, lut_gemm(4, 32, uniform=True, rounding="nearest"), None)
    recipe = rtn(4, 32)
    weights = dataclasses.replace(recipe.weights, scales=AbsMax())
    quantize(plain, dataclasses.replace(recipe, weights=weights), None)
    with torch.no_grad():
        torch.testing.assert_close(converted(TOKENS).logits, plain(TOKENS).logits, rtol=1e-3, atol=1e-3)
