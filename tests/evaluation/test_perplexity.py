# SPDX-License-Identifier: Apache-2.0
"""Perplexity against hand computations, its standard error, and what a broken model says."""

import math

import pytest
import torch

from quattuor.errors import CalibrationError, InputError
from quattuor.evaluation import perplexity as perplexity_module
from quattuor.evaluation.perplexity import TOKEN_CHUNK, perplexity
from quattuor.progress import Progress


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 255, (5, 24), generator=torch.Generator().manual_seed(1))


def _hand_nll(model, window):
    """Return -mean_t log p(token t+1 | tokens 0 .. t) of one window, in float64, token by token."""
    probabilities = model(window[None]).logits[0].double().softmax(-1)
    picked = [probabilities[position, window[position + 1]].log().item() for position in range(len(window) - 1)]
    return -sum(picked) / len(picked)


@torch.no_grad()
def test_perplexity_equals_the_hand_computation(tiny, windows):
    model = tiny("llama")
    by_hand = [_hand_nll(model, window) for window in windows]
    result = perplexity(model, windows)
    mean = sum(by_hand) / 5
    spread = math.sqrt(sum((value - mean) ** 2 for value in by_hand) / 4)
    assert result.nll == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(math.exp(mean) * spread / math.sqrt(5), rel=1e-5)
    assert (result.num_windows, result.num_tokens, result.length) == (5, 5 * 23, 24)
    assert result.seconds > 0


def test_batches_and_chunks_do_not_change_the_result(tiny, windows, monkeypatch):
    model = tiny("llama")
    alone = perplexity(model, windows)
    assert perplexity(model, windows, batch_size=2).nll == pytest.approx(alone.nll, rel=1e-6)
    monkeypatch.setattr(perplexity_module, "TOKEN_CHUNK", 7)
    assert perplexity(model, windows).nll == pytest.approx(alone.nll, rel=1e-6)
    assert TOKEN_CHUNK > 24


def test_a_model_that_knows_nothing_has_the_perplexity_of_the_vocabulary(tiny, windows):
    model = tiny("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, windows)
    assert result.perplexity == pytest.approx(256, rel=1e-5)
    assert result.perplexity_stderr == pytest.approx(0, abs=1e-3)


def test_one_window_has_no_standard_error(tiny, windows):
    assert perplexity(tiny("llama"), windows[:1]).perplexity_stderr is None


def test_nan_names_the_window(tiny, windows):
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[251] = torch.nan
    spoilt = windows.clone()
    spoilt[spoilt == 251] = 250
    spoilt[3, 5] = 251
    with pytest.raises(CalibrationError, match="window 3") as error:
        perplexity(model, spoilt, batch_size=2)
    assert "negative log-likelihood=nan" in str(error.value)


def test_the_mode_of_the_model_is_left_alone(tiny, windows):
    model = tiny("opt").train()
    perplexity(model, windows)
    assert model.training
    assert perplexity(model.eval(), windows) is not None
    assert not model.training


def test_progress_hears_of_every_window(tiny, windows):
    events = []

    class Recorder(Progress):
        def start(self, task, total=None):
            events.append(("start", task, total))

        def advance(self, task, steps=1, note=""):
            events.append(("advance", task, steps))

        def finish(self, task):
            events.append(("finish", task))

    perplexity(tiny("llama"), windows, batch_size=2, progress=Recorder())
    steps = [event[2] for event in events if event[0] == "advance"]
    assert events[0] == ("start", "perplexity", 5)
    assert steps == [2, 2, 1]
    assert events[-1] == ("finish", "perplexity")


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_windows_without_a_token_to_predict_are_refused(tiny, shape):
    with pytest.raises(InputError, match=r"windows\.shape"):
        perplexity(tiny("llama"), torch.zeros(shape, dtype=torch.int64))


def test_a_batch_size_below_one_is_refused(tiny, windows):
    with pytest.raises(InputError, match="batch_size=0"):
        perplexity(tiny("llama"), windows, batch_size=0)
