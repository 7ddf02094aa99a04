# SPDX-License-Identifier: Apache-2.0
"""Token batches: from a text to windows of token ids; `sources.py` says where texts come from."""

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quattuor.calibration.sources import SOURCES, Split, load_text
from quattuor.errors import CalibrationError, InputError, compose

__all__ = ["SOURCES", "Split", "calibration_batches", "evaluation_windows", "load_text"]


def calibration_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    num_samples: int,
    length: int,
    seed: int,
    *,
    max_positions: int | None = None,
) -> Int64[Tensor, "samples T"]:
    """Draw `num_samples` windows of `length` consecutive tokens at uniformly random places.

    Windows may overlap. The same seed gives the same windows on every machine.

    Args:
        tokenizer: Turns the whole text into tokens once, with its own special tokens at the ends.
        text: At least `length` tokens of it.
        num_samples: At least 1.
        length: At least 2 and at most `max_positions`.
        seed: Of the generator that chooses the places.
        max_positions: The longest sequence the model accepts; None when it has no limit.

    Raises:
        InputError: A count is out of range.
        CalibrationError: The text has fewer tokens than one window.
    """
    _check_count("num_samples", num_samples, least=1)
    tokens = _tokens(tokenizer, text, length, max_positions)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length + 1, (num_samples,), generator=generator)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    limit: int | None = None,
    *,
    max_positions: int | None = None,
) -> Int64[Tensor, "windows T"]:
    """Cut the text into consecutive windows of `length` tokens that do not overlap; an incomplete tail is dropped.

    Args:
        tokenizer: Turns the whole text into tokens once, so that no window starts with an extra token.
        text: At least `length` tokens of it.
        length: At least 2 and at most `max_positions`.
        limit: Keep only the first windows; None keeps all.
        max_positions: The longest sequence the model accepts; None when it has no limit.

    Raises:
        InputError: A count is out of range.
        CalibrationError: The text has fewer tokens than one window.
    """
    if limit is not None:
        _check_count("limit", limit, least=1)
    tokens = _tokens(tokenizer, text, length, max_positions)
    num_windows = tokens.numel() // length
    return tokens[: num_windows * length].view(num_windows, length)[:limit]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, max_positions: int | None
) -> Int64[Tensor, " tokens"]:
    """Return the tokens of the whole text, at least `length` of them."""
    _check_count("length", length, least=2)
    if max_positions is not None and length > max_positions:
        raise InputError(
            compose(
                subject="length",
                value=length,
                constraint=f"is longer than the {max_positions} positions of the model",
                place="token windows",
                remedy=f"use at most {max_positions}",
            )
        )
    # verbose=False: the tokenizer would warn that the text exceeds its maximum length, which windows do not
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if tokens.numel() < length:
        raise CalibrationError(
            compose(
                subject="text",
                value=f"{tokens.numel()} tokens",
                constraint=f"is too short for one window of length={length}",
                place="token windows",
                remedy=f"use a longer text, or a length of at most {max(tokens.numel(), 2)}",
            )
        )
    return tokens


def _check_count(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(
            compose(
                subject=name,
                value=value,
                constraint=f"is not an integer of at least {least}",
                place="token windows",
                remedy=f"use {least} or more",
            )
        )
