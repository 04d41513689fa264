"""What a buyer has to say of a seller when a deal is over, as it is kept until it is said."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Final

from coase.escrow.voucher import ChannelConfig
from coase.protocol.states import Role
from coase.protocol.types import How

from .ports import Record

if TYPE_CHECKING:
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

FEEDBACK: Final = "feedback:"
"""How journal and effects call what is to be said of a deal."""


@dataclass(frozen=True, slots=True)
class Note:
    """What one of our agents has to say of a seller, after a deal, or after some of one channel."""

    agent: AgentId
    deal: str
    """With a channel its id: what is claimed there is paid for all of its deals together."""
    seller: AgentId
    job_id: str
    tx_hash: str
    value: int
    capability: str
    at_ms: int
    channel: ChannelConfig | None = None
    block: int = 0
    """From where on a claim of the channel pays for this."""
    deals: int = 1

    @property
    def name(self) -> str:
        """How journal and effects call it."""
        return FEEDBACK + self.deal

    def of_channel(self, channel_id: bytes, config: ChannelConfig, *, block: int) -> Note:
        """Return the same as said of all that a channel pays from ``block`` on."""
        return replace(self, deal=channel_id.hex(), job_id="", channel=config, block=block)

    def and_again(self, value: int) -> Note:
        """Return the same with one more deal of the channel, of which ``value`` was found."""
        mean = (self.value * self.deals + value) // (self.deals + 1)
        return replace(self, value=mean, deals=self.deals + 1)

    def to_record(self) -> Record:
        """Return it as the journal keeps it."""
        row = asdict(self)
        if self.channel is not None:
            row["channel"]["salt"] = self.channel.salt.hex()
        return Record(self.agent, self.name, "feedback", self.at_ms, json.dumps(row).encode())

    @classmethod
    def from_record(cls, record: Record) -> Note:
        """Return what the journal has kept."""
        row = json.loads(record.data)
        if (told := row.get("channel")) is not None:
            row["channel"] = ChannelConfig(**told | {"salt": bytes.fromhex(told["salt"])})
        return cls(**row)


def note_of(thread: Thread, *, now_ms: int) -> Note | None:
    """Return what a buyer has to say of a deal that is over; None if nothing would count.

    0 is for a seller who did not deliver, 100 for good work, and between them lies what an
    arbiter gave him.
    """
    if thread.side is not Role.BUYER or not thread.job_id:
        return None
    value = _of_stream(thread) if thread.method == "channel" else _of_job(thread)
    if value is None:
        return None
    return Note(
        agent=thread.holder,
        deal=thread.deal,
        seller=thread.counterparty,
        job_id=thread.job_id.hex(),
        tx_hash=thread.view.tx_hash,
        value=value,
        capability=thread.request.capability,
        at_ms=now_ms,
    )


def _of_job(thread: Thread) -> int | None:
    view, paid = thread.view, thread.view.to_seller_units
    if not view.tx_hash:
        return None
    match view.how:
        case How.UNDELIVERED | How.SILENT_SELLER:
            return 0
        case How.RULED | How.SILENT_ARBITER:
            # Of a deal that paid nothing only a ruling is the seller's fault.
            split = 100 * paid // max(1, paid + view.to_buyer_units)
            return split if paid or view.how is How.RULED else None
        case How.SETTLED | How.SILENT_BUYER if thread.verdict and paid:
            return 100 if thread.verdict == "good" else 0
    return None


def _of_stream(thread: Thread) -> int | None:
    """Only a claim can be proved of a channel: who was paid nothing there is not spoken of."""
    if not thread.paid_units or not thread.verdict:
        return None
    return 100 if thread.verdict == "good" else 0
