# SPDX-License-Identifier: Apache-2.0
"""Load a packed folder and ask which kernel computes its layers, and why not another one.

python examples/load_and_explain.py FOLDER
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import quattuor
from quattuor.nn import QuantizedLinear


def main(folder: str) -> None:
    """Print what is stored and what runs, then force the reference kernel and compare."""
    for row in quattuor.inspect(folder)[:3]:
        print(f"{row.name}: {row.format} {row.granularity}, {row.bits_per_weight:.2f} bits per weight")

    model = AutoModelForCausalLM.from_pretrained(folder)  # needs the line `import quattuor` above
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    name, linear = next(iter(linears.items()))
    print(f"{name} on {linear.packed.device}")
    for row in linear.explain():
        print(f"{row.tokens:>8} tokens  {'->' if row.is_chosen else '  '} {row.implementation:10} {row.reason}")

    prompt = torch.arange(8).unsqueeze(0)
    chosen = model(prompt).logits
    for module in linears.values():
        module.use_kernel("reference")
    print("equal to the reference kernel:", torch.equal(model(prompt).logits, chosen))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
