# SPDX-License-Identifier: Apache-2.0
"""Windows of token ids: which tokens, which order, and what too little text says."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quattuor.calibration.data import calibration_batches, evaluation_windows
from quattuor.errors import CalibrationError, InputError


@pytest.fixture(scope="module")
def tokenizer():
    """Gives the word "17" the token 17."""
    tokenizer = Tokenizer(WordLevel({str(index): index for index in range(1000)}, unk_token="0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _counting(num_tokens):
    return " ".join(map(str, range(num_tokens)))


def test_evaluation_windows_are_consecutive_and_drop_the_tail(tokenizer):
    windows = evaluation_windows(tokenizer, _counting(103), 10)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, torch.arange(100).view(10, 10))


def test_limit_keeps_the_first_windows(tokenizer):
    assert torch.equal(evaluation_windows(tokenizer, _counting(103), 10, 3), torch.arange(30).view(3, 10))
    assert evaluation_windows(tokenizer, _counting(103), 10, 99).shape == (10, 10)


def test_calibration_batches_are_windows_of_consecutive_tokens(tokenizer):
    batches = calibration_batches(tokenizer, _counting(500), 64, 12, seed=3)
    assert batches.shape == (64, 12)
    assert batches.dtype == torch.int64
    assert torch.equal(batches, batches[:, :1] + torch.arange(12))
    assert len(set(batches[:, 0].tolist())) > 40


def test_calibration_batches_depend_on_the_seed_alone(tokenizer):
    text = _counting(500)
    torch.manual_seed(0)
    first = calibration_batches(tokenizer, text, 8, 12, seed=3)
    state = torch.get_rng_state()
    again = calibration_batches(tokenizer, text, 8, 12, seed=3)
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, calibration_batches(tokenizer, text, 8, 12, seed=4))


def test_calibration_batches_reach_both_ends_of_the_text(tokenizer):
    batches = calibration_batches(tokenizer, _counting(12), 64, 10, seed=0)
    assert {row[0] for row in batches.tolist()} == {0, 1, 2}


def test_a_text_of_exactly_one_window_is_enough(tokenizer):
    text = _counting(16)
    assert torch.equal(calibration_batches(tokenizer, text, 2, 16, seed=0), torch.arange(16).expand(2, 16))
    assert torch.equal(evaluation_windows(tokenizer, text, 16), torch.arange(16).expand(1, 16))


@pytest.mark.parametrize("cut", [evaluation_windows, lambda *args: calibration_batches(*args[:2], 4, args[2], 0)])
def test_too_little_text_names_tokens_found_and_needed(tokenizer, cut):
    with pytest.raises(CalibrationError, match="text=15 tokens is too short for one window of length=16"):
        cut(tokenizer, _counting(15), 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 is not an integer of at least 1"),
        ({"num_samples": True}, "num_samples=True"),
        ({"length": 1}, "length=1 is not an integer of at least 2"),
        ({"max_positions": 8}, "length=10 is longer than the 8 positions of the model; use at most 8"),
    ],
)
def test_counts_out_of_range_are_input_errors(tokenizer, changes, message):
    arguments = {"num_samples": 2, "length": 10, "seed": 0} | changes
    with pytest.raises(InputError) as error:
        calibration_batches(tokenizer, _counting(50), **arguments)
    assert message in str(error.value)


def test_a_limit_below_one_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match="limit=0"):
        evaluation_windows(tokenizer, _counting(50), 10, 0)
    with pytest.raises(InputError, match="length=10 is longer than the 8 positions"):
        evaluation_windows(tokenizer, _counting(50), 10, max_positions=8)
