"""One call of a client's: who makes it, what it takes, and what it waits for."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.agents.compute.blame import NoOffer, carried
from coase.agents.compute.market import BoughtChunk
from coase.agents.compute.router import ANY_MODEL
from coase.agents.runtime import clock_ms
from coase.protocol.errors import BudgetExhausted, ComputeFailed
from coase.protocol.session import Charge
from coase.protocol.types import units_to_text

from .usage import Used

if TYPE_CHECKING:
    from starlette.requests import Request

    from coase.agents.compute.ports import Chunk, Compute, Usage
    from coase.agents.purse import Purse
    from coase.agents.steps import Notice
    from coase.protocol.types import AgentId, Asset

    from .usage import UsageJournal

SCOPE: Final = "coase.call"
"""Where a request's scope has its call."""
TAG_HEADER: Final = "x-coase-tag"
TAG_MAX_CHARS: Final = 64
MODEL_MAX_CHARS: Final = 200
# What an answer may cost is set aside until its deal is over, a few seconds after its last word,
# and who sells is busy for about as long. For so long a caller waits before it is told.
PATIENCE_MAX_S: Final = 30
ASKERS_MAX: Final = 8  # Of those whom nobody offered anything, ask again at once.
ASK_AGAIN_S: Final = 1.0
ALONE_TRIES_MAX: Final = 2
_LATEST: Final = ":latest"
_SLIDING: Final = ("in all", "per hour", "per day", "per counterparty")
_ACCOUNT: Final = "account "
_UNSEEN: Final = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")


class Told(BudgetExhausted):
    """A limit was reached, in words for whoever asked."""

    def __init__(self, error: BudgetExhausted, words: str) -> None:
        super().__init__(
            limit=error.limit, asked_units=error.asked_units, left_units=error.left_units
        )
        self._words = words

    def __str__(self) -> str:
        """Return the words."""
        return self._words


class Till:
    """The money side of a gateway: whose purse it is, and when something comes back to it."""

    def __init__(
        self, purse: Purse, *, name: str, place: str = "", market: Compute | None = None
    ) -> None:
        self.purse, self.name, self.place = purse, name, place
        self._market = market
        self._returned = anyio.Event()
        self._lanes: dict[str, anyio.Lock] = {}
        self._askers = anyio.Semaphore(ASKERS_MAX)

    @property
    def asset(self) -> Asset:
        """What is paid in."""
        return self.purse.asset

    def notice(self, who: AgentId, notice: Notice) -> None:
        """Take note that a deal is over, and what it did not cost is free again."""
        if notice.kind in ("ended", "request_ended"):
            self._returned.set()
            self._returned = anyio.Event()

    def lane(self, error: BudgetExhausted | NoOffer, account: str) -> anyio.Lock | anyio.Semaphore:
        """Return what those who wait for the same money hold in turn, or for a free seller."""
        if isinstance(error, NoOffer):
            return self._askers
        return self._lanes.setdefault(account, anyio.Lock())

    async def chance(
        self, error: BudgetExhausted | NoOffer, call: Call, deadline_s: float, *, tried: int
    ) -> None:
        """Return when to try again makes sense, after so many tries were in vain already.

        :raises BudgetExhausted: if the money cannot come back, or does not in time
        :raises NoOffer: if nobody sells it, or all stay busy
        """
        if isinstance(error, NoOffer):
            # While nobody answers us at all, who could has gone, or is busy for others.
            alone = self.purse.open_units == 0 and tried >= ALONE_TRIES_MAX
            if error.dear or alone or anyio.current_time() >= deadline_s:
                raise error
            if not await self._sells(call.model):
                raise error
            with anyio.move_on_after(ASK_AGAIN_S):
                await self.returned()
            return
        error = self.now(error, call.account)
        while tried or error.left_units < error.asked_units:
            if not self.may_return(error, call.account):
                raise error
            await _in_time(self.returned, deadline_s, error)
            error, tried = self.now(error, call.account), 0

    async def _sells(self, model: str) -> bool:
        """Return whether anybody says that it has ``model``, or anything if any will do."""
        if self._market is None:
            return False
        try:
            names = [info.name.removesuffix(_LATEST) for info in await self._market.models()]
        except ComputeFailed:
            return False
        return bool(names) if model in ANY_MODEL else model.removesuffix(_LATEST) in names

    def may_return(self, error: BudgetExhausted, account: str) -> bool:
        """Return whether what is missing may come back soon, since others have it set aside."""
        whose, _, kind = error.limit.rpartition(": ")
        if kind not in _SLIDING:
            return False
        ours = whose == f"{_ACCOUNT}{account}"
        held = self.purse.held_by(account) if ours else self.purse.open_units
        return error.asked_units <= error.left_units + held

    def now(self, error: BudgetExhausted, account: str) -> BudgetExhausted:
        """Return the error with what its limit has left by now."""
        rooms = self.purse.rooms("", now_ms=clock_ms(), account=account)
        left = max(0, rooms.get(error.limit, error.left_units))
        return BudgetExhausted(limit=error.limit, asked_units=error.asked_units, left_units=left)

    async def returned(self) -> None:
        """Return when a deal is over."""
        await self._returned.wait()

    def told(self, error: BudgetExhausted) -> Told:
        """Return the error in words for a client: which limit it is, what is left, what to do."""
        return Told(error, self._words(error))

    def _words(self, error: BudgetExhausted) -> str:
        left, asked = (
            f"{units_to_text(units, self.asset.decimals)} {self.asset.symbol}"
            for units in (error.left_units, error.asked_units)
        )
        short = f"has {left} left, and the next answer needs {asked}"
        if error.left_units == 0:
            short = "is used up"
        whose, _, kind = error.limit.rpartition(": ")
        place = f" --state {self.place}" if self.place else ""
        option = "--" + {"in all": "total"}.get(kind, kind.replace(" ", "-"))
        if whose.startswith(_ACCOUNT):
            key = whose.removeprefix(_ACCOUNT)
            option = "--budget" if kind == "in all" else option
            what = f"the budget of the API key {key!r}"
            todo = f"coase gateway keys change {key} {option} AMOUNT{place}"
        elif whose == "swarm":
            what, todo = "the budget of this node", f"coase budget --swarm {option} AMOUNT{place}"
        elif whose == self.name:
            what = "the budget of this gateway"
            todo = f"coase budget {whose} {option} AMOUNT{place}"
        else:
            return f"the limit {error.limit!r} {short}"
        words = "" if kind == "in all" else f" {kind}"
        return f"{what}{words} {short}. Whoever runs the gateway can raise it: {todo}"


@dataclass(slots=True, kw_only=True)
class Call:
    """One request, from the door on until its answer is over."""

    till: Till | None = None
    key: str = ""
    """Name of the key with which it came."""
    account: str = ""
    """Which account of the purse pays."""
    tag: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    model: str = ""
    outcome: str = ""
    answered: bool = False
    made: str = ""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    _begun_ms: int = field(default_factory=clock_ms)
    _begun_ns: int = field(default_factory=time.monotonic_ns)

    @property
    def charge(self) -> Charge:
        """To whose account goes what it buys."""
        return Charge(self.account, self.id)

    def read(self, body: Mapping[str, Any]) -> None:
        """Take from a request's body what it is for: its tag, if no header said one."""
        model = body.get("model")
        if isinstance(model, str):
            self.model = _UNSEEN.sub("?", model[:MODEL_MAX_CHARS])
        if self.tag:
            return
        metadata = body.get("metadata")
        given = metadata if isinstance(metadata, dict) else {}
        for value in (given.get("tag"), body.get("user"), given.get("user_id")):
            if isinstance(value, str) and value:
                self.tag = tag_of(value)
                return

    async def answer(
        self,
        open_stream: Callable[[], AsyncGenerator[Chunk, None]],
        free: Callable[[], AsyncGenerator[Chunk, None]] | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield what ``open_stream`` yields, and count it.

        Where the money for it is only promised to others, or all who sell it are busy, it waits
        for what comes back, in turn with others, and tries again. Where there is none, it yields
        what ``free`` does, if that can be had for nothing.

        :raises BudgetExhausted: if nothing came back in time, or something else is missing
        """
        try:
            async with aclosing(self._begun(open_stream)) as chunks:
                async for chunk in chunks:
                    self._count(chunk)
                    yield chunk
        except BudgetExhausted as error:
            told = error if self.till is None else self.till.told(error)
            if free is None or self.answered:
                raise told from error
            try:
                async with aclosing(free()) as chunks:
                    async for chunk in chunks:
                        self._count(chunk)
                        yield chunk
            except (ComputeFailed, BudgetExhausted):
                raise told from error
        self.outcome = "done"

    async def _begun(
        self, open_stream: Callable[[], AsyncGenerator[Chunk, None]]
    ) -> AsyncGenerator[Chunk, None]:
        stream = open_stream()
        try:
            chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except (BudgetExhausted, NoOffer) as error:
            stream, chunk = await self._patiently(open_stream, error)
        async with aclosing(stream) as chunks:
            yield chunk
            async for chunk in chunks:
                yield chunk

    async def _patiently(
        self,
        open_stream: Callable[[], AsyncGenerator[Chunk, None]],
        error: BudgetExhausted | NoOffer,
    ) -> tuple[AsyncGenerator[Chunk, None], Chunk]:
        """Return a stream that has begun, with its first chunk.

        :raises BudgetExhausted: if no money comes back in time
        :raises NoOffer: if nobody offers in time
        """
        if self.till is None:
            raise error
        deadline_s = anyio.current_time() + PATIENCE_MAX_S
        # Held until the first word: whoever stands behind would take the same money or place.
        lane = self.till.lane(error, self.account)
        await _in_time(lane.acquire, deadline_s, error)
        try:
            tried = 0
            while True:
                await self.till.chance(error, self, deadline_s, tried=tried)
                stream = open_stream()
                try:
                    return stream, await anext(stream)
                except (BudgetExhausted, NoOffer) as again:
                    carried(again, error)
                    error, tried = again, tried + 1
        finally:
            lane.release()

    def _count(self, chunk: Chunk) -> None:
        self.answered = True
        self.made = made_by(chunk)
        self.output_tokens += chunk.tokens
        if chunk.usage is not None:
            self.used(chunk.usage)
        told = chunk.explanation
        if told is not None and told.attempts and told.attempts[-1].model:
            self.model = told.attempts[-1].model  # Which one it was, where any would do.

    def used(self, usage: Usage) -> None:
        """Take note of what it took in all."""
        self.answered = True
        self.input_tokens, self.output_tokens = usage.input_tokens, usage.output_tokens
        self.cached_tokens = usage.cached_input_tokens

    def over(self, journal: UsageJournal | None, status: int) -> None:
        """Write down what it took, if it asked for an answer at all."""
        if journal is None or not (self.answered or self.model):
            return
        made = self.made or (journal.made(self.id) if self.answered else "")
        outcome = self.outcome or ("broken" if self.answered else f"refused {status}")
        journal.call(
            Used(
                call=self.id,
                at_ms=self._begun_ms,
                key=self.key,
                tag=self.tag,
                model=self.model,
                made=made,
                outcome=outcome,
                input_tokens=self.input_tokens,
                cached_tokens=self.cached_tokens,
                output_tokens=self.output_tokens,
                duration_ms=(time.monotonic_ns() - self._begun_ns) // 1_000_000,
            )
        )


def made_by(chunk: Chunk) -> str:
    """Return where a piece of an answer was made: ``local``, by the ``firm``, or ``bought``."""
    if not isinstance(chunk, BoughtChunk) or not chunk.bought:
        return "local"
    return "bought" if chunk.bought[-1].price_units else "firm"


async def _in_time(
    wait: Callable[[], Awaitable[None]], deadline_s: float, error: BudgetExhausted | NoOffer
) -> None:
    """Return when ``wait`` does; raise ``error`` if that takes too long."""
    with anyio.move_on_at(deadline_s):
        await wait()
        return
    raise error


def call_of(request: Request) -> Call | None:
    """Return the call that a request is; None where nobody counts."""
    call = request.scope.get(SCOPE)
    return call if isinstance(call, Call) else None


def tag_of(text: str) -> str:
    """Return a tag as it is kept: short, and with nothing in it that commands a terminal."""
    return _UNSEEN.sub("?", text[:TAG_MAX_CHARS]).strip()
