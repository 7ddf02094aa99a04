# SPDX-License-Identifier: Apache-2.0
"""quantize(model, recipe, tokens): the whole pipeline on one screen."""

import logging
import time
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from quattuor.checkpoints.layouts import quantization_config
from quattuor.checkpoints.native import CheckpointWriter
from quattuor.checkpoints.skeleton import quantized_linears
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.streaming import StreamingStore
from quattuor.pipeline.block import Stream, quantize_block_, rotate_block_, smooth_block_
from quattuor.pipeline.ends import collect_gradients, embed, emit_ends, transform_ends_
from quattuor.pipeline.run import BlockStore, InMemory, compares, prepare
from quattuor.progress import Progress, Silent
from quattuor.quantization_report import LayerReport, QuantizationReport
from quattuor.recipe import Recipe

__all__ = ["BlockStore", "InMemory", "LayerReport", "QuantizationReport", "quantize", "quantize_to_folder"]

MAX_SHARD_BYTES = 4 * 1024**3

logger = logging.getLogger(__name__)


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Int64[Tensor, "B T"] | None,
    *,
    store: BlockStore | None = None,
    device: str | torch.device | None = None,
    storage: str | torch.device = "cpu",
    batch_size: int = 8,
    seed: int = 0,
    kernel: str | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize the decoder blocks of a model in place, one block at a time.

    Args:
        model: A causal language model of transformers, in float32 for exact statistics.
        recipe: What is done; checked against the model before any work.
        tokens: Calibration sequences of equal length; None for a recipe that uses no data.
        store: Where parameters come from and go to; None when the model is in memory.
        device: Where a block is computed; None for where the model is.
        storage: Where hidden states wait between blocks.
        batch_size: Sequences per forward pass; changes memory, not results beyond rounding.
        seed: Seeds every random choice, with the name of what it is for.
        kernel: Forces one kernel for the quantized blocks, by name; None lets each layer choose. All kernels give
            the same integers: "float32" saves compiling others when calibration is short.
        progress: Told about each block.

    Returns:
        What was done to each linear, seconds by phase, peak memory.

    Raises:
        InputError, UnsupportedError: The recipe does not fit the model.
        CalibrationError: The data cannot support the recipe, or an activation is not finite.
    """
    progress, store = progress or Silent(), store or InMemory()
    run = prepare(model, recipe, tokens, device, seed, kernel)
    report, blocks = run.report, list(model.get_submodule(run.description.blocks).children())
    collect_gradients(run, tokens)
    with report.phase("ends"):
        rotations = transform_ends_(run, store)
    with report.phase("embed"):
        hidden, runner = embed(run, tokens, batch_size, torch.device(storage))
    emit_ends(run, store)
    state = Stream(hidden=hidden, original=list(hidden) if compares(run) else None)
    progress.start("blocks", len(blocks))
    for index, block in enumerate(blocks):
        prefix = f"{run.description.blocks}.{index}"
        start = time.perf_counter()
        store.load_(block, prefix)
        home = next(block.parameters()).device
        block.to(run.device)
        with report.phase("rotate"):
            rotate_block_(run, block, rotations)
        with report.phase("smooth"):
            smooth_block_(run, runner, block, index, state.hidden)
        state = quantize_block_(run, runner, block, index, state)
        report.measure_memory(run.device)
        block.to(home)
        store.emit(block, prefix)
        errors = [layer.error for layer in report.layers if layer.name.startswith(prefix + ".")]
        note = f"error {sum(errors) / len(errors):.2e}" if errors else "kept"
        elapsed_s = time.perf_counter() - start
        logger.info("%s %s %.1fs %d bytes", prefix, note, elapsed_s, report.peak_memory_bytes)
        progress.advance("blocks", note=note)
    progress.finish("blocks")
    if isinstance(store, InMemory):
        _describe_in_config_(model, recipe)
    return report


def _describe_in_config_(model: PreTrainedModel, recipe: Recipe) -> None:
    """Say in the configuration what is packed, so that whoever saves the model writes a folder that loads."""
    layouts = {name: module.layout for name, module in quantized_linears(model).items()}
    if layouts:
        model.config.quantization_config = quantization_config(layouts, recipe)


def quantize_to_folder(
    source: ModelSource,
    recipe: Recipe,
    tokens: Int64[Tensor, "B T"] | None,
    output: Path,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizationReport:
    """Quantize a stored model into a new checkpoint, reading and writing one block at a time.

    The folder appears when everything is written, or not at all. A recipe that needs gradients of the whole model
    has the whole model in memory.

    Args:
        source: The model to read.
        recipe, tokens, device, batch_size, seed, progress: As for `quantize`.
        output: Folder to make.
        overwrite: Replace an existing folder once the new one is complete.
        max_shard_bytes: Size at which a file of tensors is closed.

    Raises:
        CheckpointError: The source is damaged, the output exists, or the disk is full.
    """
    model = source.whole() if "fisher" in recipe.needs else source.skeleton()
    with CheckpointWriter(output, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
        store = StreamingStore(source, writer, model)
        report = quantize(
            model, recipe, tokens, store=store, device=device, batch_size=batch_size, seed=seed, progress=progress
        )
        tokenizer, generation_config = source.tokenizer, source.generation_config
        writer.finish(model.config, recipe, store.layouts, report.to_dict(), tokenizer, generation_config)
    return report
