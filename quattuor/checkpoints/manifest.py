# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself: the manifest for machines, the model card for people."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from quattuor.checkpoints.layouts import FORMAT_VERSION, stored_names
from quattuor.errors import CheckpointError, compose
from quattuor.nn.linear import QuantizedLinear
from quattuor.recipe import Recipe

__all__ = ["MANIFEST_NAME", "SIZE_FORMULA", "build_manifest", "model_card", "read_manifest"]

MANIFEST_NAME = "quattuor_manifest.json"
SIZE_FORMULA = (
    "N * ceil(K * bits / 8) + sum over parameters of R * (G or 1) * bytes(dtype); a bias and the rest as is"
)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    file = folder / MANIFEST_NAME
    problem = None
    if not file.is_file():
        problem = "is missing"
    else:
        try:
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            problem = f"is not valid JSON: {error}"
    if problem is not None:
        raise CheckpointError(
            compose(
                subject="manifest",
                value=MANIFEST_NAME,
                constraint=problem,
                place=str(folder),
                remedy="open a folder that quattuor wrote, whole",
            )
        )
    return data


def build_manifest(
    entries: Mapping[str, Mapping[str, Any]],
    linears: Mapping[str, QuantizedLinear],
    report: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Describe every tensor and every packed linear.

    Args:
        entries: File, SHA-256, shape, dtype and bytes of every stored tensor.
        linears: The packed linears, filled or not.
        report: Kept as it is; its rows "layers" with "name" and "error" give the errors of the linears.
    """
    errors = {row["name"]: row.get("error") for row in (report or {}).get("layers", ())}
    rows = []
    packed_bytes = num_weights = 0
    for name, linear in linears.items():
        nbytes = sum(entries[full]["bytes"] for full in stored_names(name, linear.layout))
        weights = linear.out_features * linear.in_features
        packed_bytes, num_weights = packed_bytes + nbytes, num_weights + weights
        rows.append(
            {
                "name": name,
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "format": str(linear.layout.number_format),
                "granularity": str(linear.layout.granularity),
                "activations": None if linear.layout.activations is None else str(linear.layout.activations),
                "bits_per_weight": 8 * nbytes / weights,
                "error": errors.get(name),
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "size_formula": SIZE_FORMULA,
        "totals": {
            "tensor_bytes": sum(entry["bytes"] for entry in entries.values()),
            "packed_bytes": packed_bytes,
            "quantized_weights": num_weights,
            "bits_per_weight": 8 * packed_bytes / num_weights if num_weights else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        "layers": rows,
        "report": dict(report or {}),
        "tensors": {name: dict(entry) for name, entry in entries.items()},
    }


def model_card(name: str, recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    """Return the README.md of a checkpoint."""
    totals = manifest["totals"]
    bits = totals["bits_per_weight"]
    system = " | ".join(recipe.systems) or "(unnamed)"
    formats = sorted({f"{row['format']}, {row['granularity']}" for row in manifest["layers"]})
    activations = sorted({row["activations"] or "not quantized" for row in manifest["layers"]})
    return f"""---
library_name: transformers
tags: [quattuor, quantized]
---

# {name}

Quantized with [Quattuor](https://github.com/quattuor/quattuor), system {system}.

**Import quattuor before loading.** Without the import, transformers does not know how to read the packed weights:
it prints a warning and fills the linears with random numbers.

```python
import quattuor  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| | |
| --- | --- |
| quantized linears | {len(manifest["layers"])} |
| weights | {"; ".join(formats)} |
| activations | {"; ".join(activations)} |
| measured bits per quantized weight | {"-" if bits is None else f"{bits:.4f}"} |
| bytes of all tensors | {totals["tensor_bytes"]} |

Check and evaluate it:

    quattuor verify {name}
    quattuor inspect {name}
    quattuor evaluate {name}

The recipe:

```json
{json.dumps(recipe.to_dict(), indent=2)}
```
"""
