"""Rates that a buyer of prompts has agreed with its sellers, renewed beside the calls.

Whoever has answered well is asked for rates like those of that answer, for prompts about as large;
while they hold, the next prompt for it needs no bargain. Nothing is owed by it: a contract that
nobody calls under ends in silence.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.agents.inference import needs_of
from coase.agents.metering import call_units, units_at_most
from coase.agents.runtime import clock_ms
from coase.agents.wares import Completion, Inference
from coase.protocol.errors import CoaseError
from coase.protocol.states import State

if TYPE_CHECKING:
    from coase.agents.agent import Agent
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

log = logging.getLogger(__name__)

RENEW_BEFORE_S: Final = 90  # Some calls come by then, and one of them has it renewed.
USABLE_BEFORE_S: Final = 3  # Beside what the chain takes: what is called for later may be late.
PAUSE_MS: Final = 30_000  # After a seller did not agree; it may have no place for rates.
INPUT_MIN_TOKENS: Final = 1_024
OUTPUT_MIN_TOKENS: Final = 256
STANDING_MAX: Final = 256
"""Sellers, models and kinds of prompts with which there are rates at one time."""

_Kind = tuple[str, str, frozenset[str]]
"""Seller, model as it is asked for, and what a model must be able to do."""


@dataclass(slots=True)
class _Rates:
    """What there is with one seller for one kind of prompt."""

    contract: Thread | None = None
    input_max: int = INPUT_MIN_TOKENS
    output_max: int = OUTPUT_MIN_TOKENS
    again_ms: int = 0
    agreeing: asyncio.Task[None] | None = field(default=None, repr=False)


class Rates:
    """The rate contracts of one buyer of prompts."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._rates: dict[_Kind, _Rates] = {}

    def find(
        self, seller: AgentId, order: Inference, *, input_max: int, most_units: int
    ) -> Thread | None:
        """Return a contract with ``seller`` that covers ``order``, or None if there is none now.

        ``input_max`` is how many tokens are read for it at most.
        """
        rates = self._rates.get(_kind(seller, order))
        thread = self._alive(rates, left_s=USABLE_BEFORE_S)
        if thread is None:
            return None
        work = thread.agreed_terms.work
        if input_max > work.input_max or order.max_tokens > work.output_max:
            return None
        units = call_units(thread.agreed_terms, input_max=input_max, output_max=order.max_tokens)
        return thread if units <= most_units else None

    def delivered(self, deal: Thread, order: Inference, *, input_max: int, within_s: int) -> None:
        """Take note of a good answer; see that there are rates for the next one like it.

        ``input_max`` is as for ``find``, ``within_s`` the time to deliver that such an answer gets.
        """
        if not deal.streamed:
            return
        kind = _kind(deal.counterparty, order)
        rates = self._rates.setdefault(kind, _Rates())
        now_ms = clock_ms()
        fits = input_max <= rates.input_max and order.max_tokens <= rates.output_max
        rates.input_max = max(rates.input_max, _rounded(input_max))
        rates.output_max = max(rates.output_max, _rounded(order.max_tokens))
        if (fits and self._alive(rates, left_s=RENEW_BEFORE_S)) or now_ms < rates.again_ms:
            return
        if rates.agreeing is None or rates.agreeing.done():
            rates.again_ms = now_ms + PAUSE_MS
            # Held here, and ended with ``close``.
            agreeing = self._agree(rates, deal, order, within_s)
            rates.agreeing = asyncio.create_task(agreeing)
        self._forget()

    def drop(self, contract: Thread) -> None:
        """Call under a contract no more, of whose seller a call was refused."""
        for rates in self._rates.values():
            if rates.contract is not None and rates.contract.deal == contract.deal:
                rates.contract = None

    async def ready(self) -> None:
        """Return once no rates are being agreed on."""
        if tasks := self._agreeing():
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Agree on nothing more; what was agreed ends by itself."""
        for task in self._agreeing():
            task.cancel()
        await self.ready()

    def _agreeing(self) -> list[asyncio.Task[None]]:
        return [r.agreeing for r in self._rates.values() if r.agreeing is not None]

    async def _agree(self, rates: _Rates, deal: Thread, order: Inference, within_s: int) -> None:
        limits = {"input_max": rates.input_max, "output_max": rates.output_max}
        try:
            rates.contract = await self.agent.agree(
                "inference",
                Inference,
                Completion,
                most_units=units_at_most(deal.agreed_terms, **limits),
                deliver_within=within_s,
                model=order.model,
                features=needs_of(order),
                sellers=(deal.counterparty,),
                settlements=(deal.method,),
                **limits,
            )
        except CoaseError as error:
            log.debug("no rates with %s: %s", deal.counterparty, error)
        else:
            rates.again_ms = 0
            log.debug("rates with %s", deal.counterparty)

    def _alive(self, rates: _Rates | None, *, left_s: int) -> Thread | None:
        """Return the contract if it is in force for that long, and what the chain takes."""
        seat, thread = self.agent.seat, rates.contract if rates is not None else None
        if seat is None or thread is None:
            return None
        now = seat.desk.threads.get(thread.deal)
        if now is None or now.state is not State.AGREED:
            return None
        over_s = now.agreed_terms.lock_by_s - seat.desk.margins.chain_s
        return now if over_s - clock_ms() // 1_000 > left_s else None

    def _forget(self) -> None:
        """Let those go that are over, beginning with the oldest, when there are too many."""
        if len(self._rates) <= STANDING_MAX:
            return
        for kind, rates in list(self._rates.items()):
            busy = rates.agreeing is not None and not rates.agreeing.done()
            if not busy and self._alive(rates, left_s=0) is None:
                del self._rates[kind]


def _kind(seller: AgentId, order: Inference) -> _Kind:
    return seller, order.model, frozenset(needs_of(order))


def _rounded(tokens: int) -> int:
    """Return the next power of two, so that prompts of about one size share their rates."""
    return 1 << max(tokens - 1, 1).bit_length()
