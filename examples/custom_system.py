# SPDX-License-Identifier: Apache-2.0
"""Write a system of your own: one function that chooses a part for each axis and returns a recipe.

python examples/custom_system.py
"""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import quattuor
from quattuor import Recipe, Rule
from quattuor.formats import Integer
from quattuor.granularity import PerGroup
from quattuor.scales import ClipSearch
from quattuor.solvers import GPTQ, CoordinateDescent, WeightQuantizer
from quattuor.systems import rtn
from quattuor.transforms import MigrateScale


def three_bits(group_size: int = 32) -> Recipe:
    """Three bits with a zero point, improved by coordinate descent; `down_proj` keeps four."""

    def weights(bits: int) -> WeightQuantizer:
        return WeightQuantizer(
            number_format=Integer(bits, symmetric=False),
            granularity=PerGroup(group_size),
            scales=ClipSearch(scale_dtype="float16"),
            solver=CoordinateDescent(start=GPTQ(damping=0.02)),
        )

    return Recipe(
        systems=("three_bits",),
        transforms=(MigrateScale(alpha=0.5),),
        weights=weights(3),
        rules=(Rule(pattern="*.down_proj", weights=weights(4)),),
    )


def main() -> None:
    """Compare it with plain rounding to the same bits, by the change of the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    original = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(config.vocab_size, (32, 64))
    for recipe in (rtn(3, 32, symmetric=False), three_bits()):
        model = copy.deepcopy(original)
        report = quattuor.quantize(model, recipe, tokens)
        change = (model(tokens[:4]).logits - original(tokens[:4]).logits).square().mean().sqrt()
        bits = sum(layer.bits_per_weight for layer in report.layers) / len(report.layers)
        print(f"{recipe.systems[0]:10} {bits:.2f} bits per weight, logits changed by {change:.4f}")


if __name__ == "__main__":
    main()
