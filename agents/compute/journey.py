"""One call on its way: the legs that it may go, one after the other, and what came of each.

A leg ends an answer or fails. Where it fails in mid-answer, the next one goes on from what the
reader has. Where the first one is late, a second one sets out beside it, within a budget of its
own, and whichever shows its first token is read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import anyio

from coase.agents.runtime import clock_ms
from coase.protocol.errors import BudgetExhausted, ComputeFailed

from .blame import summed
from .explain import OTHERS_MAX, Attempt, Explanation, wish_shown
from .market import MarketCall, Pick, Seam
from .ports import (
    Chunk,
    ComputeBusy,
    Message,
    Prompt,
    PromptRefused,
    PromptTooLong,
    Unsupported,
    failed,
)
from .routing import HERE
from .ways import Place, Size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from .hedging import Hedges
    from .market import MarketCompute
    from .ports import Compute, Usage
    from .routing import Decision, RouteBook, Wish

log = logging.getLogger(__name__)

LEGS_MAX: Final = 6  # Whoever waits for more than that had better be told that it fails.
ASKED_MAX: Final = 3  # Chosen sellers that are asked for an offer at once.
# The engine here costs nothing: a second request beside it has to save more than a moment.
HEDGE_HERE_MIN_MS: Final = 3_000


@dataclass(slots=True, kw_only=True)
class Leg:
    """One way to go: the engine here, or purchases from some sellers."""

    place: Place
    model: str
    sellers: list[str] = field(default_factory=list)
    asked: tuple[str, ...] = ()
    anybody: bool = False
    """Whether sellers that are not known yet may be asked as well."""
    most_units: int | None = None
    call: MarketCall | None = None

    @property
    def agreed_units(self) -> int:
        """What its deals may cost or did."""
        return sum(deal.cost_units for deal in self.call.bought) if self.call is not None else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a journey goes by."""

    local: Compute | None
    market: MarketCompute | None
    book: RouteBook
    hedges: Hedges


class Journey:
    """One prompt, from the decision to the last token."""

    def __init__(
        self,
        call: str,
        prompt: Prompt,
        wish: Wish,
        size: Size,
        decision: Decision,
        means: Means,
        *,
        open_market: bool,
    ) -> None:
        self.call, self._prompt, self._wish = call, prompt, wish
        self._size, self._decision, self._means = size, decision, means
        self._at_ms, self._begun_ns = clock_ms(), time.monotonic_ns()
        self._texts: list[str] = []
        self._tokens = 0
        self._first_ms: int | None = None
        self._closed = False  # To a going on: what was shown cannot be gone on with.
        self._outcome = "broken off"
        self._attempts: list[Attempt] = []
        self._tried: set[str] = set()
        self._open = open_market
        self.legs = legs_of(decision, wanted=prompt.model or "", market=open_market)

    @property
    def output_tokens(self) -> int:
        """How many tokens were written."""
        return self._tokens

    @property
    def answered(self) -> bool:
        """Whether the answer came to its end."""
        return self._outcome == "answered"

    def explanation(self, *, over: bool = True) -> Explanation:
        """Return what is known of it by now."""
        ranking = self._decision.ranking
        market = self._means.market
        asset = market.asset if market is not None and market.agent.node is not None else None
        return Explanation(
            call=self.call,
            at_ms=self._at_ms,
            models=self._wish.models,
            input_tokens=self._size.input,
            output_tokens=self._size.output,
            wish=wish_shown(self._wish),
            ranking=ranking[:OTHERS_MAX],
            more=max(len(ranking) - OTHERS_MAX, 0),
            refused=self._decision.refused,
            known=self._decision.known,
            attempts=tuple(self._attempts),
            outcome=self._outcome if over else "under way",
            first_ms=self._first_ms,
            took_ms=self._elapsed_ms(),
            symbol=asset.symbol if asset is not None else "",
            decimals=asset.decimals if asset is not None else 0,
        )

    async def stream(self) -> AsyncGenerator[Chunk, None]:
        """Yield the answer, whatever legs it takes.

        :raises PromptRefused: if it can be served nowhere
        :raises BudgetExhausted: if it had to be bought and no limit covers it
        :raises ComputeFailed: if no leg led to the end
        """
        why: ComputeFailed | BudgetExhausted | None = None
        unfit: PromptRefused | None = None
        spent: BudgetExhausted | None = None
        for number, leg in enumerate(self.legs):
            beside = self._beside(number)
            try:
                async with aclosing(self._set_out(leg, beside)) as chunks:
                    async for chunk in chunks:
                        yield self._passed(chunk)
                        if chunk.done:
                            return
                why = failed("the answer has no end", why="its stream ended", todo="Ask again")
            except (Unsupported, PromptTooLong) as error:
                why = unfit = error  # Another engine may be able to.
            except PromptRefused as error:
                self._outcome = f"refused: {error}"
                raise
            except BudgetExhausted as error:
                why = spent = error
            except ComputeFailed as error:
                why = error
            if self._closed or self._late():
                break
            log.info("%s: going on elsewhere, since %s", self.call, why)
        if isinstance(why, ComputeFailed):
            why = summed(why, self._attempts)
        why = spent or unfit or why  # What the caller can do something about comes first.
        self._outcome = f"failed: {why}"
        raise why or failed("there is no way", why=self._decision.why_none(), todo="Ask again")

    # ---- What passes -----------------------------------------------------------------------------

    def _passed(self, chunk: Chunk) -> Chunk:
        """Return the chunk as the reader gets it, and remember what he has."""
        if chunk.text:
            self._texts.append(chunk.text)
        self._closed = self._closed or bool(chunk.tool_calls)
        first = self._first_ms is None
        self._tokens += chunk.tokens
        if first:
            self._first_ms = self._elapsed_ms()
        if chunk.done:
            self._outcome = "answered"
            usage = chunk.usage
            if usage is not None and usage.output_tokens < self._tokens:
                # A leg that failed wrote some of it.
                chunk = replace(chunk, usage=replace(usage, output_tokens=self._tokens))
            return replace(chunk, explanation=self.explanation())
        return replace(chunk, explanation=self.explanation(over=False)) if first else chunk

    async def _timed(self, source: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """Yield what ``source`` yields, as long as the deadline is not over."""
        async with aclosing(source):
            while True:
                left_s = (self._wish.deadline_ms - self._elapsed_ms()) / 1_000
                try:
                    # The time-out spans one step only: none may stay open across a yield.
                    async with asyncio.timeout(max(left_s, 0)):
                        next_ = await _first_of(source)
                except TimeoutError:
                    self._closed = True
                    what = f"the answer is not there within {self._wish.deadline_ms} ms"
                    raise failed(what, why="the deadline", todo="Allow more time") from None
                if next_ is None:
                    return
                yield next_

    def _late(self) -> bool:
        return 0 < self._wish.deadline_ms <= self._elapsed_ms()

    def _elapsed_ms(self) -> int:
        return (time.monotonic_ns() - self._begun_ns) // 1_000_000

    # ---- Legs ------------------------------------------------------------------------------------

    def _set_out(self, leg: Leg, beside: Leg | None) -> AsyncGenerator[Chunk, None]:
        chunks = self._go(leg) if beside is None else self._race(leg, beside)
        return self._timed(chunks) if self._wish.deadline_ms else chunks

    def _go(self, leg: Leg) -> AsyncGenerator[Chunk, None]:
        return self._here(leg) if leg.place is Place.HERE else self._bought(leg)

    async def _here(self, leg: Leg) -> AsyncGenerator[Chunk, None]:
        """Yield what the engine here writes, and learn from it."""
        local, book, begun_ns = self._means.local, self._means.book, time.monotonic_ns()
        assert local is not None
        prompt = self._going_on(leg.model)
        seam = Seam("".join(self._texts)) if self._texts else None
        first_us, outcome, why = 0, "too late", ""
        book.began(HERE, leg.model, now_ms=clock_ms())
        try:
            async with aclosing(local.stream(prompt)) as chunks:
                async for chunk in chunks:
                    first_us = first_us or _since_us(begun_ns)
                    if seam is not None and chunk.text:
                        chunk = replace(chunk, text=seam.take(chunk.text))
                    if chunk.done:  # What it took is to be told with it.
                        outcome = "answered"
                        took_us = _since_us(begun_ns)
                        self._learn_here(leg, chunk.usage, first_us=first_us, took_us=took_us)
                        self._attempts.append(_made_here(leg, outcome, first_us, begun_ns))
                    yield chunk
        except (ComputeBusy, PromptRefused) as error:
            outcome, why = "failed", str(error)  # No reason to leave it alone for a while.
            raise
        except ComputeFailed as error:
            outcome, why = "failed", str(error)
            book.failed(HERE, leg.model, lost_us=_since_us(begun_ns), now_ms=clock_ms())
            raise
        finally:
            book.left(HERE, leg.model, now_ms=clock_ms())
            if outcome != "answered":
                self._attempts.append(_made_here(leg, outcome, first_us, begun_ns, why))

    def _learn_here(self, leg: Leg, usage: Usage | None, *, first_us: int, took_us: int) -> None:
        if usage is None:
            return
        size = Size(usage.input_tokens, usage.output_tokens)
        self._means.book.delivered(
            HERE, leg.model, size, first_us=first_us, took_us=took_us, now_ms=clock_ms()
        )

    async def _bought(self, leg: Leg) -> AsyncGenerator[Chunk, None]:
        """Yield what is bought."""
        market, wish = self._means.market, self._wish
        assert market is not None
        units = [each for each in (wish.most_units, leg.most_units) if each is not None]
        asked = tuple(seller for seller in leg.asked if seller not in self._tried)
        everybody = leg.anybody
        if self._open and market.firm and not market.scout.all_offered():
            asked, everybody = (), True  # Who would do it for nothing has not said so yet.
        pick = Pick(
            asked=asked,
            allowed=None if everybody else frozenset(leg.sellers),
            banned=wish.banned | self._tried,
            most_units=min(units, default=None),
            begun="".join(self._texts),
            firm=wish.reach is Place.FIRM or wish.most_units == 0,
        )
        leg.call = market.call(replace(self._prompt, model=leg.model or None), pick)
        try:
            async with aclosing(leg.call.stream()) as chunks:
                async for chunk in chunks:
                    if chunk.done:  # What it took is to be told with it.
                        self._attempts += leg.call.attempts
                        leg.call.attempts.clear()
                    yield chunk
        finally:
            self._attempts += leg.call.attempts
            self._tried |= {deal.seller for deal in leg.call.bought}

    def _going_on(self, model: str) -> Prompt:
        """Return the prompt that asks for what is missing of the answer.

        :raises ComputeFailed: if nothing may be missing
        """
        prompt, begun = replace(self._prompt, model=model or None), "".join(self._texts)
        if not begun:
            return prompt
        left = prompt.max_tokens - self._tokens
        if left < 1:
            raise failed("the answer is full", why="a leg broke off at its end", todo="Ask again")
        if prompt.text:
            return replace(prompt, text=prompt.text + begun, max_tokens=left)
        messages = list(prompt.messages)
        if messages[-1].role == "assistant":
            begun = messages.pop().content + begun
        return replace(prompt, messages=(*messages, Message("assistant", begun)), max_tokens=left)

    # ---- A second one beside the first -----------------------------------------------------------

    def _beside(self, number: int) -> Leg | None:
        """Return the leg that may set out beside the first one, if any may."""
        if number or not self._decision.hedge_after_ms:
            return None
        leg = self.legs[0]
        if leg.place is Place.HERE or len(leg.sellers) <= len(leg.asked):
            return self.legs[1] if len(self.legs) > 1 else None
        others = [seller for seller in leg.sellers if seller not in leg.asked]
        return Leg(
            place=leg.place, model=leg.model, sellers=others, asked=tuple(others[:ASKED_MAX])
        )

    def _held(self, first: Leg, second: Leg) -> int | None:
        """Return what is held for a second leg, None if the budget does not cover it.

        Either may turn out to be the one that nobody reads, and be paid nevertheless.
        """
        market, hedges = self._means.market, self._means.hedges
        if second.place is Place.HERE or market is None:
            return 0
        most_units = market.most_units
        if self._wish.most_units is not None:
            most_units = min(most_units, self._wish.most_units)
        # Whatever is agreed for the first is a part of what the call may cost.
        most_units -= first.agreed_units
        likely = [c.price_units for c in self._decision.ranking if c.seller in second.sellers]
        if first.place is Place.HERE or first.agreed_units:
            most_units = min(most_units, hedges.left_units)
        units = max(most_units, first.agreed_units)
        if most_units < max(min(likely, default=1), 1) or not hedges.hold(units):
            return None
        second.most_units = most_units
        return units

    async def _race(self, first: Leg, second: Leg) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of whichever leg shows its first token first."""
        after_ms = self._decision.hedge_after_ms
        if first.place is Place.HERE:
            after_ms = max(after_ms, HEDGE_HERE_MIN_MS)
        runs = [_Run(first, self._go(first))]
        held: int | None = None
        winner: _Run | None = None
        try:
            await asyncio.wait((runs[0].task,), timeout=after_ms / 1_000)
            if not runs[0].task.done() and (held := self._held(first, second)) is not None:
                log.info("%s: the first token is late, a second request goes out", self.call)
                if first.call is not None:  # Whoever has it already is not asked once more.
                    self._tried |= {deal.seller for deal in first.call.bought}
                runs.append(_Run(second, self._go(second)))
            winner = await _winner(runs)
            for run in runs:
                if run is not winner:
                    await run.leave()
            chunk = winner.task.result()
            if chunk is None:
                return
            yield chunk
            async for chunk in winner.source:
                yield chunk
        finally:
            for run in runs:
                await run.leave()
            if held:
                extra = [run.leg for run in runs if run is not winner]
                if first.place is Place.HERE:  # What is bought beside it is all extra.
                    extra = [second]
                self._means.hedges.settle(held, sum(leg.agreed_units for leg in extra))


class _Run:
    """A leg whose first chunk is waited for beside others."""

    def __init__(self, leg: Leg, source: AsyncGenerator[Chunk, None]) -> None:
        self.leg, self.source = leg, source
        # Whoever waits owns it, and takes it away in ``leave``.
        self.task = asyncio.create_task(_first_of(source))

    async def leave(self) -> None:
        """End it, even if we are ended ourselves; what was agreed goes its way."""
        with anyio.CancelScope(shield=True):
            if not self.task.done():
                self.task.cancel()
                await asyncio.wait((self.task,))
            if not self.task.cancelled():
                self.task.exception()  # Looked at, so that nobody complains that none did.
            await self.source.aclose()


async def _first_of(source: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(source, None)


async def _winner(runs: list[_Run]) -> _Run:
    """Return the first run that has something to show, or the first one if none has."""
    waiting = {run.task for run in runs}
    while waiting:
        _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for run in runs:
            if run.task.done() and not run.task.cancelled() and run.task.exception() is None:
                return run
    return runs[0]


def legs_of(decision: Decision, *, wanted: str, market: bool) -> list[Leg]:
    """Return the legs of a ranking; with ``market``, strangers may be asked at the end.

    Where no model is ``wanted`` those may sell any.
    """
    legs: list[Leg] = []
    for choice in decision.ranking:
        last = legs[-1] if legs else None
        if choice.place is Place.HERE:
            legs.append(Leg(place=Place.HERE, model=choice.model))
        elif last is not None and last.place is not Place.HERE and last.model == choice.model:
            last.sellers.append(choice.seller)
        else:
            legs.append(Leg(place=Place.MARKET, model=choice.model, sellers=[choice.seller]))
    del legs[LEGS_MAX:]
    for number, leg in enumerate(legs):
        if leg.place is not Place.HERE:
            chosen = decision.asked if number == 0 else tuple(leg.sellers)
            leg.asked = tuple(seller for seller in chosen if seller in leg.sellers)[:ASKED_MAX]
    if market and "expected too late" not in decision.refused:
        model = legs[0].model if legs else wanted
        bought = [leg for leg in legs if leg.place is not Place.HERE and leg.model == model]
        if wanted and bought:
            bought[-1].anybody = True
        else:
            legs.append(Leg(place=Place.MARKET, model=wanted, anybody=True))
    return legs


def _made_here(leg: Leg, outcome: str, first_us: int, begun_ns: int, why: str = "") -> Attempt:
    return Attempt(
        seller=HERE,
        place=Place.HERE,
        model=leg.model,
        outcome=outcome,
        why=why,
        first_ms=first_us // 1_000 if first_us else None,
        took_ms=_since_us(begun_ns) // 1_000,
    )


def _since_us(begun_ns: int) -> int:
    return max((time.monotonic_ns() - begun_ns) // 1_000, 1)
