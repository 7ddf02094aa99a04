# SPDX-License-Identifier: Apache-2.0
"""Compares what a checkpoint computes with what its source computes, one module in memory at a time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from quattuor.checkpoints.layouts import read_layouts
from quattuor.checkpoints.skeleton import quantized_skeleton, tied_names
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.tensors import SafetensorsStore
from quattuor.nn.linear import QuantizedLinear

__all__ = ["Divergence", "divergence_from", "source_logits", "stored_logits"]

NUM_TOKENS = 64
TEXT = (
    "A library holds books, and the people who look after them. Most readers come in the morning, when the light "
    "falls through the tall windows on the eastern side of the hall. They ask for maps, for old newspapers, and "
    "sometimes for a story that somebody told them as a child and whose title they have long forgotten. The "
    "librarian listens, thinks for a while, and then walks slowly along the shelves until she has found it."
)
"""Plain prose; only how close the two models are on it matters."""

Load = Callable[[nn.Module, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a checkpoint's predictions are from its source's on a short text.

    Args:
        nats: mean_t KL(p_t || q_t), p the source's and q the checkpoint's distribution of the next token.
        uniform_nats: The same with q uniform: log V minus the source's mean entropy.
        num_tokens: Tokens that were read.
        has_text: Whether they are prose; without a tokenizer they are random ids.
    """

    nats: float
    uniform_nats: float
    num_tokens: int
    has_text: bool

    def __str__(self) -> str:
        """Show both numbers and what they were measured on."""
        kind = "tokens of prose" if self.has_text else "random tokens (the source has no tokenizer)"
        return f"{self.nats:.3g} nats on {self.num_tokens} {kind}, {self.uniform_nats:.3g} for a uniform guess"


@torch.no_grad()
def divergence_from(source: ModelSource, folder: Path) -> Divergence:
    """Run both models on the same tokens and compare their predictions, in float64."""
    tokens, has_text = _tokens(source)
    original_TV = source_logits(source, tokens).double().log_softmax(dim=-1)
    stored_TV = stored_logits(folder, tokens).double().log_softmax(dim=-1)
    negative_entropy_T = (original_TV.exp() * original_TV).sum(dim=-1)
    cross_T = (original_TV.exp() * stored_TV).sum(dim=-1)
    vocabulary = torch.tensor(original_TV.shape[-1], dtype=torch.float64)
    return Divergence(
        nats=float((negative_entropy_T - cross_T).mean()),
        uniform_nats=float(negative_entropy_T.mean() + vocabulary.log()),
        num_tokens=tokens.numel(),
        has_text=has_text,
    )


@torch.no_grad()
def source_logits(source: ModelSource, tokens: Int64[Tensor, " T"]) -> Float[Tensor, "T V"]:
    """Return the logits of the source in float32."""
    return _run(source.skeleton(), tokens, source.load_)


@torch.no_grad()
def stored_logits(folder: Path, tokens: Int64[Tensor, " T"]) -> Float[Tensor, "T V"]:
    """Return the logits of a native checkpoint, with float32 between its packed linears."""
    config = AutoConfig.from_pretrained(folder)
    model = quantized_skeleton(config, read_layouts(config))
    store, tied = SafetensorsStore(folder), tied_names(model)

    def load_(module: nn.Module, prefix: str) -> None:
        exact = module.layout.tensor_names if isinstance(module, QuantizedLinear) else ()
        for leaf in module.state_dict():
            full = f"{prefix}.{leaf}"
            tensor = store.read(tied.get(full, full))
            if leaf not in exact and tensor.is_floating_point():
                tensor = tensor.float()
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    return _run(model, tokens, load_)


def _run(model: PreTrainedModel, tokens: Int64[Tensor, " T"], load_: Load) -> Float[Tensor, "T V"]:
    """Call a model without memory for its parameters: each module is loaded before its turn and released after."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(functools.partial(_before, load_, path))
            module.register_forward_hook(_after)
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    return logits


def _before(load_: Load, path: str, module: nn.Module, _: tuple[object, ...]) -> None:
    load_(module, path)


def _after(module: nn.Module, _: tuple[object, ...], __: object) -> None:
    if isinstance(module, QuantizedLinear):
        module.to("meta")
        return
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _tokens(source: ModelSource) -> tuple[Int64[Tensor, " T"], bool]:
    """Return a few tokens that the model knows, and whether they are text."""
    limit = min(NUM_TOKENS, getattr(source.config, "max_position_embeddings", None) or NUM_TOKENS)
    if source.tokenizer is not None:
        return torch.tensor(source.tokenizer(TEXT)["input_ids"][:limit], dtype=torch.int64), True
    generator = torch.Generator().manual_seed(0)
    return torch.randint(source.config.vocab_size, (limit,), generator=generator), False
