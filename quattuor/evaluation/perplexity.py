# SPDX-License-Identifier: Apache-2.0
"""Perplexity over windows that do not overlap, with its standard error."""

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from quattuor.errors import CalibrationError, InputError, compose
from quattuor.progress import Progress, Silent

__all__ = ["PerplexityResult", "perplexity"]

#: Tokens whose log-probabilities are computed at once: 512 x 150 000 float32 values are 300 MB.
TOKEN_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """A measured perplexity.

    Invariant: perplexity = exp(nll).

    Args:
        perplexity: exp of the mean negative log-likelihood of a token.
        perplexity_stderr: Its standard error over windows; None for a single window, which has no spread.
        nll: Mean negative log-likelihood in nats per token.
        num_windows: Windows evaluated.
        num_tokens: Tokens predicted: one fewer per window than its length.
        length: Tokens of a window.
        seconds: Duration of the forward passes.
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    num_windows: int
    num_tokens: int
    length: int
    seconds: float


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Int64[Tensor, "windows T"],
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure perplexity = exp(mean over windows of the mean -log p(token | the window's earlier tokens)).

    The standard error follows from the delta method: perplexity * std(window nll) / sqrt(num_windows). It tells of
    the choice of the text; the difference between two models on the same windows is far more certain than that.
    Computes the log-softmax in float32, a few hundred tokens at a time; only the logits of one batch are held.

    Args:
        model: A causal language model; left in the mode, training or evaluation, in which it came.
        windows: Token ids, at least two per window.
        batch_size: Windows in one forward pass.
        progress: Hears of one step per window.

    Raises:
        InputError: There is no window, no token to predict, or the batch size is not positive.
        CalibrationError: The negative log-likelihood of a window is not finite; the message names the window.
    """
    progress = progress or Silent()
    num_windows, length = _check(windows, batch_size)
    was_training = model.training
    model.train(False)
    started_s = time.perf_counter()
    window_nll: list[float] = []
    progress.start("perplexity", num_windows)
    try:
        for batch in torch.split(windows, batch_size):
            window_nll += _window_nll(model, batch.to(model.device), first_window=len(window_nll))
            progress.advance("perplexity", len(batch), f"{math.exp(sum(window_nll) / len(window_nll)):.2f}")
    finally:
        progress.finish("perplexity")
        model.train(was_training)
    nll = torch.tensor(window_nll, dtype=torch.float64)
    mean = float(nll.mean())
    return PerplexityResult(
        perplexity=math.exp(mean),
        perplexity_stderr=math.exp(mean) * float(nll.std()) / math.sqrt(num_windows) if num_windows > 1 else None,
        nll=mean,
        num_windows=num_windows,
        num_tokens=num_windows * (length - 1),
        length=length,
        seconds=time.perf_counter() - started_s,
    )


def _window_nll(model: PreTrainedModel, batch: Int64[Tensor, "B T"], first_window: int) -> list[float]:
    """Return the mean negative log-likelihood of each window of a batch."""
    logits = model(input_ids=batch, use_cache=False).logits
    means = []
    for index, (window_logits, tokens) in enumerate(zip(logits, batch, strict=True), start=first_window):
        mean = float(_token_nll(window_logits[:-1], tokens[1:]).double().mean())
        # exp of anything beyond 700 overflows a float; a broken model, not a bad one
        if not mean < 700:
            raise CalibrationError(
                compose(
                    subject="negative log-likelihood",
                    value=mean,
                    constraint="is not a finite number that has a perplexity",
                    place=f"perplexity, window {index}",
                    remedy="look for NaN in the weights; `quattuor verify` checks a quantized folder",
                )
            )
        means.append(mean)
    return means


def _token_nll(logits: Float[Tensor, "T V"], targets: Int64[Tensor, " T"]) -> Float[Tensor, " T"]:
    chunks = zip(torch.split(logits, TOKEN_CHUNK), torch.split(targets, TOKEN_CHUNK), strict=True)
    return torch.cat([F.cross_entropy(chunk.float(), target, reduction="none") for chunk, target in chunks])


def _check(windows: Tensor, batch_size: int) -> tuple[int, int]:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(
            compose(
                subject="windows.shape",
                value=tuple(windows.shape),
                constraint="is not [windows, T] with at least one window of at least 2 tokens",
                place="perplexity",
                remedy="cut a text with evaluation_windows",
            )
        )
    if batch_size < 1:
        raise InputError(
            compose(
                subject="batch_size",
                value=batch_size,
                constraint="is not positive",
                place="perplexity",
                remedy="use 1 or more windows per forward pass",
            )
        )
    return windows.shape[0], windows.shape[1]
