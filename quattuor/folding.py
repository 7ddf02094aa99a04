# SPDX-License-Identifier: Apache-2.0
"""The module side of transforms: absorbs into a model's weights what the transforms found.

Every function changes parameters in place, computes in float64 and rounds once to the parameter's dtype. A model
computes the same function before and after a complete set of folds.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from quattuor.errors import UnsupportedError, compose
from quattuor.models.description import DecoderDescription, Heads, Site, SiteKind
from quattuor.transforms.rotation import (
    fold_gain,
    fold_norm_bias,
    rotate_embedding,
    rotate_heads_input,
    rotate_heads_output,
    rotate_input,
    rotate_output,
)

__all__ = [
    "fold_block_norms_",
    "fold_final_norm_",
    "fold_scale_",
    "linear_at",
    "rotate_block_heads_",
    "rotate_block_residual_",
    "rotate_ends_",
    "untie_head_",
]


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    """Return the linear at a path that a description names."""
    return cast(nn.Linear, block.get_submodule(path))


def untie_head_(model: Any) -> None:
    """Give the head its own copy of a weight it shares with the embedding, and say so in the configuration."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.data_ptr() == embedding.weight.data_ptr():  # one parameter, or two that share storage
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    if hasattr(model, "_tied_weights_keys"):
        model._tied_weights_keys = None


def fold_block_norms_(block: nn.Module, description: DecoderDescription, sites: tuple[Site, ...]) -> None:
    """Move the gains and biases of a block's norms into the linears that read them."""
    for site in sites:
        if site.kind is SiteKind.NORM_LINEAR and site.producer is not None:
            consumers = [linear_at(block, path) for path in site.consumers]
            _fold_norm_(block.get_submodule(site.producer), consumers, description.gain_offset)


def fold_final_norm_(model: nn.Module, description: DecoderDescription) -> None:
    """Move the gain of the final norm into the head, which must be untied."""
    if description.final_norm is not None:
        head = linear_at(model, description.head)
        _fold_norm_(model.get_submodule(description.final_norm), [head], description.gain_offset)


def rotate_ends_(model: nn.Module, description: DecoderDescription, rotation: Float[Tensor, "K K"]) -> None:
    """Rotate what writes the residual stream before the first block and reads it after the last."""
    for path in description.embeddings:
        embedding = cast(nn.Embedding, model.get_submodule(path))
        _set_(embedding, "weight", rotate_embedding(embedding.weight, rotation))
    head = linear_at(model, description.head)
    _set_(head, "weight", rotate_input(head.weight, rotation))
    if description.final_norm is not None:
        _rotate_norm_bias_(model.get_submodule(description.final_norm), rotation)


def rotate_block_residual_(block: nn.Module, sites: tuple[Site, ...], rotation: Float[Tensor, "K K"]) -> None:
    """Rotate what reads the residual stream through a norm, and what writes it: output and down projections."""
    for site in sites:
        if site.kind is SiteKind.NORM_LINEAR and site.producer is not None:
            _rotate_norm_bias_(block.get_submodule(site.producer), rotation)
        for path in site.consumers:
            linear = linear_at(block, path)
            if site.kind is SiteKind.NORM_LINEAR:
                _set_(linear, "weight", rotate_input(linear.weight, rotation))
                continue
            weight, bias = rotate_output(linear.weight, linear.bias, rotation)
            _set_(linear, "weight", weight)
            if bias is not None:
                _set_(linear, "bias", bias)


def rotate_block_heads_(
    block: nn.Module, description: DecoderDescription, heads: Heads, rotation: Float[Tensor, "D D"]
) -> None:
    """Rotate each value head and take it back in the output projection."""
    attention = description.attention
    assert attention is not None, "legality was checked: head rotations need a described attention"
    value, output = linear_at(block, attention.value), linear_at(block, attention.output)
    rows = attention.rows("value", heads)
    bias: Tensor | None = None if value.bias is None else value.bias[rows]
    weight, bias = rotate_heads_output(value.weight[rows], bias, rotation, heads.num_kv_heads)
    _set_rows_(value, "weight", rows, weight)
    if bias is not None:
        _set_rows_(value, "bias", rows, bias)
    _set_(output, "weight", rotate_heads_input(output.weight, rotation, heads.num_heads))


def fold_scale_(
    block: nn.Module,
    description: DecoderDescription,
    heads: Heads,
    site: Site,
    scale: Float[Tensor, " K"],
) -> None:
    """Divide the activation of a site by `scale` and multiply its consumers' columns.

    At a VALUE_OUTPUT site the factors of query heads that share a kv head must be equal.
    """
    if site.producer is None:
        raise UnsupportedError(
            compose(
                subject="site",
                value=site.name,
                constraint=f"is {site.kind.value}: nothing before it can take a scale",
                place=description.family,
                remedy="leave this site out of the transform's sites",
            )
        )
    scale = scale.double()
    producer: Any = block.get_submodule(site.producer)
    if site.kind is SiteKind.NORM_LINEAR:
        offset = description.gain_offset
        scale_K = scale.to(producer.weight.device)
        _set_(producer, "weight", (producer.weight.double() + offset) / scale_K - offset)
        if getattr(producer, "bias", None) is not None:
            _set_(producer, "bias", producer.bias.double() / scale_K)
    else:
        rows, factors = _producer_rows(description, heads, site, producer, scale)
        factors = factors.to(producer.weight.device)
        _set_rows_(producer, "weight", rows, producer.weight[rows].double() / factors[:, None])
        if producer.bias is not None:
            _set_rows_(producer, "bias", rows, producer.bias[rows].double() / factors)
    for path in site.consumers:
        linear = linear_at(block, path)
        _set_(linear, "weight", linear.weight.double() * scale.to(linear.weight.device))


def _producer_rows(
    description: DecoderDescription, heads: Heads, site: Site, producer: nn.Module, scale: Tensor
) -> tuple[slice, Tensor]:
    """Return the rows of a linear that produce a site's activation, and the divisor of each."""
    if site.kind is SiteKind.VALUE_OUTPUT:
        assert description.attention is not None, "a VALUE_OUTPUT site has a described attention"
        per_head = scale.view(heads.num_kv_heads, -1, heads.head_dim)
        assert bool((per_head == per_head[:, :1]).all()), "factors of query heads that share a kv head differ"
        return description.attention.rows("value", heads), per_head[:, 0].reshape(-1)
    assert description.mlp is not None, "a feed-forward site has a described feed-forward"
    return description.mlp.rows("up", scale.numel()), scale


def _fold_norm_(norm: Any, consumers: list[nn.Linear], gain_offset: float) -> None:
    """consumer.weight *= gain, consumer.bias += weight @ norm.bias; the norm keeps gain 1.

    A consumer without a bias cannot take the norm's bias: it stays in the norm, divided by the gain, so that the
    consumer's new columns multiply it back.
    """
    gain: Tensor = norm.weight.double() + gain_offset
    bias = getattr(norm, "bias", None)
    keeps_bias = bias is not None and any(linear.bias is None for linear in consumers)
    if keeps_bias and bool((gain == 0).any()):
        raise UnsupportedError(
            compose(
                subject="norm gain",
                value="0",
                constraint="cannot be folded beside a bias that its reader has no place for",
                place=type(norm).__name__,
                remedy="leave FoldNorms out of the recipe",
            )
        )
    for linear in consumers:
        if bias is not None and not keeps_bias:
            _set_(linear, "bias", fold_norm_bias(linear.weight, linear.bias, bias))
        _set_(linear, "weight", fold_gain(linear.weight, gain))
    if bias is not None:
        _set_(norm, "bias", bias.double() / gain if keeps_bias else torch.zeros_like(bias))
    _set_(norm, "weight", torch.full_like(norm.weight, 1 - gain_offset))


def _rotate_norm_bias_(norm: Any, rotation: Float[Tensor, "K K"]) -> None:
    """Rotate a bias that stayed in the norm because a reader has no place for it; others are zero."""
    if getattr(norm, "bias", None) is not None:
        _set_(norm, "bias", norm.bias.double() @ rotation.to(norm.bias.device))


def _set_(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a parameter, rounded to its dtype."""
    getattr(module, name).data.copy_(value)


def _set_rows_(module: nn.Module, name: str, rows: slice, value: Tensor) -> None:
    """Write some rows of a parameter, rounded to its dtype."""
    getattr(module, name).data[rows] = value.to(getattr(module, name).dtype)
