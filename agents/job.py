"""What a handler works with, and what a buyer sees of it before the result is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from coase.protocol.identity import keccak256
from coase.protocol.messages import CHUNK_MAX_CHARS, canonical_json

from .transcript import Transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import BaseModel

    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .agent import Agent, Purchase
    from .compute.ports import Chunk, Prompt
    from .compute.ports import Completion as Written

SHOWN_TOKENS: Final = 16
SHOWN_EVERY_MS: Final = 200
SHOWN_MAX_CHARS: Final = 8 * 1024 * 1024

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
        self._waiting: list[str] = []
        self._tokens = 0
        self._said_ms = 0

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

        What is shown leaves every 16 tokens or 200 ms and may be lost; the result alone counts.
        """
        self._waiting.append(text)
        self._tokens += tokens
        node = self.agent.node
        if node is None or self.agent.seat is None:
            return
        now_ms = node.runtime.now_ms()
        if self._tokens < SHOWN_TOKENS and now_ms - self._said_ms < SHOWN_EVERY_MS:
            return
        whole, tokens = "".join(self._waiting), self._tokens
        self._waiting, self._tokens, self._said_ms = [], 0, now_ms
        for start in range(0, len(whole), CHUNK_MAX_CHARS):
            part = whole[start : start + CHUNK_MAX_CHARS]
            desk = self.agent.seat.desk
            step = desk.show(self.deal, self._shown, part, tokens, now_ms=now_ms)
            node.runtime.apply(self.agent.seat, step)
            self._shown, tokens = self._shown + 1, 0

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
