"""The connections to an engine's server, over a real one: what goes out, and what is let in."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import aiohttp
import pytest

from coase.agents.compute.connection import Connection, read_some
from tests.conformance.compute_servers import Request, Status, serving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.anyio

NOBODY = "http://somebody:secret@127.0.0.1:9"


async def echo(request: Request) -> AsyncGenerator[bytes, None]:
    yield repr(request.body).encode()


async def test_a_text_with_half_a_character_arrives_without_it() -> None:
    async with serving(echo) as server:
        connection = Connection(f"{server.url}/v1/")
        async with await connection.open(
            "POST", "/ask", {"text": "gr\xfc\xdfe \ud83d"}
        ) as response:
            assert await read_some(response, 1_000) == "{'text': 'gr\xfc\xdfe ?'}".encode()
        await connection.close()
        await connection.close()
    assert [request.path for request in server.requests] == ["/v1/ask"]


async def test_no_more_is_read_than_asked_for_and_nobody_is_led_elsewhere() -> None:
    async def led(request: Request) -> AsyncGenerator[bytes, None]:
        raise Status(302, {"long": "x" * 1_000})
        yield b""

    async with serving(led) as server:
        connection = Connection(server.url)
        async with await connection.open("GET", f"{server.url}/other") as response:
            assert response.status == 302
            assert len(await read_some(response, 10)) == 10
        await connection.close()


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("http://far.invalid/v1", True),
        ("https://far.invalid/v1", True),
        ("http://127.0.0.2:9", False),  # As the environment says.
        ("http://127.0.0.1:9", False),  # Whatever it says.
    ],
)
async def test_a_proxy_is_for_the_world_outside(
    monkeypatch: pytest.MonkeyPatch, url: str, proxied: bool
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, NOBODY)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.2")
    connection = Connection(url)
    with pytest.raises(aiohttp.ClientConnectorError) as caught:
        await connection.open("POST", "", {})
    assert isinstance(caught.value, aiohttp.ClientProxyConnectionError) is proxied
    await connection.close()


async def test_when_all_kept_connections_are_let_go_a_new_one_is_made() -> None:
    together = asyncio.Barrier(3)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request of each connection, and let it go with the next one."""
        await reader.readuntil(b"\r\n\r\n")
        if not together.broken:
            await together.wait()  # So that three are kept.
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connection = Connection(f"http://127.0.0.1:{port}")

    async def ask() -> bytes:
        async with await connection.open("POST", "/", {}) as response:
            return await read_some(response, 10)

    assert await asyncio.gather(*(ask() for _ in range(3))) == [b"ok"] * 3
    await together.abort()
    assert await ask() == b"ok"
    await connection.close()
    server.close()
