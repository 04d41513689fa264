"""Questions among the machines of one local network: the card, who is there, what one sees."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.backends.calls import NobodyListens
from coase.protocol.errors import RemoteError, TransportUnavailable
from coase.protocol.subjects import lan_subject

from .card import Card, Hello, read_card, read_hello

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.protocol.backends.calls import Calls, Question

ANSWERS_OPEN_MAX: Final = 128  # At a time; four rounds of greetings in the largest mesh.
CARD_WAIT_S: Final = 2.0
PREFERRED_WAIT_S: Final = 0.3  # The holder's own card is newer than a copy; copies may be quicker.
GREET_WAIT_S: Final = 1.0
VIEW_WAIT_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another machine as it answered: how far it is, and how far its clock is from ours."""

    node: str
    name: str
    version: str
    chain: bool
    rtt_ms: float
    skew_ms: int
    """Its clock less ours, as seen in the middle of the round trip; unsure by half of it."""

    def to_json(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return asdict(self)


class NeighbourDesk:
    """Answers other machines' questions about this one."""

    def __init__(
        self,
        calls: Calls,
        mesh: str,
        *,
        node: str,
        name: str,
        version: str,
        chain: bool,
        card: Callable[[], bytes],
        view: Callable[[], dict[str, Any]],
    ) -> None:
        self._calls, self._mesh, self._node = calls, mesh, node
        self._name, self._version, self._chain = name, version, chain
        self._card, self._view = card, view
        self._open: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Begin to answer; it goes on for as long as the connection."""
        await self._calls.serve(lan_subject(self._mesh, "hello"), self._on_hello)
        await self._calls.serve(lan_subject(self._mesh, "card"), self._on_card)
        own = lan_subject(self._mesh, "view", node=self._node)
        await self._calls.serve(own, self._on_view)

    def _on_hello(self, question: Question) -> None:
        hello = Hello(
            node=self._node,
            name=self._name,
            version=self._version,
            now_ms=time.time_ns() // 1_000_000,
            chain=self._chain,
        )
        self._answer(question, hello.model_dump_json().encode())

    def _on_card(self, question: Question) -> None:
        if card := self._card():
            self._answer(question, (b"1" if self._chain else b"0") + card)

    def _on_view(self, question: Question) -> None:
        self._answer(question, json.dumps(self._view()).encode())

    def _answer(self, question: Question, body: bytes) -> None:
        if len(self._open) < ANSWERS_OPEN_MAX:
            task = asyncio.ensure_future(question.answer(body))
            self._open.add(task)
            task.add_done_callback(self._open.discard)


async def ask_card(calls: Calls, mesh: str, *, wait_s: float = CARD_WAIT_S) -> bytes | None:
    """Return the network's signed card, from the machine that holds the chain if it is there.

    None if no machine has one.

    :raises RemoteError: if what the machines have is no card that can be read
    :raises TransportUnavailable: if the broker of this machine is away
    """
    clock = asyncio.get_running_loop().time
    until = clock() + wait_s
    found: bytes | None = None
    trouble: RemoteError | None = None
    async with calls.asking(lan_subject(mesh, "card")) as answers:
        while clock() < until:
            try:
                raw = await answers.next(until - clock())
            except (NobodyListens, TimeoutError):
                break
            try:
                read_card(raw[1:])
            except RemoteError as error:
                trouble = error
                continue
            if raw[:1] == b"1":
                return raw[1:]
            if found is None:
                found, until = raw[1:], min(until, clock() + PREFERRED_WAIT_S)
    if found is None and trouble is not None:
        raise trouble
    return found


async def greet(
    calls: Calls, mesh: str, *, but: str = "", wait_s: float = GREET_WAIT_S, expect: int = 0
) -> list[Neighbour]:
    """Return every machine that answers within ``wait_s``, the nearest first.

    Once ``expect`` of them have answered nobody else is waited for; ``but`` is left out.
    """
    clock = asyncio.get_running_loop().time
    found: dict[str, Neighbour] = {}
    sent, sent_ms = clock(), time.time_ns() / 1e6
    try:
        async with calls.asking(lan_subject(mesh, "hello")) as answers:
            while (left := sent + wait_s - clock()) > 0 and not 0 < expect <= len(found):
                hello = read_hello(await answers.next(left))
                rtt_ms = (clock() - sent) * 1_000
                if hello is None or hello.node == but or hello.node in found:
                    continue
                skew_ms = round(hello.now_ms - (sent_ms + rtt_ms / 2))
                found[hello.node] = Neighbour(
                    hello.node, hello.name, hello.version, hello.chain, round(rtt_ms, 2), skew_ms
                )
    except (NobodyListens, TransportUnavailable, TimeoutError):
        pass
    return sorted(found.values(), key=lambda neighbour: neighbour.rtt_ms)


async def ask_view(calls: Calls, mesh: str, node: str) -> dict[str, Any]:
    """Return what the process of this machine sees of its network.

    :raises TransportUnavailable: if it does not answer
    """
    try:
        async with calls.asking(lan_subject(mesh, "view", node=node)) as answers:
            raw = await answers.next(VIEW_WAIT_S)
        view = json.loads(raw)
    except (TimeoutError, ValueError) as error:
        raise TransportUnavailable("this machine's part of the network does not answer") from error
    if not isinstance(view, dict):
        raise TransportUnavailable("this machine's part of the network answers nonsense")
    return view


def same_network(mine: Card, theirs: Card) -> bool:
    """Return whether two cards are of one network, whatever version wrote them."""
    return (mine.key, mine.chain_id, mine.escrow) == (theirs.key, theirs.chain_id, theirs.escrow)
