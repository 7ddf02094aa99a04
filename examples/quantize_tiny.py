# SPDX-License-Identifier: Apache-2.0
"""Quantize a model with QQQ, save it, load it again and generate: the whole Python API on a tiny random Llama.

python examples/quantize_tiny.py [FOLDER]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import quattuor
from quattuor.systems import qqq

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
)


def main(folder: Path) -> None:
    """Quantize into `folder`, which must not exist."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    tokens = torch.randint(CONFIG.vocab_size, (32, 64))  # a real model is calibrated on text, see README.md

    recipe = qqq(group_size=32)
    report = quattuor.quantize(model, recipe, tokens)
    for layer in report.layers[:7]:
        print(f"{layer.name:40} {layer.bits_per_weight:.2f} bits per weight, relative error {layer.error:.1e}")

    quattuor.save_pretrained(model, folder, recipe=recipe, report=report.to_dict())
    checked = quattuor.verify(folder)
    print(f"{len(checked)} tensors verified in {folder}")

    reloaded = AutoModelForCausalLM.from_pretrained(folder)  # works because quattuor is imported
    prompt = tokens[:1, :8]
    assert torch.equal(reloaded(prompt).logits, model(prompt).logits), "a reloaded model has the same bits"
    print("continues", reloaded.generate(prompt, max_new_tokens=8, do_sample=False)[0, 8:].tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/tiny"))
