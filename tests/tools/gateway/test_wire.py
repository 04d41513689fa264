"""The gateway's bytes on a socket: one connection for many requests, and each word at once."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway.server import application, serving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from coase.agents.compute.ports import Chunk, Prompt

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

PATHS = ("/v1/chat/completions", "/v1/messages", "/api/chat")
BODY: dict[str, Any] = {
    "model": "echo",
    "messages": [{"role": "user", "content": "one two three"}],
    "max_tokens": 20,
    "temperature": 0,
}


class Halting(EchoCompute):
    """An echo that stops after its first word until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        async for chunk in super().stream(prompt):
            yield chunk
            await self.go_on.wait()


@asynccontextmanager
async def connected(
    compute: EchoCompute,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    app = application(RouterCompute(local=compute))
    async with serving(app, host="127.0.0.1", port=0) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield reader, writer
        finally:
            writer.close()


def request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


@pytest.mark.parametrize("path", PATHS)
async def test_each_word_leaves_before_the_next_is_there(path: str) -> None:
    compute = Halting()
    async with connected(compute) as (reader, writer):
        writer.write(request(path, BODY | {"stream": True}))
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "200 OK" in head
        assert "text/event-stream" in head or "application/x-ndjson" in head
        seen = b""
        while b"one" not in seen:
            seen += await reader.read(65_536)
        assert b"three" not in seen
        compute.go_on.set()
        seen += await reader.readuntil(b"0\r\n\r\n")
        assert b"three" in seen


async def test_one_connection_serves_many_requests_the_failed_ones_too() -> None:
    async with connected(EchoCompute()) as (reader, writer):
        for path, body, status in (
            *((path, BODY | {"stream": False}, 200) for path in PATHS),
            ("/v1/chat/completions", BODY | {"stream": True}, 200),
            ("/v1/chat/completions", {}, 400),
            ("/v1/nothing", {}, 404),
            ("/api/chat", BODY | {"stream": False}, 200),
        ):
            writer.write(request(path, body))
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert f" {status} " in head.partition("\r\n")[0], path
            assert "connection: close" not in head
            if "chunked" in head:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                await reader.readexactly(length)
