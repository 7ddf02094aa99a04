# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of greedy decoding in transformers: the record `decode`.

    python -m benchmarks.end_to_end.decode [--models NAME ...] [--formats NAME ...] [--batches N ...] [--json FILE]

Each model has the shape of a published one and random weights: speed does not depend on their values. Every row of
a batch reads the same prompt, which is processed once; then each step feeds the likeliest token back, without a
synchronization. All formats share one harness: a static cache as long as prompt and answer, the modules of
transformers, and the same executions:

    eager     modules called one after another
    graph     such a step recorded once as a CUDA graph, and replayed
    compiled  each decoder block compiled by `torch.compile(fullgraph=True)`, then a step recorded and replayed
"""

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache

from benchmarks import record
from benchmarks.end_to_end.serving_formats import SHAPES as SERVED_SHAPES
from quattuor.activations import DynamicQuantizer
from quattuor.formats import Integer, TwoLevelInteger
from quattuor.granularity import PerChannel, PerGroup
from quattuor.nn import LinearLayout, ParameterLayout, QuantizedLinear
from quattuor.nn.gated_mlp import join_gates
from quattuor.nn.sharing import share_inputs

__all__ = ["EXECUTIONS", "FORMATS", "MODELS", "RECORD", "Decoder", "main", "measure", "random_model"]

RECORD = "decode"
PROMPT_LENGTH = 128
NEW_TOKENS = 128
EAGER_TOKENS = 8
"""Steps of the slow execution; every step of a static cache costs the same."""

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        **SERVED_SHAPES["llama-2-7b"],
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    "smollm2-135m": {
        **SERVED_SHAPES["llama-2-7b"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": SERVED_SHAPES["llama-2-7b"],
}

FORMATS: dict[str, LinearLayout | None] = {
    "fp16": None,
    "quattuor_w4a8": LinearLayout(
        number_format=Integer(4),
        granularity=PerChannel(),
        activations=DynamicQuantizer(),
        parameters=(ParameterLayout(name="scale", dtype="float32", per_group=False),),
    ),
    "quattuor_w4a8_g128": LinearLayout(
        number_format=TwoLevelInteger(4),
        granularity=PerGroup(128),
        activations=DynamicQuantizer(),
        parameters=(
            ParameterLayout(name="group_scale", dtype="int8", per_group=True),
            ParameterLayout(name="channel_scale", dtype="float32", per_group=False),
        ),
    ),
}

EXECUTIONS = ("eager", "graph", "compiled")

Row = dict[str, str | int | float | bool | None]


def random_model(name: str, layout: LinearLayout | None, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a published shape with random weights, made on the device.

    Args:
        name: A key of `MODELS`.
        layout: Of the linears inside the blocks, whose codes are random; None leaves them as they are.
        device: Where it is made.
        dtype: Of everything that is not packed.
    """
    settings = dict(MODELS[name])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    if layout is not None:
        for path, module in list(model.model.layers.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.layers.set_submodule(path, _random_linear(module, layout, path))
        share_inputs(model)  # both as when a checkpoint is loaded
        join_gates(model)
    return model


def _random_linear(linear: nn.Linear, layout: LinearLayout, name: str) -> QuantizedLinear:
    """Return a packed linear with random codes, whose outputs are about as large as the original's."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    packed = QuantizedLinear(layout, **sizes, bias=False, dtype=linear.weight.dtype, device="cpu", name=name)
    packed = packed.to_empty(device=linear.weight.device)
    spread = float(linear.weight[:64].float().std()) / 2**layout.number_format.bits
    for key in layout.tensor_names:
        buffer = packed.get_buffer(key)
        if buffer.dtype == torch.uint8:
            buffer.random_(0, 256)
        elif key == "group_scale":
            buffer.random_(1, 16)
        else:
            buffer.fill_(spread / (8 if "group_scale" in layout.tensor_names else 1)).mul_(
                1 + torch.rand_like(buffer)
            )
    return packed


class _Block(nn.Module):
    """A decoder block with a cache of its own, so that all blocks are one program for the compiler."""

    def __init__(self, block: nn.Module, cache: StaticCache) -> None:
        super().__init__()
        self.block, self.cache = block, cache
        self.step: Callable[..., Tensor] = _call_block

    def forward(self, hidden: Tensor, attention_mask: Tensor, past_key_values: Any, **kwargs: Any) -> Tensor:
        call = self.step if hidden.shape[1] == 1 else _call_block  # prompts are not compiled
        return call(self.block, self.cache, hidden, attention_mask, kwargs["position_embeddings"])


def _call_block(block: nn.Module, cache: StaticCache, hidden: Tensor, mask: Tensor, positions: Any) -> Tensor:
    result: Tensor = block(
        hidden, attention_mask=mask, past_key_values=cache, position_embeddings=positions, use_cache=True
    )
    return result


class Decoder:
    """Decodes greedily with a static cache, without a synchronization inside a step.

    Args:
        model: A Llama; its blocks are wrapped.
        max_length: Tokens of prompt and answer.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        """Give every block a cache of one layer."""
        self.model, self.max_length = model, max_length
        self.config = copy.deepcopy(model.config)
        self.config.num_hidden_layers = 1
        self.blocks = [_Block(block, StaticCache(self.config, max_length)) for block in model.model.layers]
        for block in self.blocks:
            block.block.self_attn.layer_idx = 0
        model.model.layers = nn.ModuleList(self.blocks)
        self.places = torch.arange(max_length, device=model.device)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, batch: int) -> None:
        """Process one prompt [T] and repeat what the caches hold for every row of a batch."""
        self._set_caches(1)
        self.tokens, self.positions = tokens[None], self.places[None, : len(tokens)].clone()
        last = self._forward()[:, -1:].repeat(batch, 1)
        filled = [block.cache.layers[0] for block in self.blocks]
        self._set_caches(batch)
        for block, layer in zip(self.blocks, filled, strict=True):
            block.cache.layers[0].keys.copy_(layer.keys.expand(batch, -1, -1, -1))
            block.cache.layers[0].values.copy_(layer.values.expand(batch, -1, -1, -1))
        self.start, self.first = len(tokens), last
        self.tokens, self.positions = last.clone(), self.places[None, len(tokens) : len(tokens) + 1].clone()

    def _set_caches(self, batch: int) -> None:
        attention = self.blocks[0].block.self_attn
        for block in self.blocks:
            block.cache = StaticCache(self.config, self.max_length)
            block.cache.early_initialization(
                batch, self.config.num_key_value_heads, attention.head_dim, self.model.dtype, self.model.device
            )
            layer = block.cache.layers[0]
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                # without a guard on its address, for which every block would be compiled again
                torch._dynamo.mark_static_address(tensor, guard=False)

    def rewind(self) -> None:
        """Return to the end of the prompt."""
        self.tokens.copy_(self.first)
        self.positions.fill_(self.start)
        for block in self.blocks:
            block.cache.layers[0].cumulative_length.fill_(self.start)

    def _forward(self) -> Tensor:
        """Return the likeliest token after each token."""
        mask = (self.places[None, :] <= self.positions[0][:, None])[None, None]
        mask = mask.expand(len(self.tokens), 1, -1, -1)
        output = self.model(
            self.tokens, attention_mask=mask, position_ids=self.positions, past_key_values=self.blocks[0].cache
        )
        return output.logits.argmax(dim=-1)

    @torch.no_grad()
    def step(self) -> None:
        """Replace the tokens by the next ones."""
        self.tokens.copy_(self._forward())
        self.positions.add_(1)

    def compile(self, **options: Any) -> None:
        """Compile the block that all blocks are."""
        torch._dynamo.reset()  # programs of other models count towards the limit of recompilations
        compiled = torch.compile(_call_block, fullgraph=True, dynamic=False, **options)
        for block in self.blocks:
            block.step = compiled

    def recorded(self) -> Callable[[], None]:
        """Return a CUDA graph of a step; call it after `prefill`."""
        torch.cuda.synchronize()  # what the prompt left is read by another stream
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(2):
                self.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def _run(decoder: Decoder, step: Callable[[], None], num_tokens: int, repeats: int) -> tuple[float, Tensor]:
    """Return the median seconds of a run of steps, and the tokens of the last."""
    on_gpu = decoder.model.device.type == "cuda"
    seconds, tokens = [], []
    for _ in range(repeats):
        decoder.rewind()
        tokens = [decoder.tokens.clone()]
        started = _now(on_gpu)
        for _ in range(num_tokens):
            step()
            tokens.append(decoder.tokens.clone())
        seconds.append(_now(on_gpu) - started)
    return statistics.median(seconds), torch.cat(tokens, dim=1)


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    name: str,
    format_name: str,
    batches: Sequence[int],
    *,
    device: str,
    executions: Sequence[str] = EXECUTIONS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 3,
    compile_options: dict[str, Any] | None = None,
    keep: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure one model in one format.

    Args:
        name: A key of `MODELS`.
        format_name: A key of `FORMATS`.
        batches: Sequences decoded together.
        device: "cuda", or "cpu" to try the harness, where nothing is recorded as a graph.
        executions: Some of `EXECUTIONS`, in their order.
        new_tokens: Steps of a run; of eager runs at most `EAGER_TOKENS`.
        repeats: Runs, of which the median counts.
        compile_options: For `torch.compile`.
        keep: Called with each row as soon as it is measured.

    Returns:
        Rows of the record. `as_eager` is the part of the tokens that equal those of eager execution, `memory_mib`
        what weights, caches and graphs take on the GPU after the runs.
    """
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch._dynamo.reset()  # programs hold the weights of earlier models
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = random_model(name, FORMATS[format_name], device, dtype)
    decoder = Decoder(model, PROMPT_LENGTH + NEW_TOKENS)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    eager: dict[int, Tensor] = {}
    for execution in executions:
        if execution == "compiled":
            decoder.compile(**(compile_options or {}))
        for batch in batches:
            decoder.prefill(prompt.to(device), batch)
            step = decoder.recorded() if device == "cuda" and execution != "eager" else decoder.step
            _run(decoder, step, 2, 1)
            num_tokens = min(new_tokens, EAGER_TOKENS) if execution == "eager" else new_tokens
            seconds, tokens = _run(decoder, step, num_tokens, repeats)
            eager.setdefault(batch, tokens)
            shared = min(tokens.shape[1], eager[batch].shape[1])
            row: Row = {
                "model": f"{name}, random weights",
                "format": format_name,
                "execution": execution,
                "batch": batch,
                "prompt_tokens": PROMPT_LENGTH,
                "new_tokens": num_tokens,
                "tokens_per_s": batch * num_tokens / seconds,
                "step_ms": 1e3 * seconds / num_tokens,
                "as_eager": float((tokens[:, :shared] == eager[batch][:, :shared]).float().mean()),
                "memory_mib": (torch.cuda.memory_allocated() - before) / 2**20 if device == "cuda" else None,
            }
            rows.append(row)
            keep(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.decode", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-2-7b", "smollm2-135m"])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["quattuor_w4a8", "fp16"])
    parser.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=list(EXECUTIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []

    def keep(row: Row) -> None:
        """Print a row and write the record anew: what is measured stays when a later row fails."""
        print(json.dumps(row), flush=True)
        rows.append(row)
        record.write(RECORD, rows, to=options.json)

    for name in options.models:
        for format_name in options.formats:
            measure(name, format_name, options.batches, device=device, executions=options.executions, keep=keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
