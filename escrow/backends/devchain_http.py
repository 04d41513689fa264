"""A small HTTP/1.1 server for JSON-RPC on loopback: POST only, strict limits, kept connections.

Only loopback names are taken as ``Host`` and only JSON as content type, so that a web page in a
browser on this machine can neither reach it by a rebound name nor post to it unasked.
"""

from __future__ import annotations

import asyncio
import itertools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HEADER_SIZE_MAX_BYTES: Final = 8 * 1024  # web3 sends about 200 bytes.
BODY_SIZE_MAX_BYTES: Final = 2 * 1024 * 1024  # A deployment is 100 KiB in hex; batches more.
CONNECTIONS_MAX: Final = 512  # A swarm of local agents, each with a pool of a few.
IDLE_MAX_S: Final = 120.0
CLOSE_MAX_S: Final = 2.0
READ_MAX_S: Final = 30.0  # From the first byte of a request to its last.
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True, order=True)
class _Idle:
    """Since when, in the order of events, a connection has asked nothing."""

    served: bool
    since: int


class _Bad(Exception):
    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class NoAnswer(Exception):
    """What is served cannot be had now: said as the status line and a body of JSON."""

    def __init__(self, status: str, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


_HUNG_UP: Final[ContextVar[Callable[[], bool]]] = ContextVar("whether the client hung up")


def has_hung_up() -> bool:
    """Return whether the client whom the current task answers is gone: nobody reads the answer."""
    return _HUNG_UP.get(lambda: False)()


class HttpServer:
    """Serves ``answer(body) -> body`` at one loopback port; it may take its time, or refuse."""

    def __init__(self, answer: Callable[[bytes], bytes | Awaitable[bytes]]) -> None:
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, _Idle | None] = {}
        """What is answered now has None: all others may be closed to make room."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count()

    async def start(self, port: int) -> int:
        """Listen on 127.0.0.1 and return the port (a free one if ``port`` is 0)."""
        self._server = await asyncio.start_server(
            self._connection, "127.0.0.1", port, limit=HEADER_SIZE_MAX_BYTES
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and drop the connections. Safe to repeat."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.close()
            await self._server.wait_closed()
            self._server = None
            if self._tasks:  # They notice at their next turn.
                await asyncio.wait(self._tasks, timeout=CLOSE_MAX_S)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX and not self._make_room():
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open[writer] = _Idle(served=False, since=next(self._numbers))
        _HUNG_UP.set(lambda: reader.at_eof() or writer.is_closing())
        try:
            while await self._request(reader, writer):
                pass
        except _Bad as bad:
            writer.write(
                f"HTTP/1.1 {bad.status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # The other side went away or sent no HTTP: nothing to answer.
        finally:
            self._tasks.discard(task)
            self._open.pop(writer, None)
            writer.close()

    def _make_room(self) -> bool:
        """Close a connection on which nothing happens: who never asked first, then the idlest."""
        idle = [(state, writer) for writer, state in self._open.items() if state is not None]
        if not idle:
            return False
        _, writer = min(idle, key=lambda item: item[0])
        del self._open[writer]
        writer.transport.abort()
        return True

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        async with asyncio.timeout(IDLE_MAX_S):
            head = await reader.readuntil(b"\r\n\r\n")
        length, keep = _parse(head)
        async with asyncio.timeout(READ_MAX_S):
            body = await reader.readexactly(length)
        if writer not in self._open:
            return False  # It was closed to make room a moment ago.
        self._open[writer] = None
        status = "200 OK"
        try:
            answer = self._answer(body)
            if not isinstance(answer, bytes):
                answer = await answer
        except NoAnswer as error:
            status, answer = error.status, error.body
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: ".encode()
            + str(len(answer)).encode()
            + (b"\r\n\r\n" if keep else b"\r\nConnection: close\r\n\r\n")
            + answer
        )
        # From here on it may be closed again: who does not read its answer keeps nobody out.
        if writer in self._open:
            self._open[writer] = _Idle(served=True, since=next(self._numbers))
        await writer.drain()
        return keep


def _parse(head: bytes) -> tuple[int, bool]:
    """Return the length of the body and whether the connection stays open."""
    lines = head.decode("latin-1").split("\r\n")
    request = lines[0].split(" ")
    if len(request) != 3 or request[2] not in ("HTTP/1.1", "HTTP/1.0"):
        raise _Bad("400 Bad Request")
    if request[0] != "POST":
        raise _Bad("405 Method Not Allowed")
    headers: dict[str, str] = {}
    for line in lines[1:-2]:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or name != name.strip() or name in headers:
            raise _Bad("400 Bad Request")  # Twice the same header is how requests are smuggled.
        headers[name] = value.strip()
    host = headers.get("host", "localhost").lower()
    bare = (
        host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.split(":")[0]
    )
    if bare not in _LOOPBACK:
        raise _Bad("403 Forbidden")
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise _Bad("415 Unsupported Media Type")
    length = headers.get("content-length", "")
    if "transfer-encoding" in headers or not length.isascii() or not length.isdigit():
        raise _Bad("411 Length Required")
    if len(length) > 9 or int(length) > BODY_SIZE_MAX_BYTES:
        raise _Bad("413 Content Too Large")
    wish = headers.get("connection", "").lower()
    return int(length), wish == "keep-alive" if request[2] == "HTTP/1.0" else wish != "close"
