# SPDX-License-Identifier: Apache-2.0
"""quantize(model, recipe, tokens): the whole pipeline on one screen."""

import copy
import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from quattuor.activations import ActivationQuantizer
from quattuor.apply import LinearChoice, check, choose, linear_names, place_, planned
from quattuor.calibration.blockwise import BlockRunner, Hidden, capture_inputs
from quattuor.calibration.fisher import collect_fisher
from quattuor.checkpoints.native import CheckpointWriter
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.streaming import StreamingStore
from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose
from quattuor.folding import (
    fold_block_norms_,
    fold_final_norm_,
    linear_at,
    rotate_block_heads_,
    rotate_block_residual_,
    rotate_ends_,
    untie_head_,
)
from quattuor.granularity import Granularity
from quattuor.models import DecoderDescription, Heads, Site, describe, discover
from quattuor.nn.layout import LinearLayout
from quattuor.nn.linear import QuantizedLinear
from quattuor.progress import Progress, Silent
from quattuor.quantization_report import LayerReport, QuantizationReport
from quattuor.recipe import Recipe
from quattuor.rules import resolve_roles
from quattuor.site_search import SiteSearch
from quattuor.solvers import Solution, WeightToQuantize
from quattuor.transforms import FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.base import SiteTransform

__all__ = ["BlockStore", "InMemory", "LayerReport", "QuantizationReport", "quantize", "quantize_to_folder"]

MAX_SHARD_BYTES = 4 * 1024**3

logger = logging.getLogger(__name__)


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
class _Run:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """What flows from block to block: the inputs in use, and the original model's where a solver compares."""

    hidden: Hidden
    original: Hidden | None


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
    run = _prepare(model, recipe, tokens, device, seed, kernel)
    report, blocks = run.report, list(model.get_submodule(run.description.blocks).children())
    _collect_gradients(run, tokens)
    with report.phase("ends"):
        rotations = _transform_ends_(run, store)
    with report.phase("embed"):
        hidden, runner = _embed(run, tokens, batch_size, torch.device(storage))
    _emit_ends(run, store)
    state = _Stream(hidden=hidden, original=list(hidden) if _compares(run) else None)
    progress.start("blocks", len(blocks))
    for index, block in enumerate(blocks):
        prefix = f"{run.description.blocks}.{index}"
        start = time.perf_counter()
        store.load_(block, prefix)
        home = next(block.parameters()).device
        block.to(run.device)
        with report.phase("rotate"):
            _rotate_block_(run, block, rotations)
        with report.phase("smooth"):
            _smooth_block_(run, runner, block, index, state.hidden)
        state = _quantize_block_(run, runner, block, index, state)
        report.measure_memory(run.device)
        block.to(home)
        store.emit(block, prefix)
        errors = [layer.error for layer in report.layers if layer.name.startswith(prefix + ".")]
        note = f"error {sum(errors) / len(errors):.2e}" if errors else "kept"
        elapsed_s = time.perf_counter() - start
        logger.info("%s %s %.1fs %d bytes", prefix, note, elapsed_s, report.peak_memory_bytes)
        progress.advance("blocks", note=note)
    progress.finish("blocks")
    return report


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


def _embed(
    run: _Run, tokens: Int64[Tensor, "B T"] | None, batch_size: int, storage: torch.device
) -> tuple[Hidden, BlockRunner]:
    """Return what the first block receives; nothing when the recipe uses no data."""
    if not _uses_data(run):
        return [], BlockRunner(run.description, [])
    tokens = _require_tokens(tokens)
    device = embedding_of(run.model).weight.device
    return capture_inputs(
        run.model, run.description, tokens, batch_size=batch_size, device=device, storage=storage
    )


def _require_tokens(tokens: Int64[Tensor, "B T"] | None) -> Int64[Tensor, "B T"]:
    """Return the calibration sequences. Raises CalibrationError when there are none."""
    if tokens is not None and tokens.numel():
        return tokens
    raise CalibrationError(
        compose(
            subject="tokens",
            value=None if tokens is None else tuple(tokens.shape),
            constraint="hold no calibration sequence",
            place="quantize",
            remedy="pass at least one sequence of token ids",
        )
    )


def _collect_gradients(run: _Run, tokens: Int64[Tensor, "B T"] | None) -> None:
    """Collect the squared gradients of every linear that some part needs them for, before anything is changed."""
    names = list(linear_names(run.description, run.sites, run.report.blocks))
    choices = {name: choose(run.recipe, name) for name in names}
    needed = [name for name, choice in choices.items() if choice is not None and "fisher" in choice.weights.needs]
    if needed:
        with run.report.phase("gradients"):
            run.model_statistics["fisher"] = collect_fisher(run.model, needed, _require_tokens(tokens))


def _uses_data(run: _Run) -> bool:
    """Whether any part looks at activations; if not, no forward pass is run."""
    if any(isinstance(transform, SiteTransform) for transform in run.recipe.transforms):
        return True
    return any(choice.weights.needs.difference(run.model_statistics) for choice in _choices(run))


def _choices(run: _Run) -> list[LinearChoice]:
    """Return what the recipe says about each linear that it quantizes."""
    names = linear_names(run.description, run.sites, run.report.blocks)
    return [choice for name in names if (choice := choose(run.recipe, name)) is not None]


def _prepare(
    model: PreTrainedModel,
    recipe: Recipe,
    tokens: Int64[Tensor, "B T"] | None,
    device: str | torch.device | None,
    seed: int,
    kernel: str | None,
) -> _Run:
    """Describe the model, check the recipe and the data against it."""
    _refuse_quantized(model)
    config = model.config.to_dict()
    description = describe(model.config) if recipe.transforms else _describe_or_discover(model)
    activation = description.activation(config)
    recipe = replace(recipe, rules=resolve_roles(recipe.rules, description))
    check(recipe, description, model, config)
    recipe = planned(recipe, description, model, config)
    target = torch.device(device) if device is not None else embedding_of(model).weight.device
    return _Run(
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


def _transform_ends_(run: _Run, store: BlockStore) -> dict[str, Tensor]:
    """Load embeddings, final norm and head, rotate them, and return the rotations of the blocks."""
    model, description = run.model, run.description
    for path in _end_paths(description):
        store.load_(model.get_submodule(path), path)
    rotations: dict[str, Tensor] = {}
    for transform in run.recipe.transforms:
        seed = derive_seed(run.seed, type(transform).__name__)
        if isinstance(transform, FoldNorms):
            untie_head_(model)
            fold_final_norm_(model, description)
        elif isinstance(transform, RotateResidual):
            size = embedding_of(model).weight.shape[1]
            rotations["residual"] = transform.for_norm(description.norm).matrix(size, seed)
            rotate_ends_(model, description, rotations["residual"])
        elif isinstance(transform, RotateHeads):
            assert run.heads is not None, "legality was checked"
            rotations["heads"] = transform.matrix(run.heads.head_dim, seed)
    return rotations


def _emit_ends(run: _Run, store: BlockStore) -> None:
    """Hand on what no block needs any more."""
    for path in _end_paths(run.description):
        store.emit(run.model.get_submodule(path), path)


def _end_paths(description: DecoderDescription) -> tuple[str, ...]:
    final = () if description.final_norm is None else (description.final_norm,)
    return (*description.embeddings, *final, description.head)


def _rotate_block_(run: _Run, block: nn.Module, rotations: dict[str, Tensor]) -> None:
    """Apply the model-wide transforms to one block."""
    for transform in run.recipe.transforms:
        if isinstance(transform, FoldNorms):
            fold_block_norms_(block, run.description, run.sites)
        elif isinstance(transform, RotateResidual):
            rotate_block_residual_(block, run.sites, rotations["residual"].to(run.device))
        elif isinstance(transform, RotateHeads):
            assert run.heads is not None, "legality was checked"
            rotate_block_heads_(block, run.description, run.heads, rotations["heads"].to(run.device))


def _smooth_block_(run: _Run, runner: BlockRunner, block: nn.Module, index: int, hidden: Hidden) -> None:
    """Find and fold the site transforms of one block."""
    prefix = f"{run.description.blocks}.{index}"

    def choice_of(site: Site) -> tuple[Granularity, int, ActivationQuantizer | None] | None:
        choices = [choose(run.recipe, f"{prefix}.{path}") for path in site.consumers]
        choice = next((choice for choice in choices if choice is not None), None)
        if choice is None:
            return None
        return choice.weights.granularity, choice.weights.number_format.bits, choice.activations

    for transform in run.recipe.transforms:
        if isinstance(transform, SiteTransform):
            assert run.heads is not None, "legality was checked"
            search = SiteSearch(runner, run.heads, run.activation, choice_of)
            search.run_(block, index, hidden, run.sites, transform)


def _compares(run: _Run) -> bool:
    """Whether a solver compares with the original model's activations, which then flow beside the others."""
    return any("cross" in choice.weights.needs for choice in _choices(run))


def _quantize_block_(run: _Run, runner: BlockRunner, block: nn.Module, index: int, state: _Stream) -> _Stream:
    """Solve and replace the linears of one block; return what the next block receives."""
    phase, hidden, original = run.report.phase, state.hidden, state.original
    before = copy.deepcopy(block) if original is not None and run.recipe.sequential else block
    with phase("propagate"):
        next_original = None if original is None else runner.run(block, index, original)
        next_hidden = runner.run(block, index, hidden) if run.recipe.inputs == "original" else None
    stages = [[site] for site in run.sites] if run.recipe.sequential else [list(run.sites)]
    for stage in stages:
        with phase("collect"):
            reference = None if original is None else (before, original)
            statistics = _collect(run, runner, block, index, hidden, stage, reference)
        with phase("solve"):
            for site in stage:
                _solve_site_(run, block, index, site, statistics[site])
    if next_hidden is None:
        with phase("propagate"):
            next_hidden = runner.run(block, index, hidden)
    return _Stream(hidden=next_hidden, original=next_original)


def _collect(
    run: _Run,
    runner: BlockRunner,
    block: nn.Module,
    index: int,
    hidden: Hidden,
    stage: list[Site],
    original: tuple[nn.Module, Hidden] | None,
) -> dict[Site, dict[str, Tensor]]:
    """Gather what the solvers of a stage need, from inputs rounded as the layers will see them if asked."""
    prefix = f"{run.description.blocks}.{index}"
    needs: dict[Site, frozenset[str]] = {}
    for site in stage:
        choices = [choose(run.recipe, f"{prefix}.{path}") for path in site.consumers]
        needed = frozenset[str]().union(*(choice.weights.needs for choice in choices if choice))
        needs[site] = needed.difference(run.model_statistics)
    rounds = run.recipe.inputs == "rounded" and run.recipe.activations is not None
    prepare = run.recipe.activations.fake_quantize if rounds and run.recipe.activations else None
    return runner.collect(block, index, hidden, needs, prepare, original)


def _solve_site_(run: _Run, block: nn.Module, index: int, site: Site, statistics: dict[str, Tensor]) -> None:
    """Solve the linears that share an input together, and put the packed ones in place."""
    prefix = f"{run.description.blocks}.{index}"
    groups: dict[Any, list[str]] = {}
    for path in site.consumers:
        choice = choose(run.recipe, f"{prefix}.{path}")
        if choice is not None:
            groups.setdefault(choice, []).append(path)
    for choice, paths in groups.items():
        start = time.perf_counter()
        weights = [
            WeightToQuantize(
                name=f"{prefix}.{path}",
                weight=linear_at(block, path).weight.float(),
                statistics=_own_statistics(run, f"{prefix}.{path}"),
            )
            for path in paths
        ]
        try:
            solutions = choice.weights.solve(weights, statistics, seed=run.seed)
        except (CalibrationError, InputError) as error:
            raise type(error)(f"{prefix}.{' and '.join(paths)}: {error}") from error
        seconds = (time.perf_counter() - start) / len(paths)
        for path, solution in zip(paths, solutions, strict=True):
            name = f"{prefix}.{path}"
            module = place_(block, path, solution, choice.activations, name=name)
            if run.kernel is not None:
                module.use_kernel(run.kernel)
            run.report.layers.append(_describe_layer(name, module.layout, solution, seconds))


def _own_statistics(run: _Run, name: str) -> dict[str, Tensor]:
    """Return what was collected for the weight of one linear alone."""
    found = {key: of_all.get(name) for key, of_all in run.model_statistics.items()}
    return {key: value.to(run.device) for key, value in found.items() if value is not None}


def embedding_of(model: PreTrainedModel) -> nn.Embedding:
    """Return the token embedding."""
    return cast(nn.Embedding, model.get_input_embeddings())


def derive_seed(seed: int, name: str) -> int:
    """Return a seed that depends on the run's seed and on what it is for, and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")


def _describe_layer(name: str, layout: LinearLayout, solution: Solution, seconds: float) -> LayerReport:
    return LayerReport(
        name=name,
        number_format=str(layout.number_format),
        granularity=str(layout.granularity),
        num_weights=solution.tensor.shape[0] * solution.tensor.shape[1],
        bits_per_weight=solution.tensor.bits_per_weight,
        error=solution.error,
        seconds=seconds,
        notes=solution.notes,
    )
