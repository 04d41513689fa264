"""What a desk gives back: effects as data, steps, and the halves that plug into a desk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from coase.escrow.voucher import ChannelCall
    from coase.protocol.effects import Call
    from coase.protocol.envelope import Message
    from coase.protocol.messages import Description, Evidence, Header, RateCall, Request, Ruling
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

    from .ports import Record


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send an envelope to one inbox."""

    to: AgentId
    wire: bytes


@dataclass(frozen=True, slots=True)
class Publish:
    """Send a request to the sellers of a capability in one shard."""

    capability: str
    wire: bytes
    level: int
    prefix: str


@dataclass(frozen=True, slots=True)
class OnChain:
    """Send a call to the escrow. The same id is the same call."""

    effect_id: str
    deal: str
    call: Call


@dataclass(frozen=True, slots=True)
class OnChannel:
    """Send a call to the channels' contract. The same id is the same call."""

    effect_id: str
    deal: str
    call: ChannelCall


@dataclass(frozen=True, slots=True)
class DoWork:
    """Run the seller's handler on the task of a deal."""

    deal: str


@dataclass(frozen=True, slots=True)
class DoCheck:
    """Run the buyer's check on the result of a deal."""

    deal: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that people, or a waiting call, may want to know."""

    kind: str
    deal: str
    thread: Thread | None = None
    detail: str = ""
    number: int = 0
    """Of a chunk: which one it is."""


Effect = Transmit | Publish | OnChain | OnChannel | DoWork | DoCheck | Notice


@dataclass(slots=True)
class Step:
    """What one input led to: records first, effects when they are durable.

    ``wait`` says whether the effects must wait for the disk at all.
    """

    records: list[Record] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    wait: bool = False
    closed: list[tuple[str, bytes]] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.records or self.effects or self.closed)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that could not be delivered or handled, and why."""

    at_ms: int
    kind: str
    counterparty: str
    reason: str


class Court(Protocol):
    """What an arbiter adds to its desk: it takes what the sides of a dispute show."""

    def take(self, sender: AgentId, evidence: Evidence) -> str:
        """Return the id of the case to which ``evidence`` belongs; nothing if it is not taken.

        Whoever shows it says it again until it is taken.
        """

    def recall(self, sender: AgentId, evidence: Evidence) -> None:
        """Take evidence of an earlier life again."""

    def ruled(self, sender: AgentId, ruling: Ruling) -> None:
        """Take what another member of our panel has found."""


class Half(Protocol):
    """What a buying or a selling half of an agent adds to its desk."""

    def heard(self, thread: Thread, message: Message, step: Step, *, now_ms: int) -> None:
        """React to a message that moved ``thread``."""

    def ticked(self, step: Step, *, now_ms: int) -> None:
        """React to the clock."""

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """React to the end of a thread."""

    def next_ms(self) -> int | None:
        """Return when the half wants to be ticked next, or None."""


class Seller(Half, Protocol):
    """The selling half."""

    def requested(self, header: Header, request: Request, step: Step, *, now_ms: int) -> None:
        """React to a request for something that the agent sells."""

    def describe(self, name: str, question: str) -> list[Description]:
        """Return what the agent sells under ``name``; everything for an empty name.

        ``question`` is the id of the message that asks.
        """

    def unable(self, thread: Thread, *, now_ms: int) -> str:
        """Return the NACK reason if ``thread`` cannot be agreed now, else nothing."""

    def called(self, thread: Thread, call: RateCall, *, now_ms: int) -> None:
        """Return if we can do now what a call under a rate contract asks for.

        :raises Refused: if we cannot, or it pays too little for what it may take
        """


class Buyer(Half, Protocol):
    """The buying half."""

    def reads(self, header: Header) -> bool:
        """Return whether an offer that begins a thread is to be looked at, by its header alone."""

    def offered(self, header: Header, *, now_ms: int) -> Thread | None:
        """Return a new thread for a first offer to a request of ours, or None."""

    def send_task(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Send the task of a locked deal to the seller who won it."""

    def opening(self, thread: Thread, *, now_ms: int) -> None:
        """Let the money of a deal go into the escrow.

        :raises BudgetExhausted: if it was not set aside; then it is not locked
        """

    def paying(self, thread: Thread, units: int, *, now_ms: int) -> None:
        """Let the key sign for ``units`` of a deal in all, by vouchers.

        :raises BudgetExhausted: if so much was not set aside for it; then nothing is signed
        """

    def spare_units(self, counterparty: AgentId, *, now_ms: int) -> int | None:
        """Return how much more may lie ready for deals with ``counterparty``; None for any."""

    def judged(self, thread: Thread, *, now_ms: int) -> None:
        """Take note of our finding on a result."""

    def is_spending(self) -> bool:
        """Return whether something may be accepted or locked soon."""

    def know(self, units: int | None) -> None:
        """Take note of what the agent's address holds, or with None that it cannot be told."""
