# SPDX-License-Identifier: Apache-2.0
"""The steps behind the commands, each from plain arguments to a part of a result."""

from collections import Counter
from pathlib import Path

import torch

from quattuor.calibration.data import calibration_batches, evaluation_windows, load_text
from quattuor.checkpoints.source import ModelSource
from quattuor.checkpoints.verification import VerifiedRow, verify
from quattuor.evaluation.generation import generate
from quattuor.evaluation.loading import LoadedModel, max_positions, require_tokenizer
from quattuor.evaluation.perplexity import perplexity
from quattuor.progress import Progress
from quattuor.quantize import quantize_to_folder
from quattuor.recipe import Recipe
from quattuor.reports.result import Calibration, Evaluation, Generation, RunResult, Verification, now

__all__ = ["evaluate_model", "generate_text", "quantize_model", "verify_folder"]


def quantize_model(
    source: ModelSource,
    recipe: Recipe,
    output: Path,
    *,
    data: str,
    num_samples: int,
    length: int,
    seed: int,
    device: torch.device,
    overwrite: bool,
    progress: Progress,
) -> RunResult:
    """Quantize a model on windows of a text, and write the checkpoint."""
    date = now()
    tokens = calibration_batches(
        require_tokenizer(source.tokenizer, source.model_name),
        load_text(data, "calibration"),
        num_samples,
        length,
        seed,
        max_positions=max_positions(source.config),
    )
    report = quantize_to_folder(
        source, recipe, tokens, output, device=device, seed=seed, progress=progress, overwrite=overwrite
    )
    return RunResult(
        command="quantize",
        date=date,
        model=source.model_name if source.path is None else str(source.path),
        model_name=source.model_name,
        output=str(output),
        recipe=recipe.to_dict(),
        device=str(device),
        calibration=Calibration(
            source=data, num_samples=num_samples, length=length, seed=seed, num_tokens=tokens.numel()
        ),
        quantization=report,
    )


def evaluate_model(
    loaded: LoadedModel, data: str, *, length: int, limit: int | None, batch_size: int, progress: Progress
) -> Evaluation:
    """Measure the perplexity of a model on the evaluation split of a text."""
    windows = evaluation_windows(
        loaded.tokenizer,
        load_text(data, "evaluation"),
        length,
        limit,
        max_positions=max_positions(loaded.model.config),
    )
    measured = perplexity(loaded.model, windows, batch_size=batch_size, progress=progress)
    return Evaluation(label=loaded.label, source=data, perplexity=measured)


def generate_text(
    loaded: LoadedModel,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    chat: bool,
    progress: Progress,
) -> Generation:
    """Let a model continue a prompt."""
    result = generate(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        progress=progress,
    )
    return Generation(label=loaded.label, result=result)


def verify_folder(folder: Path, against: ModelSource | None) -> tuple[list[VerifiedRow], Verification]:
    """Check every tensor of a checkpoint; return the rows and their summary."""
    rows = verify(folder, against)
    summary = Verification(
        folder=str(folder),
        num_tensors=sum("hash" in row.checks for row in rows),
        checks=dict(Counter(check for row in rows for check in row.checks)),
        size_bytes=sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()),
    )
    return rows, summary
