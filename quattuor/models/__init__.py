# SPDX-License-Identifier: Apache-2.0
"""Decoder architectures as data, and how to find the description of a model."""

from dataclasses import replace

from transformers import PretrainedConfig

from quattuor.errors import UnsupportedError, compose
from quattuor.models.description import Attention, DecoderDescription, Heads, Mlp, Site, SiteKind
from quattuor.models.discover import discover
from quattuor.models.encoders import refuse_encoder
from quattuor.models.gemma import GEMMA2, GEMMA3_TEXT
from quattuor.models.llama import LLAMA
from quattuor.models.mistral import MISTRAL
from quattuor.models.opt import OPT
from quattuor.models.phi import PHI3
from quattuor.models.probe import returns_tuple
from quattuor.models.qwen import QWEN2, QWEN3

__all__ = [
    "DESCRIPTIONS",
    "Attention",
    "DecoderDescription",
    "Heads",
    "Mlp",
    "Site",
    "SiteKind",
    "describe",
    "discover",
    "returns_tuple",
]

DESCRIPTIONS: dict[str, DecoderDescription] = {
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "opt": OPT,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
"""Every described architecture by `config.model_type`."""

_REMEDY = (
    "use a model of a known type, add a description to quattuor/models, or quantize without transforms: "
    "discover(model) finds the linears of most decoders"
)


def describe(config: PretrainedConfig) -> DecoderDescription:
    """Return the description of the architecture that a configuration belongs to.

    Raises:
        UnsupportedError: An encoder, an unknown `model_type`, or a variant that the description does not cover.
    """
    refuse_encoder(config)
    description = DESCRIPTIONS.get(config.model_type)
    if description is None:
        raise UnsupportedError(
            compose(
                subject="model_type",
                value=config.model_type or "(empty)",
                constraint=(
                    "has no description, so its norms, heads and linears are unknown; "
                    f"known are {', '.join(DESCRIPTIONS)}"
                ),
                place=type(config).__name__,
                remedy=_REMEDY,
            )
        )
    return _opt_variant(description, config) if description is OPT else description


def _opt_variant(description: DecoderDescription, config: PretrainedConfig) -> DecoderDescription:
    """Refuse the OPT models whose residual stream differs; drop the final norm of those that have none."""
    refusals = {
        "do_layer_norm_before": (
            not config.do_layer_norm_before,
            "normalizes after the residual sum, so no norm feeds a linear alone and nothing can be folded",
        ),
        "word_embed_proj_dim": (
            config.word_embed_proj_dim != config.hidden_size,
            f"is not hidden_size={config.hidden_size}, so projections stand between embeddings, blocks and head",
        ),
        "layer_norm_elementwise_affine": (
            not config.layer_norm_elementwise_affine,
            "leaves its norms without a gain, so nothing can be folded into them",
        ),
    }
    for name, (refused, constraint) in refusals.items():
        if refused:
            raise UnsupportedError(
                compose(
                    subject=name,
                    value=getattr(config, name),
                    constraint=constraint,
                    place=type(config).__name__,
                    remedy="quantize without transforms: discover(model) finds the linears",
                )
            )
    return replace(description, final_norm=None) if config._remove_final_layer_norm else description
