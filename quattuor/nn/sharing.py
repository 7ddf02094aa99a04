# SPDX-License-Identifier: Apache-2.0
"""Finds the packed linears of a model that read one activation, and joins their products."""

from torch import nn
from transformers import PreTrainedModel

from quattuor.models import DESCRIPTIONS
from quattuor.nn.linear import QuantizedLinear
from quattuor.nn.shared_product import SharedProduct, reason_against_sharing

__all__ = ["share_inputs"]


def share_inputs(model: PreTrainedModel) -> dict[str, str | None]:
    """Join query, key and value, and gate and up, of every decoder block, where that changes no bit.

    A token is then quantized once for all of them, and four products are left of the seven of a block. Modules,
    state and checkpoints stay as they are. Joining twice changes nothing.

    Args:
        model: A model with packed linears; changed in place.

    Returns:
        For each activation that several linears read, by the path of its block and its name, None or the reason
        why they stay apart. Empty for an architecture without a description: what its linears read is unknown.
    """
    description = DESCRIPTIONS.get(getattr(model.config, "model_type", ""))
    if description is None:
        return {}
    found: dict[str, str | None] = {}
    for index, block in enumerate(model.get_submodule(description.blocks).children()):
        for site in description.sites():
            if len(site.consumers) > 1:
                linears = [block.get_submodule(path) for path in site.consumers]
                found[f"{description.blocks}.{index}.{site.name}"] = _join(linears)
    return found


def _join(linears: list[nn.Module]) -> str | None:
    """Join linears, or return why not."""
    packed = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(packed) < len(linears):
        return "not all of them are packed"
    reason = reason_against_sharing(packed)
    if reason is None:
        sources = {id(linear.shared) for linear in packed}
        if packed[0].shared is None or len(sources) > 1:
            SharedProduct(packed)
    return reason
