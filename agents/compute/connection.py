"""Connections to the server of an engine, kept from one prompt to the next."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONNECT_MAX_S: Final = 5
# llama.cpp lets go of an idle connection after 5 s.
KEPT_MAX_S: Final = 2
# Two tokens rarely come at once, and an answer that nobody reads must not fill the memory.
READ_AHEAD_MAX_BYTES: Final = 64 * 1024
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class Connection:
    """Sends requests to one server. Whoever makes it closes it.

    With aiohttp, since a streamed answer takes a quarter of the processor's time that it takes
    with httpx, and a short one an eighth.
    """

    def __init__(self, base_url: str, *, api_key: str = "") -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._anew: aiohttp.ClientSession | None = None
        """For requests that must not go over a kept connection."""

    async def open(
        self, method: str, path: str, body: Any = None, *, within_s: float | None = None
    ) -> aiohttp.ClientResponse:
        """Return the response, whose content is yet to be read; ``path`` may be a whole URL.

        A server may let go of a kept connection at the moment when we take it; then there is no
        answer at all, and the request is sent once more, over a new one: others may be gone too.

        :raises aiohttp.ClientError: if there is no response
        :raises TimeoutError: if it, with its content, takes longer than ``within_s``
        """
        session = self._session = self._session or self._opened()
        url = path if path.startswith("http") else self.base_url + path
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=CONNECT_MAX_S)
        data, headers = None, self._headers
        if body is not None:
            data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
            headers = {**headers, "Content-Type": "application/json"}

        async def send(session: aiohttp.ClientSession) -> aiohttp.ClientResponse:
            return await session.request(
                method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False
            )

        try:
            return await send(session)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):
            raise  # There was no connection that could have been let go.
        except aiohttp.ClientConnectionError:
            if session.closed:
                raise
            self._anew = self._anew or self._opened(keep=False)
            return await send(self._anew)

    async def close(self) -> None:
        """Close the connections, which ends what runs. Safe to repeat."""
        for session in (self._session, self._anew):
            if session is not None:
                await session.close()

    def _opened(self, *, keep: bool = True) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # Who asks has a queue of its own.
                force_close=not keep,
                keepalive_timeout=KEPT_MAX_S if keep else None,
                # Whom httpx trusts is there where the system has no list of its own.
                ssl=httpx.create_ssl_context() if self.base_url.startswith("https:") else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_AHEAD_MAX_BYTES,
            proxy=_proxy_to(self.base_url),
        )


async def read_some(response: aiohttp.ClientResponse, most: int) -> bytes:
    """Return the content of a response, and no more than ``most`` bytes of it."""
    content = bytearray()
    async for part in parts_of(response):
        content += part
        if len(content) >= most:
            break
    return bytes(content[:most])


def parts_of(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Return the content of a response in parts as they come."""
    return response.content.iter_any()


def _proxy_to(url: str) -> str | None:
    """Return the environment's proxy for the world outside, which this machine is no part of."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _LOOPBACK or proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")
