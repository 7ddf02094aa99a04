# SPDX-License-Identifier: Apache-2.0
"""Generation: greedy equals a loop without a cache, sampling follows its seed, ends and errors."""

import pytest
import torch

from quattuor.errors import CalibrationError, InputError, UnsupportedError
from quattuor.evaluation.generation import generate


@torch.no_grad()
def test_greedy_equals_a_loop_without_a_cache(tiny, tokenizer):
    model = tiny("llama")
    tokens = tokenizer("Once upon", return_tensors="pt")["input_ids"]
    prompt_length = tokens.shape[1]
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    result = generate(model, tokenizer, "Once upon", max_new_tokens=12)
    assert 255 not in tokens[0], "the seed of the tiny model must not end the text early"
    assert result.text == tokenizer.decode(tokens[0, prompt_length:])
    assert (result.num_prompt_tokens, result.num_new_tokens) == (9, 12)
    assert result.tokens_per_second == pytest.approx(12 / result.seconds)


def test_sampling_follows_its_seed_and_no_other(tiny, tokenizer):
    model = tiny("llama")
    first = generate(model, tokenizer, "Once", max_new_tokens=16, temperature=1.0, seed=1)
    state = torch.get_rng_state()
    again = generate(model, tokenizer, "Once", max_new_tokens=16, temperature=1.0, seed=1)
    other = generate(model, tokenizer, "Once", max_new_tokens=16, temperature=1.0, seed=2)
    assert again.text == first.text != other.text
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_at_a_low_temperature_is_greedy(tiny, tokenizer):
    model = tiny("llama")
    greedy = generate(model, tokenizer, "Once", max_new_tokens=12)
    assert generate(model, tokenizer, "Once", max_new_tokens=12, temperature=1e-4).text == greedy.text


def test_generation_stops_at_an_end_token(tiny, tokenizer):
    model = tiny("llama")
    tokens = tokenizer("Once", return_tensors="pt")["input_ids"]
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    new = tokens[0, 4:].tolist()
    model.generation_config.eos_token_id = [new[2]]
    expected = new.index(new[2]) + 1
    assert generate(model, tokenizer, "Once", max_new_tokens=6).num_new_tokens == expected < 6


def test_a_chat_template_wraps_the_prompt(tiny, tokenizer):
    model = tiny("llama")
    with pytest.raises(UnsupportedError, match="chat template"):
        generate(model, tokenizer, "Hi", chat=True)
    templated = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    templated.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<bot>"
    chat = generate(model, templated, "Hi", chat=True, max_new_tokens=4)
    assert chat.num_prompt_tokens == len("<user>Hi<bot>")
    assert chat.text == generate(model, tokenizer, "<user>Hi<bot>", max_new_tokens=4).text


def test_nan_names_the_token(tiny, tokenizer):
    model = tiny("llama")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(CalibrationError, match="generate, token 0"):
        generate(model, tokenizer, "Once")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_wrong_arguments_are_input_errors(tiny, tokenizer, arguments, message):
    with pytest.raises(InputError) as error:
        generate(tiny("llama"), tokenizer, **({"prompt": "Once"} | arguments))
    assert message in str(error.value)
