# SPDX-License-Identifier: Apache-2.0
"""What happens to one decoder block: rotate, smooth, collect, solve, replace, run on."""

import copy
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quattuor.activations import ActivationQuantizer
from quattuor.apply import choose, place_
from quattuor.calibration.blockwise import BlockRunner, Hidden
from quattuor.errors import CalibrationError, InputError
from quattuor.folding import fold_block_norms_, linear_at, rotate_block_heads_, rotate_block_residual_
from quattuor.granularity import Granularity
from quattuor.models import Site
from quattuor.nn.layout import LinearLayout
from quattuor.pipeline.run import Run
from quattuor.quantization_report import LayerReport
from quattuor.site_search import SiteSearch
from quattuor.solvers import Solution, WeightToQuantize
from quattuor.transforms import FoldNorms, RotateHeads, RotateResidual
from quattuor.transforms.base import SiteTransform

__all__ = ["Stream", "quantize_block_", "rotate_block_", "smooth_block_"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """What flows from block to block: the inputs in use, and the original model's where a solver compares."""

    hidden: Hidden
    original: Hidden | None


def rotate_block_(run: Run, block: nn.Module, rotations: dict[str, Tensor]) -> None:
    """Apply the model-wide transforms to one block."""
    for transform in run.recipe.transforms:
        if isinstance(transform, FoldNorms):
            fold_block_norms_(block, run.description, run.sites)
        elif isinstance(transform, RotateResidual):
            rotate_block_residual_(block, run.sites, rotations["residual"].to(run.device))
        elif isinstance(transform, RotateHeads):
            assert run.heads is not None, "legality was checked"
            rotate_block_heads_(block, run.description, run.heads, rotations["heads"].to(run.device))


def smooth_block_(run: Run, runner: BlockRunner, block: nn.Module, index: int, hidden: Hidden) -> None:
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


def quantize_block_(run: Run, runner: BlockRunner, block: nn.Module, index: int, state: Stream) -> Stream:
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
    return Stream(hidden=next_hidden, original=next_original)


def _collect(
    run: Run,
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


def _solve_site_(run: Run, block: nn.Module, index: int, site: Site, statistics: dict[str, Tensor]) -> None:
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


def _own_statistics(run: Run, name: str) -> dict[str, Tensor]:
    """Return what was collected for the weight of one linear alone."""
    found = {key: of_all.get(name) for key, of_all in run.model_statistics.items()}
    return {key: value.to(run.device) for key, value in found.items() if value is not None}


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
