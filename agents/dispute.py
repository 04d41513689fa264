"""Disputes from a side's point of view: find the arbiter, and show it what we have."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import Refused
from coase.protocol.messages import (
    Description,
    Evidence,
    Header,
    RateCall,
    Request,
    capability_id,
    terms_to_wire,
)
from coase.protocol.session import Thread, limit_s

from .supervisor import attempt

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.envelope import Message
    from coase.protocol.types import AgentId

    from .agent import Agent
    from .desk import Desk
    from .steps import Notice, Step

log = logging.getLogger(__name__)

ARBITRATION: Final = capability_id("arbitrate", b"\0" * 32)
ASK_EVERY_S: Final = 1.0
NO_TASK: Final = "0x" + "00" * 32


class ArbiterFace:
    """What an arbiter shows of itself: it takes no requests, and says where to send evidence."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def describe(self, name: str, question: str) -> list[Description]:
        """Return the key that evidence is sealed to."""
        return [
            Description(
                agent="arbiter",
                capability=ARBITRATION,
                input_schema="{}",
                output_schema="{}",
                price="the bond",
                about="runs the deterministic check again and rules",
                models=[],
                traits=[],
                key=self._desk.codec.public_key(self._desk.inbox_secret),
                firm="",
            )
        ]

    def requested(self, header: Header, request: Request, step: Step, *, now_ms: int) -> None:
        """Nothing: an arbiter sells nothing on request."""

    def unable(self, thread: Thread, *, now_ms: int) -> str:
        """Refuse every accept."""
        return "unsupported"

    def called(self, thread: Thread, call: RateCall, *, now_ms: int) -> None:
        """Refuse: an arbiter sells nothing."""
        raise Refused("unsupported", "an arbiter sells nothing")

    def heard(self, thread: Thread, message: Message, step: Step, *, now_ms: int) -> None:
        """Nothing."""

    def ticked(self, step: Step, *, now_ms: int) -> None:
        """Nothing."""

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Nothing."""

    def next_ms(self) -> int | None:
        """Return None: it has no timers."""
        return None


class Advocate:
    """Sends one agent's evidence to arbiters, and remembers how to reach them."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._keys: dict[AgentId, str] = {}
        self.listeners: list[Callable[[AgentId, Description], None]] = []

    def on_description(self, message: Message, description: Description) -> None:
        """Remember the key of an arbiter that answered us, and tell whoever asked."""
        if description.capability == ARBITRATION:
            self._keys[message.sender] = description.key
        for listener in self.listeners:
            listener(message.sender, description)

    def observe(self, agent: AgentId, notice: Notice, start: Callable[..., None]) -> None:
        """Begin to show evidence when a deal of ours is in dispute."""
        seat = self._agent.seat
        if notice.kind == "evidence" and notice.thread is not None and seat is not None:
            if agent == seat.desk.me:
                start(self._try_to_show, notice.thread)

    async def _try_to_show(self, thread: Thread) -> None:
        """Show what can be shown; what cannot must not stop the node and its other deals."""
        await attempt(lambda: self.show(thread), name="showing evidence")

    async def show(self, thread: Thread) -> None:
        """Show what we have to the arbiter of ``thread``, or to each member if it is a panel."""
        node = self._agent.node
        if node is None:
            return
        panel = node.network.panel
        arbiter = thread.agreed_terms.arbiter
        members = panel.members if panel is not None and arbiter == panel.address else (arbiter,)
        async with anyio.create_task_group() as group:
            for member in members:
                group.start_soon(self._show_to, thread, member)

    async def _show_to(self, thread: Thread, arbiter: AgentId) -> None:
        """Show it until it is taken, or the time to rule is over."""
        node, seat = self._agent.node, self._agent.seat
        terms = thread.agreed_terms
        if node is None or seat is None:
            return
        runtime = node.runtime
        until_s = (limit_s(thread) or 0) + terms.rule_s
        while arbiter not in self._keys:
            if runtime.head.time_s > until_s:
                log.warning("arbiter %s did not say where to send evidence", arbiter)
                return
            body: dict[str, object] = {"name": ""}
            step = seat.desk.tell(arbiter, "describe", body, now_ms=runtime.now_ms())
            runtime.apply(seat, step)
            await anyio.sleep(ASK_EVERY_S)
        step = seat.desk.tell(
            arbiter,
            "evidence",
            evidence_of(thread, *self._agent.schemas(thread)),
            now_ms=runtime.now_ms(),
            key=self._keys[arbiter],
            deal=thread.deal,
            until_ms=until_s * 1000,
        )
        runtime.apply(seat, step)


def evidence_of(thread: Thread, input_schema: str, output_schema: str) -> dict[str, object]:
    """Return what a side has of a deal, as the body of ``evidence``."""
    task, result = thread.task, thread.result
    body: dict[str, object] = {
        "terms": terms_to_wire(thread.agreed_terms),
        "task_salt": task.salt if task is not None else NO_TASK,
        "task": task.task if task is not None else "",
        "result_salt": result.salt if result is not None else NO_TASK,
        "result": result.result if result is not None else "",
        "input_schema": input_schema,
        "output_schema": output_schema,
        "claim": thread.verdict[:200],
    }
    Evidence.model_validate(body)
    return body
