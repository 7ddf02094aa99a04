# SPDX-License-Identifier: Apache-2.0
"""Text generation, greedy or sampled, with its speed."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quattuor.errors import CalibrationError, InputError, UnsupportedError, compose
from quattuor.progress import Progress, Silent

__all__ = ["GenerationResult", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A generated text.

    Args:
        prompt: What was asked, as given.
        text: What the model added, without special tokens.
        num_prompt_tokens: Tokens of the prompt, special ones included.
        num_new_tokens: Tokens the model added, an end token included.
        seconds: Duration from the first forward pass to the last token.
        tokens_per_second: num_new_tokens / seconds, so the prompt's own pass counts as time.
    """

    prompt: str
    text: str
    num_prompt_tokens: int
    num_new_tokens: int
    seconds: float
    tokens_per_second: float


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    progress: Progress | None = None,
) -> GenerationResult:
    """Continue a prompt until an end token or `max_new_tokens`.

    Args:
        model: A causal language model; left in the mode, training or evaluation, in which it came.
        tokenizer: The model's own.
        prompt: Text to continue, or with `chat` the user's turn of a conversation.
        max_new_tokens: At least 1.
        temperature: 0 takes the likeliest token every time; above 0 samples from softmax(logits / temperature).
        seed: Of the generator that samples; no effect when greedy.
        chat: Wrap the prompt in the tokenizer's chat template.
        progress: Hears of one step per token.

    Raises:
        InputError: The prompt has no tokens, or a number is out of range.
        UnsupportedError: `chat` is asked of a tokenizer without a chat template.
        CalibrationError: The logits of a step are not finite.
    """
    progress = progress or Silent()
    _check(max_new_tokens, temperature)
    tokens = _prompt_tokens(tokenizer, prompt, chat).to(model.device)
    ends = _end_tokens(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.train(False)
    new: list[int] = []
    cache = None
    inputs = tokens
    started_s = time.perf_counter()
    progress.start("generate", max_new_tokens)
    try:
        while len(new) < max_new_tokens and not (new and new[-1] in ends):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            new.append(_next_token(output.logits[0, -1], temperature, generator, step=len(new)))
            inputs = torch.tensor([new[-1:]], device=model.device)
            progress.advance("generate")
    finally:
        progress.finish("generate")
        model.train(was_training)
    seconds = time.perf_counter() - started_s
    return GenerationResult(
        prompt=prompt,
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        num_prompt_tokens=tokens.shape[1],
        num_new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )


def _next_token(logits: Float[Tensor, " V"], temperature: float, generator: torch.Generator, step: int) -> int:
    """Return the likeliest token, or one sampled on the CPU so that a seed means the same on every device."""
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits).any()) or bool(logits.isnan().any()):
        raise CalibrationError(
            compose(
                subject="logits",
                value="NaN or no finite value",
                constraint="name no next token",
                place=f"generate, token {step}",
                remedy="look for NaN in the weights; `quattuor verify` checks a quantized folder",
            )
        )
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Int64[Tensor, "1 T"]:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UnsupportedError(
            compose(
                subject="chat",
                value=True,
                constraint="needs a chat template, which this tokenizer lacks",
                place="generate",
                remedy="give the prompt as plain text",
            )
        )
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise InputError(
            compose(
                subject="prompt",
                value=prompt,
                constraint="has no tokens",
                place="generate",
                remedy="give at least one word",
            )
        )
    return torch.tensor([tokens], dtype=torch.int64)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect the end tokens of the generation settings, the configuration and the tokenizer."""
    ends: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ends.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(ends)


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise InputError(
            compose(
                subject="max_new_tokens",
                value=max_new_tokens,
                constraint="is not positive",
                place="generate",
                remedy="use 1 or more",
            )
        )
    if not 0 <= temperature < float("inf"):
        raise InputError(
            compose(
                subject="temperature",
                value=temperature,
                constraint="is not a finite number of at least 0",
                place="generate",
                remedy="use 0 for the likeliest tokens, or about 0.7 to sample",
            )
        )
