# SPDX-License-Identifier: Apache-2.0
"""One model under one recipe: what is checked and fixed before the first block."""

from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from quattuor.apply import LinearChoice, check, choose, linear_names, planned
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.models import DecoderDescription, Heads, Site, describe, discover
from quattuor.nn.linear import QuantizedLinear
from quattuor.quantization_report import QuantizationReport
from quattuor.recipe import Recipe
from quattuor.rules import resolve_roles

__all__ = ["BlockStore", "InMemory", "Run", "choices_of", "compares", "embedding_of", "prepare"]


@runtime_checkable
class BlockStore(Protocol):
    """Where a model's parameters come from, and where finished modules go."""

    def load_(self, module: nn.Module, prefix: str) -> None:
        """Make the parameters of a module real."""

    def emit(self, module: nn.Module, prefix: str) -> None:
        """Take a finished module."""


class InMemory(BlockStore):
    """The model is in memory already and stays there."""

    def load_(self, module: nn.Module, prefix: str) -> None:
        """Nothing to load."""

    def emit(self, module: nn.Module, prefix: str) -> None:
        """Nothing to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One model under one recipe: everything that stays the same from block to block."""

    model: PreTrainedModel
    recipe: Recipe
    description: DecoderDescription
    heads: Heads | None
    activation: str
    sites: tuple[Site, ...]
    device: torch.device
    seed: int
    kernel: str | None
    report: QuantizationReport
    model_statistics: dict[str, dict[str, Tensor]]


def prepare(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Int64[Tensor, "B T"] | None,
    device: str | torch.device | None,
    seed: int,
    kernel: str | None,
) -> Run:
    """Describe the model, check the recipe and the data against it."""
    _refuse_quantized(model)
    config = model.config.to_dict()
    description = describe(model.config) if recipe.transforms else _describe_or_discover(model)
    activation = description.activation(config)
    recipe = replace(recipe, rules=resolve_roles(recipe.rules, description))
    check(recipe, description, model, config)
    recipe = planned(recipe, description, model, config)
    target = torch.device(device) if device is not None else embedding_of(model).weight.device
    return Run(
        model=model,
        recipe=recipe,
        description=description,
        heads=description.heads(config) if description.attention is not None else None,
        activation=activation,
        sites=description.sites(activation),
        device=torch.device("cpu") if target.type == "meta" else target,
        seed=seed,
        kernel=kernel,
        report=QuantizationReport(
            num_tokens=0 if tokens is None else tokens.numel(),
            blocks=len(list(model.get_submodule(description.blocks).children())),
        ),
        model_statistics={},
    )


def _refuse_quantized(model: PreTrainedModel) -> None:
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if packed:
        raise InputError(
            compose(
                subject="model",
                value=type(model).__name__,
                constraint=f"is quantized already: {packed[0]} and {len(packed) - 1} others are packed",
                place="quantize",
                remedy="start from the original model",
            )
        )


def _describe_or_discover(model: PreTrainedModel) -> DecoderDescription:
    """Use the written description where there is one; without transforms a discovered one serves as well."""
    try:
        return describe(model.config)
    except UnsupportedError:
        return discover(model)


def choices_of(run: Run) -> list[LinearChoice]:
    """Return what the recipe says about each linear that it quantizes."""
    names = linear_names(run.description, run.sites, run.report.blocks)
    return [choice for name in names if (choice := choose(run.recipe, name)) is not None]


def compares(run: Run) -> bool:
    """Whether a solver compares with the original model's activations, which then flow beside the others."""
    return any("cross" in choice.weights.needs for choice in choices_of(run))


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """Return the token embedding."""
    return cast(nn.Embedding, model.get_input_embeddings())
