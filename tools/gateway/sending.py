"""What goes back to a client, as fast as it is there, and for no longer than it listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, Final

import anyio
import pydantic_core
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

WATCH: Final = "coase.watch"
"""Where a request's scope has its watch."""


class Watch:
    """Ends what is done for a client when it goes away.

    One task for a request, from the moment on when its body was read: only then is the end of
    the connection what comes next.
    """

    def __init__(self, receive: Receive) -> None:
        self.gone = False
        self._receive = receive
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[None] | None = None

    async def over(self, work: Awaitable[None]) -> None:
        """Return when ``work`` is done, or was ended."""
        try:
            with self._scope:
                await work
        finally:
            self.end()

    def begin(self) -> None:
        """Watch from now on. Safe to repeat."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch())

    def end(self) -> None:
        """Watch no longer: all that the client waits for is on its way."""
        if self._task is not None:
            self._task.cancel()

    def stop(self) -> None:
        """End what is done for the client, though it waits."""
        self._scope.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._scope.cancel()


class Last(bytes):
    """The last part of a stream, with which its end is sent."""


class Streamed(Response):
    """An answer that is sent in parts, each at once."""

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        self.parts, self.media_type = parts, media_type
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-store", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it; whoever watches the client ends it early."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        more = True
        async with aclosing(self.parts) as parts:
            async for part in parts:
                more = not isinstance(part, Last)
                await send({"type": "http.response.body", "body": part, "more_body": more})
        if more:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_bytes(body: Any) -> bytes:
    """Return the JSON of a body; halves of characters in it become question marks."""
    try:
        return pydantic_core.to_json(body)
    except pydantic_core.PydanticSerializationError:
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
