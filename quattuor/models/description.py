# SPDX-License-Identifier: Apache-2.0
"""What the mathematics must know about a decoder architecture; data only.

A description names modules by their path; nothing here touches a model. Every other part of Quattuor asks this
description instead of carrying module names of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from quattuor.errors import InputError, compose

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

    def __post_init__(self) -> None:
        """Reject counts that cannot share key and value heads evenly."""
        if min(self.num_heads, self.num_kv_heads, self.head_dim) < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(
                compose(
                    subject="num_heads, num_kv_heads, head_dim",
                    value=f"{self.num_heads}, {self.num_kv_heads}, {self.head_dim}",
                    constraint="must be positive, the first a multiple of the second",
                    place="Heads",
                    remedy="check num_attention_heads, num_key_value_heads and head_dim in config.json",
                )
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Paths of the attention linears inside a block.

    The same path for query, key and value means one fused linear whose rows are query, key, value in this order.
    `query_norm` and `key_norm` name norms over head_dim between these linears and the rotary embedding; None when
    there are none.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    query_norm: str | None = None
    key_norm: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether query, key and value are one linear."""
        return self.query == self.key == self.value

    def rows(self, part: Literal["query", "key", "value"], heads: Heads) -> slice:
        """Return the rows that a part has in its linear: all of them unless the linear is fused."""
        count = {
            "query": heads.num_heads * heads.head_dim,
            "key": heads.num_kv_heads * heads.head_dim,
            "value": heads.num_kv_heads * heads.head_dim,
        }
        start = {"query": 0, "key": count["query"], "value": count["query"] + count["key"]}
        first = start[part] if self.is_fused else 0
        return slice(first, first + count[part])


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

    def rows(self, part: Literal["gate", "up"], intermediate_size: int) -> slice:
        """Return the rows that a part has in its linear: all of them unless the linear is fused.

        Args:
            part: Which half of a gated network; "up" alone for a plain one.
            intermediate_size: Width between up and down, the input features of `down`.
        """
        if part == "gate" and self.gate is None:
            raise InputError(
                compose(
                    subject="part",
                    value=part,
                    constraint=f"does not exist: {self.up} and {self.down} form a network without a gate",
                    place="Mlp.rows",
                    remedy='ask for "up"',
                )
            )
        first = intermediate_size if self.is_fused and part == "up" else 0
        return slice(first, first + intermediate_size)


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
        activation_key: Key of the configuration that names the feed-forward activation.
        block_returns_tuple: Whether a block returns a tuple whose first entry is the hidden state; None when that
            depends on the version of transformers or is unknown, then `probe.returns_tuple` finds out.
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
    activation_key: str = "hidden_act"
    block_returns_tuple: bool | None = False

    @property
    def is_discovered(self) -> bool:
        """Whether only the linears are known, so that nothing can be folded."""
        return self.attention is None or self.mlp is None

    def sites(self, activation: str = "silu") -> tuple[Site, ...]:
        """List the sites of a block in the order the forward pass meets them.

        Args:
            activation: Name of the feed-forward activation, which decides what a plain network allows.
        """
        if self.attention is None or self.mlp is None:  # the type checker cannot see through is_discovered
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

    def activation(self, config: Mapping[str, Any]) -> str:
        """Read the name of the feed-forward activation from a configuration's dictionary."""
        return str(config.get(self.activation_key, "unknown"))

    def reason_against_residual_rotation(self, *, keeps_mean: bool = False) -> str | None:
        """Return why the residual stream must not be rotated, or None when it may be.

        A rotation R of the residual stream passes a norm when norm(x @ R) = norm(x) @ R, which holds for a root
        mean square once its gain is folded away, and for a LayerNorm only if R keeps the mean over channels.

        Args:
            keeps_mean: Whether the rotation leaves mean(x) over channels as it is (R @ 1 = 1).

        References:
            Ashkboos et al., 2024, arXiv:2404.00456, section 4, stage 1.
        """
        if self.is_discovered:
            return f"{self.family} was discovered, not described: its norms and residual additions are unknown"
        if self.post_norms:
            return (
                f"{self.family} has norms between a sublayer and the residual sum ({', '.join(self.post_norms)}), "
                "whose gains no linear can absorb"
            )
        if self.norm == "layer" and not keeps_mean:
            return (
                f"the LayerNorm of {self.family} subtracts the mean over channels, which only a rotation that "
                "keeps the mean leaves alone"
            )
        return None

    def heads(self, config: Mapping[str, Any]) -> Heads:
        """Read the head counts from a configuration's dictionary; an explicit `head_dim` wins."""
        num_heads = config["num_attention_heads"]
        return Heads(
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        )
