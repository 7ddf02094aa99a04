# SPDX-License-Identifier: Apache-2.0
"""A complete result with text that HTML must escape."""

import pytest

from quattuor.evaluation.generation import GenerationResult
from quattuor.evaluation.perplexity import PerplexityResult
from quattuor.quantize import LayerReport, QuantizationReport
from quattuor.reports.result import Calibration, Evaluation, Generation, RunResult, Verification
from quattuor.systems import qqq


def _perplexity(value, stderr):
    return PerplexityResult(
        perplexity=value,
        perplexity_stderr=stderr,
        nll=3.0,
        num_windows=16,
        num_tokens=32752,
        length=2048,
        seconds=9.5,
    )


def _generation(text):
    return GenerationResult(
        prompt="Why <b>?", text=text, num_prompt_tokens=3, num_new_tokens=5, seconds=0.5, tokens_per_second=10.0
    )


@pytest.fixture
def result():
    layers = [
        LayerReport(
            name=f"model.layers.{block}.mlp.{path}",
            number_format="TwoLevelInteger(bits=4)",
            granularity="PerGroup(group_size=64)",
            num_weights=4096,
            bits_per_weight=bits,
            error=error * (block + 1),
            seconds=0.25,
            notes=("2 dead columns",) if block else (),
        )
        for block in range(3)
        for path, bits, error in (("up_proj", 4.25, 1e-3), ("down_proj", 4.75, 2e-2))
    ]
    return RunResult(
        command="demo",
        date="2026-01-02T03:04:05+00:00",
        model="folder/<script>alert(1)</script>",
        model_name="tiny & small",
        output="out",
        recipe=qqq(group_size=64).to_dict(),
        calibration=Calibration(source="pydoc", num_samples=8, length=512, seed=0, num_tokens=4096),
        quantization=QuantizationReport(
            layers=layers,
            seconds={"collect": 2.0, "solve": 6.0},
            peak_memory_bytes=1_500_000_000,
            num_tokens=4096,
            blocks=3,
            notes=["kept <nothing>"],
        ),
        verification=Verification(folder="out", num_tensors=9, checks={"hash": 9}, size_bytes=123_456_789),
        evaluations=(
            Evaluation(label="original", source="pydoc", perplexity=_perplexity(20.0, 0.5)),
            Evaluation(label="quantized", source="pydoc", perplexity=_perplexity(23.0, None)),
        ),
        generations=(
            Generation(label="original", result=_generation("Because & so.")),
            Generation(label="quantized", result=_generation("</td><script>")),
        ),
        warnings=("rounded <once>",),
    )
