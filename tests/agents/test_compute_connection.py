"""The connections to an engine's server, over a real one: what goes out, and what is let in."""

from __future__ import annotations

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
