"""Ports: what the core needs of the world, named by what each promises.

Every port has a memory twin and one conformance suite that each backend passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .advert import Advert, News
    from .types import AgentId

OnEnvelope = Callable[[bytes], None]
"""Called in the event loop with the raw bytes of one envelope. Must not block or raise."""

OnNews = Callable[["News"], None]
"""Called in the event loop with one piece of news of a neighbour. Must not block or raise."""


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


@dataclass(slots=True)
class NeighboursHealth:
    """Counters of a discovery, for people and for ``coase doctor``."""

    announced: bool = False
    heard_self: bool = False
    """Our own announcement came back to us. If it never does, a firewall is in the way."""
    names: int = 0
    """How many are followed now."""
    malformed: int = 0
    dropped: int = 0
    """Names that were not followed because there were too many."""
    complaints: int = 0
    """What the library had to say about packets and sockets; kept off the terminal."""
    last_complaint: str = ""


class Neighbours(ABC):
    """Tells others on the local network of us, and us of them. All it says are hints.

    News come once for each change. A neighbour that is heard is told as gone when it says
    goodbye, or when it was not heard for as long as its advertisement is good.
    """

    @abstractmethod
    async def open(self, advert: Advert, on_news: OnNews) -> None:
        """Advertise us, and report everybody else of any network from now on.

        Of ourselves nothing is reported, but whoever goes by our id in another run is.

        :raises ConfigurationError: if this machine does not allow it, or it is open already
        """

    @abstractmethod
    async def update(self, advert: Advert) -> None:
        """Advertise something else of us, on other addresses perhaps.

        :raises ConfigurationError: if it is not open, or the node id is another one
        """

    @abstractmethod
    async def ask(self) -> None:
        """Ask now who is there, as after a sleep, without waiting for answers."""

    @abstractmethod
    async def close(self) -> None:
        """Say goodbye and report nothing more. Safe to repeat."""

    @abstractmethod
    def health(self) -> NeighboursHealth:
        """Return the counters as they are now."""
