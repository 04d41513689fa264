"""Questions and answers over a broker: what is no envelope of an agent, between machines.

A question goes to a subject, every answer to an inbox of the asker's own. An answer may come in
several parts, and several machines may answer. Nothing is kept: who asked in vain asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from typing import TYPE_CHECKING, Final, Self

import nats.errors
from nats.aio.client import Client

from coase.protocol.errors import TransportUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from nats.aio.msg import Msg

    from .nats_config import NatsConfig

REPLIES_MAX: Final = 256  # Of one question: a card from 32 machines, a chain's answer in 64 parts.
QUESTIONS_MAX: Final = 1024  # Open at a time, of one asker; far above what one chain answers.
_PINGS_LOST_MAX: Final = 2
_REDIAL_WAIT_S: Final = 0.2
_CLOSE_WAIT_MAX_S: Final = 1.0
_NO_RESPONDERS: Final = "503"
_LIBRARY_ERRORS: Final = (nats.errors.Error, OSError, TimeoutError, ValueError)

log = logging.getLogger("coase.protocol.calls")


class NobodyListens(TransportUnavailable):
    """No machine that the broker knows of listens on the subject, at this moment."""


class Question:
    """What somebody asks. It may be answered any number of times, or not at all."""

    __slots__ = ("_calls", "_inbox", "body")

    def __init__(self, calls: Calls, body: bytes, inbox: str) -> None:
        self.body, self._calls, self._inbox = body, calls, inbox

    async def answer(self, body: bytes) -> None:
        """Send one answer; dropped if the broker is away, since the asker will ask again."""
        if self._inbox:
            await self._calls.publish(self._inbox, body)


class Answers:
    """The answers to one question, as they come."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(REPLIES_MAX)

    def put(self, body: bytes | None) -> None:
        """Take one in; what is too much is dropped."""
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(body)

    async def next(self, wait_max_s: float) -> bytes:
        """Return the next answer.

        :raises NobodyListens: if the broker says so
        :raises TimeoutError: if none comes in time
        """
        async with asyncio.timeout(wait_max_s):
            body = await self._queue.get()
        if body is None:
            raise NobodyListens("no machine listens there")
        return body


class Calls:
    """One connection to a broker for questions and answers. It is dialled again for ever."""

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self._client: Client | None = None
        self._served: dict[str, Callable[[Question], None]] = {}
        self._open: dict[str, Answers] = {}
        self._prefix = f"_INBOX.{secrets.token_hex(12)}"
        self._numbers = itertools.count(1)
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, config: NatsConfig) -> Self:
        """Return a connection that stands.

        :raises TransportUnavailable: if the broker does not answer
        """
        calls = cls(config)
        try:
            await calls._dial()
        except _LIBRARY_ERRORS as error:
            raise TransportUnavailable(
                f"the broker does not answer: {config.redact(str(error))}"
            ) from error
        calls._keeper = asyncio.create_task(calls._keep(), name="calls-keeper")
        return calls

    async def close(self) -> None:
        """End the connection. Safe to repeat."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(*_LIBRARY_ERRORS):
                async with asyncio.timeout(_CLOSE_WAIT_MAX_S):
                    await client.flush()
            await _end(client)

    async def serve(self, subject: str, on_question: Callable[[Question], None]) -> None:
        """Hand every question on ``subject`` to ``on_question``, which must not take long.

        When it returns, the broker knows of it; others of its mesh a little later.
        """
        self._served[subject] = on_question
        if (client := self._client) is not None:
            with contextlib.suppress(*_LIBRARY_ERRORS):
                await self._subscribe(client, subject)
                await client.flush()

    @contextlib.asynccontextmanager
    async def asking(self, subject: str, body: bytes = b"") -> AsyncIterator[Answers]:
        """Ask, and yield the answers for as long as the block lasts.

        :raises TransportUnavailable: if the broker is away, or too many questions are open
        """
        if len(self._open) >= QUESTIONS_MAX:
            raise TransportUnavailable(f"{QUESTIONS_MAX} questions are open already")
        client = self._client
        if client is None or not client.is_connected:
            raise TransportUnavailable("the broker of this machine is away")
        inbox, answers = f"{self._prefix}.{next(self._numbers)}", Answers()
        self._open[inbox] = answers
        try:
            await self.publish(subject, body, inbox=inbox)
            yield answers
        finally:
            del self._open[inbox]

    async def publish(self, subject: str, body: bytes, *, inbox: str = "") -> None:
        """Hand ``body`` to the broker; dropped if it is away."""
        if (client := self._client) is not None and client.is_connected:
            with contextlib.suppress(*_LIBRARY_ERRORS):
                await client.publish(subject, body, reply=inbox)

    # The connection

    async def _dial(self) -> None:
        self._lost.clear()
        client, server = Client(), self._config.servers()[0]
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await client.connect(
                    servers=[server.url],
                    user=server.user or None,
                    password=server.password or None,
                    name=self._config.name,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    disconnected_cb=self._on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(self._config.connect_timeout_s)),
                    ping_interval=max(1, round(self._config.ping_interval_s)),
                    max_outstanding_pings=_PINGS_LOST_MAX,
                )
                await client.subscribe(f"{self._prefix}.*", cb=self._on_answer)
                for subject in self._served:
                    await self._subscribe(client, subject)
                await client.flush()
        except BaseException:
            await _end(client)
            raise
        self._client = client

    async def _subscribe(self, client: Client, subject: str) -> None:
        on_question = self._served[subject]

        async def heard(message: Msg) -> None:
            on_question(Question(self, message.data, message.reply))

        await client.subscribe(subject, cb=heard)

    async def _keep(self) -> None:
        while True:
            await self._lost.wait()
            client, self._client = self._client, None
            if client is not None:
                await _end(client)
            try:
                await self._dial()
            except _LIBRARY_ERRORS as error:
                log.debug("the broker is away: %s", self._config.redact(str(error)))
                self._lost.set()
                await asyncio.sleep(_REDIAL_WAIT_S)

    async def _on_error(self, error: Exception) -> None:
        log.debug("%s", self._config.redact(str(error)))

    async def _on_closed(self) -> None:
        self._lost.set()

    async def _on_answer(self, message: Msg) -> None:
        answers = self._open.get(message.subject)
        if answers is None:
            return  # Too late, or a stranger's guess.
        nobody = not message.data and (message.headers or {}).get("Status") == _NO_RESPONDERS
        answers.put(None if nobody else message.data)


async def _end(client: Client) -> None:
    with contextlib.suppress(*_LIBRARY_ERRORS):
        async with asyncio.timeout(_CLOSE_WAIT_MAX_S):
            await client.close()
