# SPDX-License-Identifier: Apache-2.0
"""Compares a checkpoint in vLLM with the same checkpoint in transformers on one GPU: the record `serve_equality`.

    python -m benchmarks.end_to_end.serve_equality DIR [--prompts 64] [--new-tokens 64] [--windows 8] [--json FILE]

vLLM continues each prompt greedily. transformers, on the same integer kernels, then reads prompt and continuation
in one pass: where its likeliest token differs from vLLM's for the first time, the record holds the place and by
how much the logits differ. Its perplexity is that of its prompt logprobs.

The engines round elsewhere: in attention, in norms, in residual sums. A last bit moves an activation across the
boundary between two 8-bit codes, and what follows differs by a whole step. So transformers reads everything a
second time with every norm's output off by up to one float16 rounding error (relative 2^-11, random): the row
`rounding` says how far the checkpoint then differs from itself. A served model is right when it differs no more.
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

__all__ = ["RECORD", "compare", "disturb_norms", "main", "read"]

RECORD = "serve_equality"
PROMPT_LENGTH, WINDOW_LENGTH = 32, 512

#: Spacing of float16 numbers relative to their size, at most.
ROUNDING = 2**-11

Row = dict[str, str | int | float | bool | None]
Reading = dict[str, Any]


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
        served, own = (json.loads((work / f"{stage}.json").read_text()) for stage in ("vllm", "transformers"))
    rows = compare(options.folder.name, served, own["exact"], own["rounded"])
    for row in rows:
        print(json.dumps(row), flush=True)
    record.write(RECORD, rows, to=options.json)
    return 0


def compare(name: str, served: Reading, exact: Reading, rounded: Reading) -> list[Row]:
    """Return how far vLLM is from transformers, how far transformers is from itself, and each divergence.

    Args:
        name: Of the checkpoint.
        served: `losses` of vLLM, in nats per token.
        exact: `losses` of transformers; for each prompt `tokens`, the likeliest at every new place, and `gaps`,
            how far the logit of vLLM's token lies below the largest.
        rounded: The same with every norm's output off by a rounding error; `gaps` are those of `exact`'s tokens.
    """
    divergences: list[Row] = []
    for index, gaps in enumerate(exact["gaps"]):
        place = next((place for place, gap in enumerate(gaps) if gap > 0), None)
        if place is not None:
            divergences.append({"row": "divergence", "prompt": index, "token": place, "logit_gap": gaps[place]})
    rows = []
    for kind, losses, gaps in (
        ("served", served["losses"], exact["gaps"]),
        ("rounding", rounded["losses"], rounded["gaps"]),
    ):
        places = [gap for prompt in gaps for gap in prompt]
        apart = sorted(gap for gap in places if gap > 0)
        rows.append(
            {
                "row": kind,
                "checkpoint": name,
                "prompts": len(gaps),
                "identical_prompts": sum(not any(prompt) for prompt in gaps),
                "new_tokens": len(places),
                "agreeing_share": 1 - len(apart) / len(places),
                "median_logit_gap": apart[len(apart) // 2] if apart else 0.0,
                "largest_logit_gap": apart[-1] if apart else 0.0,
                "perplexity": _perplexity(losses),
                "perplexity_transformers": _perplexity(exact["losses"]),
                "relative_difference": _perplexity(losses) / _perplexity(exact["losses"]) - 1,
                "scored_tokens": len(losses),
            }
        )
    return [*rows, *divergences]


def _perplexity(losses: Sequence[float]) -> float:
    return math.exp(sum(losses) / len(losses))


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
) -> dict[str, Reading]:
    import torch
    from transformers import AutoModelForCausalLM

    import quattuor  # noqa: F401  (registers the format)

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.to("cuda")
    exact = read(model, texts, new_tokens, new_tokens)
    torch.manual_seed(0)
    disturb_norms(model)
    return {"exact": exact, "rounded": read(model, texts, new_tokens, exact["tokens"])}


def read(
    model: Any, texts: dict[str, list[list[int]]], new_tokens: list[list[int]], expected: list[list[int]]
) -> Reading:
    """Return likeliest tokens, how far the logits of the expected ones lie below, and losses of the windows.

    Args:
        model: Of transformers.
        texts: `prompts`, and `windows` to score.
        new_tokens: What was read after each prompt.
        expected: Tokens at the same places.
    """
    import torch

    tokens, gaps, losses = [], [], []
    with torch.inference_mode():
        for prompt, continuation, wanted in zip(texts["prompts"], new_tokens, expected, strict=True):
            whole = torch.tensor([prompt + continuation], device=model.device)
            logits = model(whole).logits[0, len(prompt) - 1 : -1].float()
            largest = logits.max(dim=1)
            chosen = torch.tensor(wanted, device=model.device).unsqueeze(1)
            tokens.append(largest.indices.tolist())
            gaps.append((largest.values - logits.gather(1, chosen).squeeze(1)).tolist())
        for window in texts["windows"]:
            whole = torch.tensor([window], device=model.device)
            logits = model(whole).logits[0, :-1].float()
            losses += torch.nn.functional.cross_entropy(logits, whole[0, 1:], reduction="none").tolist()
    return {"tokens": tokens, "gaps": gaps, "losses": losses}


def disturb_norms(model: Any) -> None:
    """Let the output of every norm be off by a random rounding error, relative `ROUNDING` at most."""
    import torch

    def disturb(module: Any, inputs: Any, output: "torch.Tensor") -> "torch.Tensor":
        noise = 2 * torch.rand_like(output, dtype=torch.float32) - 1
        return (output * (1 + ROUNDING * noise)).to(output.dtype)

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(disturb)


if __name__ == "__main__":
    sys.exit(main())
