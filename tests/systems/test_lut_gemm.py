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
from quattuor.scales import AbsMax, Alternating, ClipSearch, UniformPlanes
from quattuor.solvers import GPTQ, WeightQuantizer, WeightToQuantize
from quattuor.systems import lut_gemm, rtn

TOKENS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(3))


def test_defaults() -> None:
    weights = lut_gemm().weights
    assert weights is not None
    assert weights.number_format == BinaryCoding(4)
    assert weights.granularity == PerGroup(128)
    assert weights.scales == Alternating(rounds=15, offset=True)
    assert weights.needs == frozenset()
    assert lut_gemm(1, None).weights.granularity == PerChannel()
    assert lut_gemm(uniform=True).weights.scales == UniformPlanes()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_below_rounding_at_the_same_bits_and_groups(bits: int, generator: torch.Generator) -> None:
    item = WeightToQuantize(name="linear", weight=torch.randn(24, 128, generator=generator))
    binary = lut_gemm(bits, 32).weights.solve([item], {})[0]
    uniform = lut_gemm(bits, 32, uniform=True).weights.solve([item], {})[0]
    plain = rtn(bits, 32).weights.solve([item], {})[0]
    assert binary.error < 0.8 * plain.error
    # rtn rounds its scale to float16, the conversion keeps float32
    assert uniform.error == pytest.approx(plain.error, rel=1e-2)
    assert binary.tensor.bits_per_weight == bits + 16 * (bits + 1) / 32


def test_codes_of_gptq_as_planes(generator: torch.Generator) -> None:
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    statistics = {"hessian": x.T @ x / 400}
    item = WeightToQuantize(name="linear", weight=torch.randn(16, 64, generator=generator))
    inner = ClipSearch(num_steps=10, smallest=0.5)
    integer = WeightQuantizer(
        number_format=Integer(3), granularity=PerGroup(32), scales=inner, solver=GPTQ()
    ).solve([item], statistics)[0]
    planes = WeightQuantizer(
        number_format=BinaryCoding(3), granularity=PerGroup(32), scales=UniformPlanes(inner=inner), solver=GPTQ()
    ).solve([item], statistics)[0]
    # Sums of planes and products with codes may differ in the last bit, so a near-tie may fall the other way once.
    same = planes.tensor.codes.int() == integer.tensor.codes.int() + 4
    assert same.float().mean() > 0.99
    assert planes.error == pytest.approx(integer.error, rel=1e-2)


def test_gptq_chooses_better_signs_than_nearest(generator: torch.Generator) -> None:
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    statistics = {"hessian": x.T @ x / 400}
    item = WeightToQuantize(name="linear", weight=torch.randn(16, 64, generator=generator))
    weights = lut_gemm(3, 32).weights
    fed_back = dataclasses.replace(weights, solver=GPTQ()).solve([item], statistics)[0]
    nearest = weights.solve([item], statistics)[0].tensor.decode() - item.weight
    energy = ((nearest @ statistics["hessian"]) * nearest).sum()
    total = ((item.weight @ statistics["hessian"]) * item.weight).sum()
    assert fed_back.error < 0.7 * float(energy / total)


@pytest.mark.parametrize(
    "options",
    [{"bits": 3, "group_size": 32}, {"bits": 1, "group_size": None}, {"offset": False, "group_size": 32}],
)
def test_model_comes_back_bit_for_bit(options: dict[str, object], tmp_path: Path) -> None:
    model, recipe = tiny_model("llama").float(), lut_gemm(**{"rounds": 2, **options})
    report = quantize(model, recipe, None)
    assert report.num_tokens == 0
    with torch.no_grad():
        before = model(TOKENS).logits
        save_pretrained(model, tmp_path / "out", recipe=recipe)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits, before)


def test_uniform_is_the_model_of_rtn() -> None:
    converted, plain = tiny_model("llama").float(), tiny_model("llama").float()
    quantize(converted, lut_gemm(4, 32, uniform=True), None)
    recipe = rtn(4, 32)
    weights = dataclasses.replace(recipe.weights, scales=AbsMax())
    quantize(plain, dataclasses.replace(recipe, weights=weights), None)
    with torch.no_grad():
        torch.testing.assert_close(converted(TOKENS).logits, plain(TOKENS).logits, rtol=1e-3, atol=1e-3)
