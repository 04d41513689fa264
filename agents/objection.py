"""Disputes by hand: an owner's objection to one deal, or its answer, in the agent's own name.

A running node objects and answers by itself, by its check. This is for when it does not run, or
when a person sees what no check sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.states import Role, State
from coase.protocol.types import ZERO_ADDRESS

from .agent import Agent

if TYPE_CHECKING:
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .steps import Notice

POLL_S: Final = 0.1
WHY_MAX_CHARS: Final = 200  # As much as evidence carries of it.
IN_DISPUTE: Final = (State.DISPUTED, State.ANSWERED)


class Objector(Agent):
    """An agent that takes up its journal and finds one result bad, whatever its check says."""

    def __init__(self, name: str, *, deal: str, why: str) -> None:
        super().__init__(name)
        self._deal, self._finding = deal, why[:WHY_MAX_CHARS]

    async def check(self, thread: Thread) -> str:
        """Return the owner's finding on its deal; on all others what the agent itself finds."""
        if thread.deal == self._deal:
            return self._finding
        return await super().check(thread)


def require_objectionable(thread: Thread) -> None:
    """Return if the holder of ``thread`` may object to it.

    :raises ConfigurationError: if not; says why
    """
    if thread.side is not Role.BUYER:
        raise ConfigurationError("you sold in this deal: only its buyer may object")
    if thread.state in IN_DISPUTE:
        raise ConfigurationError(f"this deal is in dispute already: it is {thread.state}")
    if thread.over:
        raise ConfigurationError(f"this deal is over ({thread.state}): nobody can object any more")
    if thread.state not in (State.LOCKED, State.DELIVERED):
        raise ConfigurationError(f"nothing is locked in this deal yet: it is {thread.state}")
    if thread.agreed_terms.arbiter == ZERO_ADDRESS:
        raise ConfigurationError(
            "the terms of this deal name no arbiter: whoever delivers is paid unless you settle for"
            " less, and nobody can be asked"
        )
    if thread.settle is not None or thread.verdict == "good":
        raise ConfigurationError("you have accepted the result of this deal and signed for it")


def require_answerable(thread: Thread) -> None:
    """Return if the holder of ``thread`` may have something to answer: the chain will tell.

    :raises ConfigurationError: if not; says why
    """
    if thread.side is not Role.SELLER:
        raise ConfigurationError("you bought in this deal: its seller answers")
    if thread.state is State.ANSWERED:
        raise ConfigurationError("this dispute is answered: the arbiter has to rule")
    if thread.over:
        raise ConfigurationError(f"this deal is over ({thread.state}): nothing is left to answer")
    if thread.result is None:
        raise ConfigurationError("there is no result in this journal to stand by")


async def object_to(agent: Objector, deal: str, *, wait_s: float) -> Thread:
    """Bring the owner's objection on chain and return the deal once it is in dispute.

    The agent has its place in a running node. A result that is not on chain yet is disputed when
    it is; if the seller never puts it there, the money comes back without.

    :raises DealFailed: if the deal ended otherwise, or not in time; says what was in the way
    """
    node, seat = agent.node, agent.seat
    if node is None or seat is None:
        raise ConfigurationError(f"{agent.name} has no place in a node")
    thread = seat.desk.threads.get(deal)
    if thread is not None:
        require_objectionable(thread)
        if not thread.verdict:
            finding = await agent.check(thread)
            node.runtime.apply(seat, seat.desk.checked(deal, finding, now_ms=node.runtime.now_ms()))
    return await until(agent, deal, IN_DISPUTE, wait_s=wait_s)


async def until(agent: Agent, deal: str, states: tuple[State, ...], *, wait_s: float) -> Thread:
    """Return the deal once it is in one of ``states``.

    :raises DealFailed: if it ended otherwise, or not in time; says what was in the way
    """
    node, seat = agent.node, agent.seat
    if node is None or seat is None:
        raise ConfigurationError(f"{agent.name} has no place in a node")
    last: list[Thread] = []
    trouble = [""]

    def observe(who: AgentId, notice: Notice) -> None:
        if notice.deal == deal and who == agent.address:
            if notice.kind == "chain_error":
                trouble[0] = notice.detail
            if notice.kind == "ended" and notice.thread is not None:
                last.append(notice.thread)

    node.runtime.observers.append(observe)
    try:
        with anyio.move_on_after(wait_s):
            while True:
                thread = seat.desk.threads.get(deal)
                if thread is not None and thread.state in states:
                    return thread
                if thread is None:
                    break
                await anyio.sleep(POLL_S)
    finally:
        node.runtime.observers.remove(observe)
    if last:
        raise DealFailed(last[0].state, last[0].why or "before it came so far", deal_id=deal)
    thread = seat.desk.threads.get(deal)
    state = thread.state if thread is not None else "unknown"
    why = trouble[0] or f"not in {wait_s:.0f} s: it is {state}; repeat the command"
    raise DealFailed(state, why, deal_id=deal)
