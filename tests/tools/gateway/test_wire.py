"""The gateway's bytes on a socket: one connection for many requests, and each word at once."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.tools.gateway.server import HEAD_SIZE_MAX_BYTES, application, serving

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


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (HEAD + b"x-long: ", b"x" * 1_024),
        (HEAD, b"x-many: 1\r\n" * 100),
        (CHUNKED + b"0\r\n", b"x-trailer: 1\r\n" * 100),
        (CHUNKED + b"1;extension=", b"x" * 1_024),
    ],
    ids=["a header", "headers", "trailers", "an extension"],
)
async def test_a_head_without_an_end_is_not_kept(begun: bytes, piece: bytes) -> None:
    async with connected(EchoCompute()) as (reader, writer):
        writer.write(begun)
        answer = asyncio.create_task(reader.read())
        for _ in range(100_000):
            if answer.done():
                break
            writer.write(piece)
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0)
        with suppress(ConnectionError):
            assert b" 400 " in (await answer).partition(b"\r\n")[0]


async def test_a_body_may_be_longer_than_any_head() -> None:
    text = "x" * (4 * HEAD_SIZE_MAX_BYTES)
    async with connected(EchoCompute()) as (reader, writer):
        messages = [{"role": "user", "content": text}]
        writer.write(request("/v1/chat/completions", BODY | {"messages": messages}))
        assert b" 200 " in await reader.readuntil(b"\r\n")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_ends_what_is_done_for_it(stream: bool) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    class Endless(EchoCompute):
        async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
            try:
                async for chunk in super().stream(prompt):
                    yield chunk
                    begun.set()
                    await asyncio.Event().wait()
            finally:
                ended.set()

    async with connected(Endless()) as (_, writer):
        writer.write(request("/v1/chat/completions", BODY | {"stream": stream}))
        await begun.wait()
        assert not ended.is_set()
        writer.close()
        await ended.wait()
