# SPDX-License-Identifier: Apache-2.0
"""Places a recipe's parts in a model; the only file that swaps modules."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from quattuor.activations import ActivationQuantizer
from quattuor.errors import InputError, UnsupportedError, compose
from quattuor.folding import linear_at
from quattuor.models import DecoderDescription, Site, SiteKind
from quattuor.nn.execution import reason_against_execution
from quattuor.nn.linear import QuantizedLinear
from quattuor.recipe import Recipe
from quattuor.rules import check_all_rules_match, match
from quattuor.solvers import Solution, WeightQuantizer
from quattuor.transforms import FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.base import SiteTransform

__all__ = ["LinearChoice", "check", "choose", "linear_names", "place_", "planned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """What a recipe says about one linear."""

    weights: WeightQuantizer
    activations: ActivationQuantizer | None


def choose(recipe: Recipe, name: str) -> LinearChoice | None:
    """Return how a linear is quantized, or None when it stays in high precision."""
    rule = match(name, recipe.rules)
    if rule is not None and rule.skip:
        return None
    weights = rule.weights if rule is not None and rule.weights is not None else recipe.weights
    activations = recipe.activations
    if rule is not None and rule.activations is not None:
        activations = rule.activations
    return None if weights is None else LinearChoice(weights=weights, activations=activations)


def linear_names(description: DecoderDescription, sites: tuple[Site, ...], num_blocks: int) -> Iterator[str]:
    """Yield the full names of all linears inside the decoder blocks."""
    for index in range(num_blocks):
        for site in sites:
            for path in site.consumers:
                yield f"{description.blocks}.{index}.{path}"


def planned(recipe: Recipe, description: DecoderDescription, model: nn.Module, config: dict[str, Any]) -> Recipe:
    """Return the recipe with the budgets of outliers shared out among the linears that each applies to."""
    blocks = list(model.get_submodule(description.blocks).children())
    shapes: dict[WeightQuantizer, list[tuple[int, int]]] = {}
    for name in linear_names(description, description.sites(description.activation(config)), len(blocks)):
        choice, linear = choose(recipe, name), linear_at(model, name)
        if choice is not None and choice.weights.outliers is not None:
            shapes.setdefault(choice.weights, []).append((linear.out_features, linear.in_features))

    def plan(weights: WeightQuantizer | None) -> WeightQuantizer | None:
        if weights is None or weights.outliers is None or weights not in shapes:
            return weights
        return replace(weights, outliers=weights.outliers.planned(shapes[weights], weights.number_format.bits))

    rules = tuple(replace(rule, weights=plan(rule.weights)) for rule in recipe.rules)
    return replace(recipe, weights=plan(recipe.weights), rules=rules)


def check(recipe: Recipe, description: DecoderDescription, model: nn.Module, config: dict[str, Any]) -> None:
    """Raise before any work when the recipe does not fit the model.

    Raises:
        InputError: A group size does not divide a layer, or a rule matches nothing.
        UnsupportedError: A transform is not legal for this architecture.
    """
    sites = description.sites(description.activation(config))
    blocks = list(model.get_submodule(description.blocks).children())
    names = list(linear_names(description, sites, len(blocks)))
    check_all_rules_match(names, recipe.rules)
    for name in names:
        choice, linear = choose(recipe, name), linear_at(model, name)
        if choice is None:
            continue
        try:
            choice.weights.granularity.num_groups(linear.in_features)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    _check_execution(recipe, names)
    _check_solvers(recipe, names)
    _check_gradients(recipe, names)
    for transform in recipe.transforms:
        if isinstance(transform, SiteTransform):
            _check_sites(transform, sites, description)
        elif isinstance(transform, RotateResidual):
            _check_residual_rotation(transform, recipe, description)
        elif isinstance(transform, RotateHeads) and description.attention is None:
            raise _illegal(transform, description, "needs an attention whose linears are described")


def place_(
    block: nn.Module,
    path: str,
    solution: Solution,
    activations: ActivationQuantizer | None,
    *,
    name: str,
) -> QuantizedLinear:
    """Replace a linear of a block by its packed form and return the new module."""
    linear = linear_at(block, path)
    module = QuantizedLinear.from_tensor(
        solution.tensor, linear.bias, activations, dtype=linear.weight.dtype, name=name
    )
    parent, _, attribute = path.rpartition(".")
    setattr(block.get_submodule(parent), attribute, module)
    return module


def _check_execution(recipe: Recipe, names: list[str]) -> None:
    for name in names:
        choice = choose(recipe, name)
        if choice is None:
            continue
        weights = choice.weights
        reason = reason_against_execution(weights.number_format, weights.granularity, choice.activations)
        if reason is not None:
            raise UnsupportedError(
                compose(
                    subject="weights",
                    value=f"{weights.number_format} {weights.granularity}",
                    constraint="have no kernel with these activations",
                    place=name,
                    remedy=reason,
                )
            )


def _check_solvers(recipe: Recipe, names: list[str]) -> None:
    for name in names:
        choice = choose(recipe, name)
        if choice is not None and "cross" in choice.weights.needs and not recipe.sequential:
            raise InputError(
                compose(
                    subject="sequential",
                    value=False,
                    constraint="would correct the same drift again at every site of a block",
                    place=f"Recipe, {name}",
                    remedy="set sequential=True, or leave TargetCorrection out",
                )
            )


def _check_gradients(recipe: Recipe, names: list[str]) -> None:
    """Refuse gradients of weights that are changed before they are solved."""
    for name in names:
        choice = choose(recipe, name)
        if choice is None or "fisher" not in choice.weights.needs:
            continue
        changes = [*recipe.transforms, *([] if choice.weights.transform is None else [choice.weights.transform])]
        if changes:
            raise UnsupportedError(
                compose(
                    subject="transform",
                    value=changes[0],
                    constraint="changes the weights whose squared gradients are collected before",
                    place=f"Recipe, {name}",
                    remedy="leave the transforms out, or weight by the Hessian instead of the Fisher information",
                )
            )


def _check_sites(transform: SiteTransform, sites: tuple[Site, ...], description: DecoderDescription) -> None:
    foldable = {site.name for site in sites if site.kind is not SiteKind.OPAQUE}
    for name in transform.sites:
        if name not in foldable:
            raise _illegal(
                transform,
                description,
                f"has no place at site {name!r} (this architecture allows {sorted(foldable)})",
            )


def _check_residual_rotation(transform: RotateResidual, recipe: Recipe, description: DecoderDescription) -> None:
    keeps_mean = bool(transform.for_norm(description.norm).keep_mean)
    reason = description.reason_against_residual_rotation(keeps_mean=keeps_mean)
    if reason is not None:
        raise _illegal(transform, description, reason)
    position = recipe.transforms.index(transform)
    if not any(isinstance(before, FoldNorms) for before in recipe.transforms[:position]):
        raise _illegal(transform, description, "needs FoldNorms() before it, because gains do not commute with it")


def _illegal(transform: object, description: DecoderDescription, reason: str) -> UnsupportedError:
    return UnsupportedError(
        compose(
            subject="transform",
            value=transform,
            constraint=reason,
            place=description.family,
            remedy="leave it out of Recipe.transforms (qqq: rotation=False), or quantize without transforms",
        )
    )
