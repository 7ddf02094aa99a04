# SPDX-License-Identifier: Apache-2.0
"""A real OpenAI client against `quattuor serve` on the CPU."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="needs the extra serve: pip install 'quattuor[serve]'")
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'quattuor[serve]'")
pytest.importorskip("uvicorn", reason="needs the extra serve: pip install 'quattuor[serve]'")

import socket  # noqa: E402

import torch  # noqa: E402
from packed import pack_, recipe_of  # noqa: E402
from tiny_models import tiny_model, tiny_tokenizer  # noqa: E402

from quattuor.checkpoints import save_pretrained  # noqa: E402

LAYOUT = "int4 channel, int8 tokens"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start the command in a process of its own, and return a client of it."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = pack_(tiny_model("llama", dtype=torch.float32), LAYOUT)
    model.config.architectures = ["LlamaForCausalLM"]
    save_pretrained(model, folder, recipe=recipe_of(LAYOUT), tokenizer=tokenizer)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "quattuor.cli", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            time.sleep(0.5)
    else:
        process.kill()
        pytest.fail(f"the server did not start: {process.communicate()[0]}")
    yield client
    process.terminate()
    process.wait(timeout=20)


GREEDY = {"model": "tiny", "temperature": 0.0, "max_tokens": 8}


def complete(client: Any, prompt: str = "To be", **options: Any) -> Any:
    return client.completions.create(prompt=prompt, **{**GREEDY, **options})


def test_the_model_has_the_name_of_its_folder(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_completion(client: Any) -> None:
    answer = complete(client)
    assert answer.usage.prompt_tokens == 5
    assert 1 <= answer.usage.completion_tokens <= 8
    assert complete(client).choices[0].text == answer.choices[0].text


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **GREEDY)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len("user: hello\nassistant: ")


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    chunks = list(complete(client, stream=True))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == complete(client).choices[0].text
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content
    pieces = client.chat.completions.create(messages=messages, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices) == whole


def test_stop_words(client: Any) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    stop = next(letter for letter in whole[1:] if letter.isascii() and letter.isalpha())
    stopped = complete(client, max_tokens=24, stop=[stop]).choices[0].text
    assert stopped == whole[: whole.index(stop) + 1]  # transformers keeps the stop word in the answer
    assert len(stopped) < len(whole)


def test_stop_words_in_a_chat_that_streams(client: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    options = {**GREEDY, "max_tokens": 24}
    whole = client.chat.completions.create(messages=messages, **options).choices[0].message.content
    stop = next(letter for letter in whole[1:] if letter.isascii() and letter.isalpha())
    pieces = client.chat.completions.create(messages=messages, stream=True, stop=[stop], **options)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole[: whole.index(stop) + 1]


def test_a_wrong_model_name(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist; this server has 'tiny'"):
        complete(client, model="other")


def test_a_wrong_model_name_in_a_chat_that_streams(client: Any) -> None:
    options = {**GREEDY, "model": "other", "stream": True}
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "hello"}], **options)
    assert caught.value.code == "model_not_found"


def test_a_chat_that_is_too_long(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"context is \d+ tokens; the prompt has \d{4}") as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "x" * 4000}], **GREEDY)
    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_that_fits_exactly_and_one_token_more(client: Any) -> None:
    assert complete(client, prompt="x" * 255, max_tokens=1).usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError, match="no room for 2 tokens"):
        complete(client, prompt="x" * 255, max_tokens=2)


def test_a_prompt_that_is_too_long(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"context is \d+ tokens; the prompt has 5000") as caught:
        complete(client, prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no room for 100000 tokens"):
        complete(client, max_tokens=100000)


def test_a_body_that_is_not_json(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        client.post("/completions", cast_to=object, content=b"{", options={"headers": {"content-type": "text"}})


def test_a_client_that_disconnects(client: Any) -> None:
    for _ in range(3):
        stream = complete(client, stream=True, max_tokens=64)
        next(iter(stream))
        stream.close()
    started = time.monotonic()
    assert complete(client).usage.completion_tokens >= 1
    assert time.monotonic() - started < 30
