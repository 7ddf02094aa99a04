# SPDX-License-Identifier: Apache-2.0
"""The same OpenAI-compatible endpoints without a GPU: transformers' own server, with requests checked first.

transformers answers a wrong model name with the path of the folder, and does not look at the length of a prompt;
`RequestChecks` does both, with the errors that clients of the protocol expect.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from quattuor.errors import UnsupportedError, compose

__all__ = ["RequestChecks", "make_server"]

DEFAULT_NEW_TOKENS = 1024
"""Of a request that asks for no number, when there is room for so many."""

_ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
_LIMITS = ("max_tokens", "max_completion_tokens")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequestChecks:
    """An ASGI application in front of another: knows one model by one name, and its context length.

    Args:
        app: Answers what passes.
        name: The model's name for clients.
        path: Its name for `app`.
        tokenizer: Counts the tokens of prompts.
        max_positions: Tokens of prompt and answer together.
    """

    def __init__(self, app: Any, *, name: str, path: str, tokenizer: Any, max_positions: int) -> None:
        """Keep the facts."""
        self.app, self.name, self.path = app, name, path
        self.tokenizer, self.max_positions = tokenizer, max_positions

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/v1/models" and scope["method"] == "GET":
            model = {"id": self.name, "object": "model", "created": 0, "owned_by": "quattuor"}
            await _answer(send, 200, {"object": "list", "data": [model]})
        elif scope["path"] in _ENDPOINTS and scope["method"] == "POST":
            await self._check(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _check(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        try:
            request = json.loads(body)
        except json.JSONDecodeError as error:
            await _refuse(send, 400, f"the body is not JSON: {error}", "invalid_json")
            return
        problem = self.problem(request) if isinstance(request, dict) else (400, "the body is no object", "invalid")
        if problem is not None:
            await _refuse(send, *problem)
            return
        passed = json.dumps(request | {"model": self.path}).encode()
        headers = [item for item in scope["headers"] if item[0] != b"content-length"]
        headers.append((b"content-length", str(len(passed)).encode()))
        await self.app({**scope, "headers": headers}, _replay(passed, receive), send)

    def problem(self, request: dict[str, Any]) -> tuple[int, str, str] | None:
        """Return status, message and code of a request that cannot be answered; give others a limit that fits."""
        if request.get("model") != self.name:
            message = f"the model {request.get('model')!r} does not exist; this server has {self.name!r}"
            return 404, message, "model_not_found"
        length = self._prompt_length(request)
        if length is None:
            return None  # the server's own validation says what is wrong
        asked = next((int(request[key]) for key in _LIMITS if request.get(key) is not None), None)
        room = self.max_positions - length
        if room < 1 or (asked is not None and asked > room):
            answer = "no token of an answer" if asked is None else f"{asked} tokens of an answer"
            message = (
                f"this model's context is {self.max_positions} tokens; the prompt has {length}, which leaves no "
                f"room for {answer}. Shorten the prompt or lower max_tokens"
            )
            return 400, message, "context_length_exceeded"
        if asked is None:
            request["max_tokens"] = min(DEFAULT_NEW_TOKENS, room)
        return None

    def _prompt_length(self, request: dict[str, Any]) -> int | None:
        messages, prompt = request.get("messages"), request.get("prompt")
        if isinstance(messages, list) and self.tokenizer.chat_template is not None:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return len(self.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else None


def make_server(folder: Path, *, host: str, port: int, device: str = "cpu", name: str | None = None) -> Any:
    """Load a model and return the uvicorn server that answers for it; `run()` serves until it is interrupted.

    Args:
        folder: A checkpoint with a tokenizer.
        host: Address to listen on.
        port: Port to listen on.
        device: Where the model runs.
        name: The model's name for clients; by default the folder's.

    Raises:
        UnsupportedError: The packages of the extra "serve" are missing, or the folder has no tokenizer.
    """
    if not is_serve_available():
        missing = "fastapi, uvicorn, openai or pydantic"
        raise _unavailable("packages", missing, "are missing", "pip install 'quattuor[serve]'")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise _unavailable("tokenizer", "missing", f"is not in {folder}", "save the model's tokenizer there")
    from transformers.cli.serve import Serve

    class Prepared(Serve):
        """The server before it listens."""

        def start_server(self) -> None:
            """Leave the start to the caller."""

    path = str(folder)
    prepared = Prepared(force_model=path, device=device, host=host, port=port, non_blocking=True)
    config, server = AutoConfig.from_pretrained(folder), prepared.server
    server.config.app = RequestChecks(
        server.config.app,
        name=name or folder.resolve().name,
        path=path,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        max_positions=int(config.get_text_config().max_position_embeddings),
    )
    return server


async def _read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body once, and then waits for the client, who may disconnect."""
    pending = [body]

    async def replayed() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replayed


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    await _answer(send, status, {"error": error})


async def _answer(send: Send, status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _unavailable(subject: str, value: str, constraint: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(
        compose(subject=subject, value=value, constraint=constraint, place="quattuor serve", remedy=remedy)
    )
