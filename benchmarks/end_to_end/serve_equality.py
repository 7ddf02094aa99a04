# SPDX-License-Identifier: Apache-2.0
"""Compares a checkpoint in vLLM with the same checkpoint in transformers on one GPU: the record `serve_equality`.

    python -m benchmarks.end_to_end.serve_equality DIR [--prompts 64] [--new-tokens 64] [--windows 8] [--json FILE]

vLLM continues each prompt greedily. transformers, on the same integer kernels, then reads prompt and continuation
in one pass: where its likeliest token differs from vLLM's for the first time, the record holds the place and by
how much the logits differ; a gap of a few float16 steps is a tie. Its perplexity is that of its prompt logprobs.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

__all__ = ["RECORD", "compare", "main"]

RECORD = "serve_equality"
PROMPT_LENGTH, WINDOW_LENGTH = 32, 512

Row = dict[str, str | int | float | bool | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end.serve_equality", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", choices=["vllm", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        _write_stage(options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "texts.json").write_text(json.dumps(_texts(options)), encoding="utf-8")
        for stage in ("vllm", "transformers"):  # one after the other: each takes the device's memory
            command = [sys.executable, "-m", "benchmarks.end_to_end.serve_equality", str(options.folder)]
            command += ["--stage", stage, "--work", name, "--new-tokens", str(options.new_tokens)]
            subprocess.run(command, check=True, env={**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0"})
        stages = {stage: json.loads((work / f"{stage}.json").read_text()) for stage in ("vllm", "transformers")}
    rows = compare(options.folder.name, stages["vllm"], stages["transformers"])
    for row in rows:
        print(json.dumps(row), flush=True)
    record.write(RECORD, rows, to=options.json)
    return 0


def compare(name: str, served: dict[str, Any], reference: dict[str, Any]) -> list[Row]:
    """Return a summary, and one row for each prompt whose continuation diverges.

    Args:
        name: Of the checkpoint.
        served: `losses` of vLLM, in nats per token.
        reference: `losses` of transformers; for each prompt `agrees` and `gaps` at every new token: whether it is
            the likeliest one, and how far its logit lies below the largest.
    """
    divergences: list[Row] = []
    num_tokens = 0
    for index, (agrees, gaps) in enumerate(zip(reference["agrees"], reference["gaps"], strict=True)):
        num_tokens += len(agrees)
        if not all(agrees):
            place = agrees.index(False)
            divergences.append({"row": "divergence", "prompt": index, "token": place, "logit_gap": gaps[place]})
    perplexities = [math.exp(sum(side["losses"]) / len(side["losses"])) for side in (served, reference)]
    summary: Row = {
        "row": "summary",
        "checkpoint": name,
        "prompts": len(reference["agrees"]),
        "identical_prompts": len(reference["agrees"]) - len(divergences),
        "new_tokens": num_tokens,
        "largest_logit_gap": max((float(row["logit_gap"] or 0) for row in divergences), default=0.0),
        "perplexity_vllm": perplexities[0],
        "perplexity_transformers": perplexities[1],
        "relative_difference": perplexities[0] / perplexities[1] - 1,
        "scored_tokens": len(served["losses"]),
    }
    return [summary, *divergences]


def _texts(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Return prompts and windows as tokens."""
    from transformers import AutoTokenizer

    from quattuor.calibration.data import evaluation_windows, load_text

    tokenizer, text = AutoTokenizer.from_pretrained(options.folder), load_text("pydoc", "evaluation")
    prompts = evaluation_windows(tokenizer, text, PROMPT_LENGTH, options.prompts)
    windows = evaluation_windows(tokenizer, text, WINDOW_LENGTH, options.windows)
    return {"prompts": prompts.tolist(), "windows": windows.tolist()}


def _write_stage(options: argparse.Namespace) -> None:
    texts = json.loads((options.work / "texts.json").read_text())
    if options.stage == "vllm":
        result = _run_vllm(options, texts)
    else:
        new_tokens = json.loads((options.work / "vllm.json").read_text())["new_tokens"]
        result = _run_transformers(options.folder, texts, new_tokens)
    (options.work / f"{options.stage}.json").write_text(json.dumps(result), encoding="utf-8")


def _run_vllm(options: argparse.Namespace, texts: dict[str, list[list[int]]]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(options.folder),
        dtype="float16",
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
        compilation_config={"cudagraph_capture_sizes": [1, 16, 64]},
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=options.new_tokens, ignore_eos=True, detokenize=False)
    print("engine ready", flush=True)
    prompts = [{"prompt_token_ids": tokens} for tokens in texts["prompts"]]
    outputs = engine.generate(prompts, sampling_params=greedy, use_tqdm=False)
    print("prompts continued", flush=True)
    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    windows = [{"prompt_token_ids": tokens} for tokens in texts["windows"]]
    losses = []
    for window, output in zip(
        texts["windows"], engine.generate(windows, sampling_params=scoring, use_tqdm=False), strict=True
    ):
        losses += [-output.prompt_logprobs[place][window[place]].logprob for place in range(1, len(window))]
    return {"new_tokens": [list(output.outputs[0].token_ids) for output in outputs], "losses": losses}


def _run_transformers(
    folder: Path, texts: dict[str, list[list[int]]], new_tokens: list[list[int]]
) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    import quattuor  # noqa: F401  (registers the format)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to("cuda")
    agrees, gaps, losses = [], [], []
    with torch.inference_mode():
        for prompt, continuation in zip(texts["prompts"], new_tokens, strict=True):
            tokens = torch.tensor([prompt + continuation], device="cuda")
            logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
            chosen = torch.tensor(continuation, device="cuda").unsqueeze(1)
            below = (logits.amax(dim=1, keepdim=True) - logits.gather(1, chosen)).squeeze(1)
            agrees.append((logits.argmax(dim=1, keepdim=True) == chosen).squeeze(1).tolist())
            gaps.append(below.tolist())
        for window in texts["windows"]:
            tokens = torch.tensor([window], device="cuda")
            logits = model(tokens).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
    return {"agrees": agrees, "gaps": gaps, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
