"""Whatever a client sends, it gets an answer in its API's shape that says what is wrong."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway.server import application

if TYPE_CHECKING:
    from coase.agents.compute.ports import Prompt

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"),
    *("/v1/messages/count_tokens", "/api/chat", "/api/generate", "/api/embed", "/api/show"),
)
FIELDS = (
    *("model", "messages", "prompt", "input", "system", "stream", "stream_options", "options"),
    *("format", "response_format", "tools", "tool_choice", "thinking", "think", "images"),
    *("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_sequences", "n"),
    *("logprobs", "top_logprobs", "metadata", "user", "coase", "models", "keep_alive", "raw"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 1.5, 1e308, 2**70, "", "x", "\ud800", "\x00", "y" * 3_000, [], {}, [[]]),
    *([None], [{}], {"a": 1}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
    [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{}]}],
    [{"type": "function", "function": {"name": "a b", "parameters": 3}}],
)
GOOD: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "one two"}],
    "prompt": "one",
    "input": "one",
    "max_tokens": 5,
    "stream": False,
}


def asked(chance: random.Random) -> bytes:
    """Return a body with up to three fields that are not what they should be, or bytes."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(60))
    body = {**GOOD, **{chance.choice(FIELDS): chance.choice(VALUES) for _ in range(3)}}
    return json.dumps(body).encode()


@pytest.mark.parametrize("path", PATHS)
async def test_garbage_is_refused_and_never_our_fault(path: str) -> None:
    chance = random.Random(path)
    transport = httpx.ASGITransport(application(RouterCompute(local=EchoCompute())))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        for _ in range(100):
            body = asked(chance)
            answer = await web.post(path, content=body)
            assert answer.status_code in (200, 400, 404, 413), body
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error if isinstance(error, str) else error["message"]


class Failing(EchoCompute):
    """An engine with a fault of ours."""

    def stream(self, prompt: Prompt) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
async def test_a_fault_of_ours_is_said_in_the_shape_of_the_api_too(path: str) -> None:
    app = application(RouterCompute(local=Failing()))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        answer = await web.post(path, json=GOOD)
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert "its log says where" in (error if isinstance(error, str) else error["message"])
