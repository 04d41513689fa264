"""What a handler works with, and what a buyer sees of it before the result is there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import anyio

from coase.protocol.errors import DealFailed, LocalProtocolError
from coase.protocol.identity import keccak256
from coase.protocol.messages import CHUNK_MAX_CHARS, canonical_json
from coase.protocol.states import State

from .metering import is_counted, units_of
from .transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .agent import Agent
    from .compute.ports import Chunk, Prompt
    from .compute.ports import Completion as Written
    from .purchasing import Purchase

SHOWN_TOKENS: Final = 16
SHOWN_EVERY_MS: Final = 200
SHOWN_MAX_CHARS: Final = 8 * 1024 * 1024
PAY_WITHIN_MS: Final = 15_000  # Several repetitions of a voucher that got lost.
DRAIN_LOOK_S: Final = 0.25
log = logging.getLogger(__name__)

Made = TypeVar("Made", bound="BaseModel")


@dataclass(slots=True)
class Shown:
    """The text of a result as its seller shows it, in order; after a gap no more of it."""

    on_text: Callable[[str], None]
    _next: int = 0
    _chars: int = 0

    def take(self, number: int, text: str) -> None:
        """Pass on the part with this number, if it is the next one."""
        self._chars += len(text)
        if number == self._next and self._chars <= SHOWN_MAX_CHARS:
            self._next += 1
            self.on_text(text)


class Job:
    """What a handler is given besides its task: the deal, its deadline, and a purse of its own."""

    def __init__(self, agent: Agent, thread: Thread) -> None:
        self.agent, self.thread = agent, thread
        self.usage: dict[str, int] = {}
        self._bought = 0
        self._shown = 0
        self._text = ""
        """What is to be shown: of a stream all of it, else what was not sent yet."""
        self._tokens = 0
        self._said_ms = 0
        self._paid_ms = 0
        self._moved = anyio.Event()

    @property
    def deal(self) -> str:
        """The id of the deal."""
        return self.thread.deal

    @property
    def buyer(self) -> AgentId:
        """Who pays."""
        return self.thread.counterparty

    @property
    def deliver_by_s(self) -> int:
        """Unix seconds of chain time by which the result must be there."""
        return self.thread.agreed_terms.deliver_by_s

    @property
    def price_units(self) -> int:
        """What is locked for this deal."""
        return self.thread.agreed_terms.price_units

    def meter(self, **usage: int) -> None:
        """Add to what was used: ``input_tokens``, ``output_tokens``, ``milliseconds``."""
        for name, count in usage.items():
            self.usage[name] = self.usage.get(name, 0) + count

    async def hire(
        self, capability: str, task: BaseModel, *, returns: type[Made], max_price: str, **wish: Any
    ) -> Made:
        """Buy what this job needs. After a crash the same purchase goes on, and is not made twice.

        Takes what ``Agent.purchase`` takes. Purchases of one job are told apart by their order,
        capability and task, so a handler should make them in the same order each time.
        """
        bought = await self.purchase(capability, task, returns=returns, max_price=max_price, **wish)
        return bought.result

    async def purchase(
        self, capability: str, task: BaseModel, *, returns: type[Made], max_price: str, **wish: Any
    ) -> Purchase[Made]:
        """Buy what this job needs, and return the result with its price and seller."""
        self._bought += 1
        text = canonical_json(task.model_dump(mode="json"))
        number = wish.pop("key", None) or keccak256(text.encode()).hex()
        return await self.agent.purchase(
            capability,
            task,
            returns=returns,
            max_price=max_price,
            key=f"{self.deal}/{capability}/{number}",
            **wish,
        )

    def show(self, text: str, *, tokens: int = 1) -> None:
        """Let the buyer see how the text of the result goes on, while it is made.

        What is shown leaves every 16 tokens or 200 ms. Where a channel pays for it, it waits for
        the payment of what was shown before; elsewhere it may be lost, and the result alone counts.

        :raises DealFailed: if the buyer has stopped, or pays no more
        """
        self._text += text
        self._tokens += tokens
        node, seat = self.agent.node, self.agent.seat
        if node is None or seat is None:
            return
        if self.thread.streamed:
            self._require_paid()
            self.go_on()
            return
        now_ms = node.runtime.now_ms()
        if self._tokens < SHOWN_TOKENS and now_ms - self._said_ms < SHOWN_EVERY_MS:
            return
        whole, tokens = self._text, self._tokens
        self._text, self._tokens, self._said_ms = "", 0, now_ms
        for start in range(0, len(whole), CHUNK_MAX_CHARS):
            part = whole[start : start + CHUNK_MAX_CHARS]
            step = seat.desk.show(self.deal, self._shown, part, tokens, now_ms=now_ms)
            node.runtime.apply(seat, step)
            self._shown, tokens = self._shown + 1, 0

    def go_on(self) -> None:
        """Deliver the next chunk if the one before is paid; called when a payment came."""
        self._moved.set()
        node, seat = self.agent.node, self.agent.seat
        thread = self._now()
        if node is None or seat is None or thread is None or thread.state is not State.LOCKED:
            return
        now_ms = node.runtime.now_ms()
        if thread.owed_units:
            return
        self._paid_ms = now_ms
        waiting = len(self._text) - len(thread.shown)
        if waiting <= 0:
            return  # After a restart it is written again up to where it was.
        few = self._tokens < SHOWN_TOKENS and now_ms - self._said_ms < SHOWN_EVERY_MS
        if few:
            return
        self._deliver(thread, self._text[len(thread.shown) :][:CHUNK_MAX_CHARS], now_ms=now_ms)

    def _deliver(self, thread: Thread, part: str, *, now_ms: int) -> None:
        node, seat = self.agent.node, self.agent.seat
        assert node is not None
        assert seat is not None
        most = seat.desk.streams.trusted_units(self.buyer)
        while True:
            due_units = max(thread.due_units, units_of(thread, thread.shown + part))
            if due_units - thread.due_units <= most or len(part) < SHOWN_TOKENS:
                break
            part = part[: len(part) // 2]
        tokens, self._tokens, self._said_ms = self._tokens, 0, now_ms
        try:
            step = seat.desk.chunk(
                self.deal, part, tokens=tokens, due_units=due_units, now_ms=now_ms
            )
        except LocalProtocolError as error:
            # Others of this buyer are not paid yet, or the chain has to be asked: again soon.
            log.debug("a chunk of %s waits: %s", self.deal, error)
            return
        node.runtime.apply(seat, step)

    async def drain(self) -> None:
        """Return when all that was delivered is paid; what is left goes with the result.

        :raises DealFailed: if the buyer has stopped, or pays no more
        """
        if not self.thread.streamed:
            return
        while True:
            self._require_paid()
            thread = self._now()
            if thread is None or thread.state is not State.LOCKED:
                raise DealFailed(
                    thread.state if thread is not None else "lapsed",
                    "the deal is over before its result",
                    deal_id=self.deal,
                )
            if not thread.owed_units and self._can_end(thread):
                return
            self._moved = anyio.Event()
            self.go_on()
            with anyio.move_on_after(DRAIN_LOOK_S):
                await self._moved.wait()

    def _can_end(self, thread: Thread) -> bool:
        """Return whether the result may leave with what was not delivered before it."""
        seat = self.agent.seat
        if thread.method != "channel" or seat is None:
            return True
        whole = max(self._text, thread.shown, key=len)
        rest = units_of(thread, whole) - thread.due_units
        if not is_counted(thread.agreed_terms):
            rest = thread.agreed_terms.price_units
        self._tokens = max(self._tokens, SHOWN_TOKENS)  # Whatever is left may leave.
        now_ms = node.runtime.now_ms() if (node := self.agent.node) is not None else 0
        return seat.desk.streams.can_send(thread, max(rest, 1), now_ms=now_ms)

    def _now(self) -> Thread | None:
        seat = self.agent.seat
        return seat.desk.threads.get(self.deal) if seat is not None else None

    def _require_paid(self) -> None:
        """Return if the work is still wanted.

        :raises DealFailed: if the buyer has stopped, or does not pay
        """
        thread, node = self._now(), self.agent.node
        if thread is None or thread.over:
            raise DealFailed("lapsed", "the buyer has stopped", deal_id=self.deal)
        if not self._text.startswith(thread.shown) and not thread.shown.startswith(self._text):
            raise DealFailed(
                thread.state, "the text is another than before the restart", deal_id=self.deal
            )
        now_ms = node.runtime.now_ms() if node is not None else 0
        self._paid_ms = self._paid_ms or now_ms
        if thread.owed_units and now_ms - self._paid_ms > PAY_WITHIN_MS:
            raise DealFailed(thread.state, "the buyer does not pay any more", deal_id=self.deal)

    async def complete(self, prompt: Prompt, *, show: bool = False) -> Written:
        """Ask the agent's own engine, and meter what it used.

        With ``show`` the buyer sees the text while it is written, and with it, set apart, what the
        model thinks and which tools it wants to be called.
        """
        transcript = Transcript()

        def see(chunk: Chunk) -> None:
            if show and (text := transcript.write(chunk)):
                self.show(text, tokens=chunk.tokens)

        written = await self.agent.compute.complete(prompt, on_chunk=see)
        used = written.usage
        self.meter(
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens,
            cached_input_tokens=used.cached_input_tokens,
        )
        return written
