# SPDX-License-Identifier: Apache-2.0
"""What the mathematics must know about a decoder architecture; data only.

A description names modules by their path; nothing here touches a model. Every other part of Quattuor asks this
description instead of carrying module names of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

__all__ = ["Attention", "DecoderDescription", "Heads", "Mlp", "Site", "SiteKind"]


class SiteKind(Enum):
    """How the producer of an activation and the linears that read it are tied, hence what may be folded.

    | kind | producer -> consumers | scale | permute |
    | --- | --- | --- | --- |
    | NORM_LINEAR | norm -> all linears reading it | any s != 0 | any |
    | VALUE_OUTPUT | value rows -> output columns | equal over the query heads of a kv head | per kv head |
    | UP_DOWN | up rows -> down columns (the gate multiplies) | any s != 0 | with the gate rows |
    | RELU | first rows -> second columns through ReLU | s > 0 | any |
    | OPAQUE | unknown or nonlinear | none | none |
    """

    NORM_LINEAR = "norm_linear"
    VALUE_OUTPUT = "value_output"
    UP_DOWN = "up_down"
    RELU = "relu"
    OPAQUE = "opaque"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Head counts of one attention layer: `num_heads` is a multiple of `num_kv_heads`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Paths of the attention linears inside a block.

    The same path for query, key and value means one fused linear whose rows are query, key, value in this order.
    """

    module: str
    query: str
    key: str
    value: str
    output: str

    @property
    def is_fused(self) -> bool:
        """Whether query, key and value are one linear."""
        return self.query == self.key == self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Paths of the feed-forward linears inside a block.

    The same path for gate and up means one fused linear whose rows are gate, then up. No gate means a plain
    two-layer network: down(activation(up(x))). `module` is the submodule that maps the norm's output to the output
    of `down`; None when these linears sit directly in the block.
    """

    module: str | None
    gate: str | None
    up: str
    down: str

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one linear."""
        return self.gate == self.up


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One activation of a block: who produces it and which linears read it.

    Args:
        name: "qkv", "output", "gate_up" or "down"; for an opaque site the path of its linear.
        kind: What may be folded here.
        producer: Path of the norm or linear whose output the consumers read; None for an opaque site.
        consumers: Paths of the linears, in the block's order, each once.
    """

    name: str
    kind: SiteKind
    producer: str | None
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderDescription:
    """One decoder architecture.

    Args:
        family: Name of the family, as in the file's name.
        model_types: Values of `config.model_type` it describes.
        blocks: Path of the list of decoder blocks.
        embeddings: Paths of the embeddings that are summed into the residual stream, token embedding first.
        final_norm: Path of the norm before the head; None when there is none.
        head: Path of the output projection.
        attention_norm, mlp_norm: Paths, inside a block, of the norms that feed attention and feed-forward.
        post_norms: Paths, inside a block, of norms between a sublayer's output and the residual sum.
        norm: "rms" or "layer".
        gain_offset: The effective gain of a norm is `gain_offset + weight` (1 for Gemma).
        attention, mlp: The linears; None in a description that was discovered rather than written.
        linears: Paths of all linears inside a block, for a discovered description; empty otherwise.
        block_returns_tuple: Whether a block returns a tuple whose first entry is the hidden state.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str
    attention_norm: str | None = None
    mlp_norm: str | None = None
    post_norms: tuple[str, ...] = ()
    norm: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0
    attention: Attention | None = None
    mlp: Mlp | None = None
    linears: tuple[str, ...] = ()
    block_returns_tuple: bool = False

    def sites(self, activation: str = "silu") -> tuple[Site, ...]:
        """List the sites of a block in the order the forward pass meets them.

        Args:
            activation: Name of the feed-forward activation, which decides what a plain network allows.
        """
        if self.attention is None or self.mlp is None:
            return tuple(
                Site(name=path, kind=SiteKind.OPAQUE, producer=None, consumers=(path,)) for path in self.linears
            )
        attention, mlp = self.attention, self.mlp
        if mlp.gate is not None:
            down_kind = SiteKind.UP_DOWN
        else:
            down_kind = SiteKind.RELU if activation == "relu" else SiteKind.OPAQUE
        return (
            Site(
                name="qkv",
                kind=SiteKind.NORM_LINEAR,
                producer=self.attention_norm,
                consumers=tuple(dict.fromkeys((attention.query, attention.key, attention.value))),
            ),
            Site(
                name="output",
                kind=SiteKind.VALUE_OUTPUT,
                producer=attention.value,
                consumers=(attention.output,),
            ),
            Site(
                name="gate_up",
                kind=SiteKind.NORM_LINEAR,
                producer=self.mlp_norm,
                consumers=tuple(dict.fromkeys(path for path in (mlp.gate, mlp.up) if path is not None)),
            ),
            Site(
                name="down",
                kind=down_kind,
                producer=None if down_kind is SiteKind.OPAQUE else mlp.up,
                consumers=(mlp.down,),
            ),
        )

    def heads(self, config: Mapping[str, Any]) -> Heads:
        """Read the head counts from a configuration's dictionary; an explicit `head_dim` wins."""
        num_heads = config["num_attention_heads"]
        return Heads(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        )
