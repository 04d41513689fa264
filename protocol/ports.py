"""Ports: what the core needs of the world, named by what each promises.

Every port has a memory twin and one conformance suite that each backend passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import AgentId

OnEnvelope = Callable[[bytes], None]
"""Called in the event loop with the raw bytes of one envelope. Must not block or raise."""


@dataclass(slots=True)
class TransportHealth:
    """Counters of a transport, for people and for ``coase doctor``."""

    connected: bool = False
    where: str = ""
    reconnects: int = 0
    sent: int = 0
    received: int = 0
    slow_consumer_drops: int = 0
    send_drops: int = 0
    """Not handed over: no connection, or the broker takes nothing. The sender repeats."""
    oversize_drops: int = 0
    """Received above the limit of an envelope, and never delivered."""
    callback_errors: int = 0
    errors: list[str] = field(default_factory=list)


class Transport(ABC):
    """Carries envelopes at most once, in no fixed order, and may lose or double them."""

    @abstractmethod
    async def send(self, to: AgentId, envelope: bytes) -> None:
        """Hand ``envelope`` to the network for the inbox of ``to``; return is not arrival.

        While the network is away it may be dropped: whoever needs an answer repeats.
        """

    @abstractmethod
    async def ask(self, capability: str, envelope: bytes, *, level: int, prefix: str) -> None:
        """Publish a request to the sellers of ``capability`` in one shard.

        A shard is the first ``level`` bits (0, 4, 8 or 12) of keccak256(address), in hex;
        at level 0 ``prefix`` is ``-`` and every seller is reached.
        """

    @abstractmethod
    async def listen(self, agent: AgentId, on_envelope: OnEnvelope) -> None:
        """Deliver what is sent to the inbox of ``agent``. Repeating it replaces the callback."""

    @abstractmethod
    async def serve(self, agent: AgentId, capability: str, on_envelope: OnEnvelope) -> None:
        """Deliver the requests for ``capability`` of every shard that ``agent`` lies in."""

    @abstractmethod
    async def forget(self, agent: AgentId) -> None:
        """Stop all deliveries to ``agent``."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection and everything that belongs to it. Safe to repeat."""

    @abstractmethod
    def health(self) -> TransportHealth:
        """Return the counters as they are now."""
