"""The transport's twin in memory: one event loop, no sockets, and as much bad luck as asked for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError, LocalProtocolError
from coase.protocol.ports import OnEnvelope, Transport, TransportHealth
from coase.protocol.subjects import inbox_subject, request_subject, require_net, served_subjects

from .delivery import Deliveries, require_size

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

    from coase.protocol.types import AgentId

_ALL_PER_MILLE: Final = 1000
_LATE_TURNS_MAX: Final = 8  # A late envelope is overtaken by what is sent in so many turns.


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """How often, out of a thousand deliveries, the network does its worst."""

    lost_per_mille: int = 0
    doubled_per_mille: int = 0
    late_per_mille: int = 0
    """Held back for some turns of the event loop, so that later ones overtake it."""

    def __post_init__(self) -> None:
        for share in (self.lost_per_mille, self.doubled_per_mille, self.late_per_mille):
            if not 0 <= share <= _ALL_PER_MILLE:
                raise ConfigurationError(f"{share} is no share of a thousand deliveries")


class MemoryNetwork:
    """What several transports of one event loop are connected by.

    The same ``rng`` and the same order of sends give the same deliveries. Without trouble every
    envelope arrives once and in order.

    :raises ConfigurationError: if there is to be trouble and no ``rng`` to draw it from
    """

    def __init__(
        self,
        *,
        net: str = "local",
        rng: random.Random | None = None,
        trouble: Trouble | None = None,
    ) -> None:
        self.net = require_net(net)
        if trouble is not None and trouble != Trouble() and rng is None:
            raise ConfigurationError("trouble is drawn from a random.Random: pass one with a seed")
        self._rng = rng
        self._trouble = trouble or Trouble()
        self._transports: list[MemoryTransport] = []
        self._islands: dict[MemoryTransport, int] = {}

    def transport(self) -> MemoryTransport:
        """Return a new transport that is connected to all others of this network."""
        transport = MemoryTransport(self)
        self._transports.append(transport)
        return transport

    def partition(self, *islands: Iterable[MemoryTransport]) -> None:
        """Let envelopes cross only within an island; whoever is in none is alone.

        What is under way already arrives.
        """
        self._islands = {
            transport: number for number, island in enumerate(islands) for transport in island
        }
        loners = [transport for transport in self._transports if transport not in self._islands]
        for number, transport in enumerate(loners, start=len(islands)):
            self._islands[transport] = number

    def heal(self) -> None:
        """Let envelopes cross everywhere again."""
        self._islands = {}

    def publish(self, source: MemoryTransport, subject: str, envelope: bytes) -> None:
        """Carry ``envelope`` from ``source`` to whoever hears ``subject``, itself included."""
        island = self._islands.get(source)
        for transport in self._transports:
            if self._islands.get(transport) != island or not transport.hears(subject):
                continue
            for late_turns in self._fates():
                asyncio.get_running_loop().call_soon(
                    _arrive, transport, subject, envelope, late_turns
                )

    def leave(self, transport: MemoryTransport) -> None:
        """Take ``transport`` off the network."""
        self._transports = [other for other in self._transports if other is not transport]

    def _fates(self) -> list[int]:
        """Return one entry for each copy that arrives: for how many turns it is held back."""
        if (rng := self._rng) is None:
            return [0]
        trouble = self._trouble
        if rng.randrange(_ALL_PER_MILLE) < trouble.lost_per_mille:
            return []
        copies = 1 + (rng.randrange(_ALL_PER_MILLE) < trouble.doubled_per_mille)
        return [
            rng.randint(1, _LATE_TURNS_MAX)
            if rng.randrange(_ALL_PER_MILLE) < trouble.late_per_mille
            else 0
            for _ in range(copies)
        ]


def _arrive(transport: MemoryTransport, subject: str, envelope: bytes, late_turns: int) -> None:
    if late_turns > 0:
        asyncio.get_running_loop().call_soon(_arrive, transport, subject, envelope, late_turns - 1)
    else:
        transport.arrive(subject, envelope)


class MemoryTransport(Transport):
    """Envelopes in memory. Made by :meth:`MemoryNetwork.transport`."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._health = TransportHealth(connected=True, where="memory")
        self._deliveries = Deliveries(self._health)

    async def send(self, to: AgentId, envelope: bytes) -> None:
        """Hand ``envelope`` to the network for the inbox of ``to``.

        :raises LocalProtocolError: if it is too large, ``to`` is no address, or we are closed
        """
        self._publish(inbox_subject(self._network.net, to), envelope)

    async def ask(self, capability: str, envelope: bytes, *, level: int, prefix: str) -> None:
        """Publish a request to one shard of the sellers.

        :raises ConfigurationError: if ``capability`` is none
        :raises LocalProtocolError: if it is too large, the shard is none, or we are closed
        """
        subject = request_subject(self._network.net, capability, level, prefix)
        self._publish(subject, envelope)

    async def listen(self, agent: AgentId, on_envelope: OnEnvelope) -> None:
        """Deliver the inbox of ``agent``."""
        self._require_open()
        self._deliveries.put(inbox_subject(self._network.net, agent), agent, on_envelope)

    async def serve(self, agent: AgentId, capability: str, on_envelope: OnEnvelope) -> None:
        """Deliver the requests for ``capability`` of every shard that ``agent`` lies in."""
        self._require_open()
        for subject in served_subjects(self._network.net, capability, agent):
            self._deliveries.put(subject, agent, on_envelope)

    async def forget(self, agent: AgentId) -> None:
        """Stop all deliveries to ``agent``; not one more reaches it."""
        self._deliveries.forget(agent)

    async def close(self) -> None:
        """Leave the network; nothing is delivered any more."""
        self._health.connected = False
        self._network.leave(self)

    def health(self) -> TransportHealth:
        """Return the counters as they are now."""
        return self._health

    def hears(self, subject: str) -> bool:
        """Return whether some agent here hears ``subject``."""
        return self._deliveries.hears(subject)

    def arrive(self, subject: str, envelope: bytes) -> None:
        """Deliver ``envelope``, as the network does."""
        if self._health.connected:
            self._deliveries.deliver(subject, envelope)

    def _publish(self, subject: str, envelope: bytes) -> None:
        require_size(envelope)
        self._require_open()
        self._health.sent += 1
        self._network.publish(self, subject, envelope)

    def _require_open(self) -> None:
        if not self._health.connected:
            raise LocalProtocolError("the transport is closed")
