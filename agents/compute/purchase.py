"""One purchase of a prompt that runs beside its reader, under agreed rates or by a bargain."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydantic_core import from_json

from coase.agents.inference import features_of
from coase.agents.purchasing import CallRefused
from coase.agents.runtime import clock_ms
from coase.agents.wares import Completion as Delivered
from coase.protocol.types import units_to_text

if TYPE_CHECKING:
    from coase.agents.purchasing import Purchase
    from coase.agents.wares import Inference
    from coase.protocol.session import Thread

    from .market import MarketCompute

log = logging.getLogger(__name__)

# On top of the time for any answer, for each so many tokens: a large model on a processor writes
# no faster.
TOKENS_PER_S_MIN: Final = 8
# Asking, bargaining, agreeing and locking, before the time to deliver begins.
DEAL_MAX_S: Final = 30
BIDS_READ_MAX: Final = 16  # Of those that come until the round closes.
ASKED_REPLY_MS: Final = 1_500  # Chosen sellers that are silent for so long are not there.
MARKS_MAX_TOKENS: Final = 64  # Of beginnings and ends, which no text shows.
FIRST_STALLS: Final = 3
"""Until its first word a seller that has the task may be silent for so many stalls: it may wait in
a queue, or load a model."""


@dataclass(frozen=True, slots=True)
class Bought:
    """One deal that an answer took."""

    seller: str
    deal: str
    model: str
    price_units: int
    """What was locked at most."""
    paid_units: int | None
    """What it cost in the end; None while that is open."""
    symbol: str
    decimals: int

    @property
    def cost_units(self) -> int:
        """What it costs at most: its price, unless more is known."""
        return self.price_units if self.paid_units is None else self.paid_units

    @property
    def price(self) -> str:
        """The highest price, for people."""
        return f"{units_to_text(self.price_units, self.decimals)} {self.symbol}"

    @property
    def paid(self) -> str:
        """What was paid, for people; nothing while nothing was."""
        units = self.paid_units or 0
        return f"{units_to_text(units, self.decimals)} {self.symbol}"


class PromptPurchase:
    """One purchase that runs beside its reader."""

    def __init__(
        self,
        market: MarketCompute,
        order: Inference,
        most_units: int,
        *,
        blocked: frozenset[str],
        allowed: frozenset[str],
        chosen: bool,
        settlements: tuple[str, ...],
        input_max: int,
        contract: Thread | None = None,
    ) -> None:
        """Buy ``order``, under the rates of ``contract`` if there is one and its seller begins it.

        With ``chosen`` nobody is waited for but those ``allowed``. ``input_max`` is how many tokens
        are read for it at most.
        """
        self._contract = contract
        self._market, self._blocked, self._allowed = market, blocked, allowed
        self._chosen, self._settlements = chosen, settlements
        self._begun_ns = time.monotonic_ns()
        self.first_us = 0
        """When it showed the first of its text; 0 while it did not."""
        self.learnt = False
        self.order, self.input_max = order, input_max
        self.within_s = market.deliver_within_s + order.max_tokens // TOKENS_PER_S_MIN
        self._parts: asyncio.Queue[str | None] = asyncio.Queue()
        self._thread: Thread | None = None
        self._moved_s = time.monotonic()
        """When something came last: the deal, that its seller has the task, a part of its text."""
        self._taken = False
        # Whoever reads owns it, and takes it away in ``leave``.
        self._task = asyncio.create_task(self._buy(order, most_units))

    @property
    def deal(self) -> Thread | None:
        """The deal as it was agreed, once there is one."""
        return self._thread

    @property
    def seller(self) -> str:
        """Who sells, once there is a deal; else nothing."""
        return self._thread.counterparty if self._thread is not None else ""

    async def next(self) -> str | None:
        """Return the next part that the seller shows, or None when the purchase is over.

        :raises TimeoutError: if the seller is silent for too long
        """
        while True:
            left_s = self._moved_s + self._silence_s() - time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    part = await self._parts.get()
                    break
            except TimeoutError:
                if time.monotonic() >= self._moved_s + self._silence_s():
                    raise
        self._moved_s = time.monotonic()
        if part is not None and not self.first_us:
            self.first_us = max(self.elapsed_us(), 1)
        return part

    def _silence_s(self) -> float:
        """Return how long nothing may come, as far as it has come."""
        stall_s = self._market.stall_max_s
        if self.first_us or (self._contract is not None and not self._taken):
            return stall_s
        if self._taken:
            return FIRST_STALLS * stall_s
        return DEAL_MAX_S + self.within_s

    def elapsed_us(self) -> int:
        """Return how long it has taken so far."""
        return (time.monotonic_ns() - self._begun_ns) // 1_000

    def result(self) -> Delivered:
        """Return what was delivered; raises what the purchase raised."""
        return believed(self._task.result().result, input_max=self.input_max)

    def bought(self) -> Bought | None:
        """Return the deal as far as it is known."""
        if self._thread is None or self._market.agent.node is None:
            return None
        asset, terms = self._market.agent.node.settlement.asset, self._thread.agreed_terms
        paid: int | None = None
        if self._task.done() and not self._task.cancelled() and self._task.exception() is None:
            paid = self._task.result().paid_units
        elif self._thread.streamed:
            paid = self._vouchers()
        return Bought(
            self._thread.counterparty,
            self._thread.deal,
            terms.work.model,
            terms.price_units,
            paid,
            asset.symbol,
            asset.decimals,
        )

    def _vouchers(self) -> int | None:
        """Return what vouchers have paid of a deal that is paid as it comes, as far as it is."""
        buying, thread = self._market.agent.buying, self._thread
        if buying is None or thread is None:
            return None
        ask, now = buying.asks.get(thread.request_id), buying.desk.threads.get(thread.deal)
        if ask is not None and ask.outcome is not None and ask.outcome.deal == thread.deal:
            return ask.outcome.view.to_seller_units
        return now.paid_units if now is not None and self._task.done() else None

    async def leave(self) -> None:
        """Wait for it no more. What was agreed goes its way without a reader."""
        self._task.cancel()
        await asyncio.wait((self._task,))
        if not self._task.cancelled():
            self._task.exception()  # Looked at, so that nobody complains that none did.

    async def _buy(self, order: Inference, most_units: int) -> Purchase[Delivered]:
        try:
            if self._contract is not None:
                try:
                    return await self._call(self._contract, order)
                except CallRefused as error:
                    log.info("asked for as usual: %s", error)
                    self._uncalled()
            return await self._bargain(order, most_units)
        finally:
            self._parts.put_nowait(None)

    async def _call(self, contract: Thread, order: Inference) -> Purchase[Delivered]:
        return await self._market.agent.call(
            contract,
            order,
            returns=Delivered,
            check=lambda made: unfit(made, order),
            input_max=self.input_max,
            output_max=order.max_tokens,
            on_text=self._parts.put_nowait,
            on_agreed=self._agreed,
            on_taken=self._has_task,
        )

    def _uncalled(self) -> None:
        """Forget a call that its seller did not begin, and the rates under which it was made."""
        market, thread, contract = self._market, self._thread, self._contract
        if contract is not None:
            market.rates.drop(contract)
        if thread is not None:
            model, now_ms = thread.agreed_terms.work.model, clock_ms()
            market.book.left(thread.counterparty, model, now_ms=now_ms)
        self._thread = self._contract = None
        self._moved_s = time.monotonic()

    async def _bargain(self, order: Inference, most_units: int) -> Purchase[Delivered]:
        agent, market = self._market.agent, self._market
        reply_ms, bids_max = market.reply_within_ms, BIDS_READ_MAX
        if self._chosen:  # No more offers than theirs are waited for.
            reply_ms, bids_max = min(reply_ms, ASKED_REPLY_MS), len(self._allowed)
        assert agent.node is not None
        return await agent.purchase(
            "inference",
            order,
            returns=Delivered,
            check=lambda made: unfit(made, order),
            max_price=units_to_text(most_units, agent.node.settlement.asset.decimals),
            deliver_within=self.within_s,
            model=order.model,
            input_max=self.input_max,
            output_max=order.max_tokens,
            features=features_of(order),
            decide_after_ms=market.decide_after_ms,
            reply_within_ms=reply_ms,
            blocked=self._blocked,
            allowed=self._allowed,
            bids_max=bids_max,
            settlements=self._settlements,
            on_text=self._parts.put_nowait,
            on_agreed=self._agreed,
            on_taken=self._has_task,
        )

    def _agreed(self, thread: Thread) -> None:
        self._thread, self._moved_s = thread, time.monotonic()
        model, now_ms = thread.agreed_terms.work.model, clock_ms()
        self._market.book.began(thread.counterparty, model, now_ms=now_ms)

    def _has_task(self) -> None:
        self._taken, self._moved_s = True, time.monotonic()


def believed(made: Delivered, *, input_max: int) -> Delivered:
    """Return an answer whose counts are what they can be: a token has a byte at least."""
    said = [made.text, made.thinking, *(call.model_dump_json() for call in made.tool_calls)]
    most = sum(len(text.encode("utf-8", "replace")) for text in said) + MARKS_MAX_TOKENS
    counts = {
        "input_tokens": min(made.input_tokens, input_max),
        "output_tokens": min(made.output_tokens, most),
    }
    return made.model_copy(update=counts)


def unfit(made: Delivered, order: Inference) -> str | None:
    """Return what is wrong with an answer whatever its words are, or None."""
    # What has been begun may be whole already.
    if not (order.begun or made.text.strip() or made.thinking.strip() or made.tool_calls):
        return "the answer is empty"
    if made.tool_calls and not order.tools:
        return "it calls tools that nobody gave it"
    if order.response_schema and made.finish != "length" and not made.tool_calls:
        try:
            from_json(made.text)
        except ValueError:
            return "it is bound to a schema, and no JSON"
    return None
