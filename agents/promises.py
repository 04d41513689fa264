"""The channels that a journal tells of, as they stand in it: what was signed, taken and deposited.

It is the same record that ``streams`` goes on from, read without a chain or a key: for whoever
looks at a journal from outside, beside the node that writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

from coase.escrow.accounts import (
    ChannelOpened,
    SigningStopped,
    TotalRecovered,
    VoucherBooked,
    VoucherPromised,
    VoucherTaken,
    decode_record,
)
from coase.escrow.voucher import ChannelConfig, Claim, Voucher
from coase.protocol.states import Role

from .memory import STREAM_RECORDS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coase.escrow.voucher import ChannelView
    from coase.protocol.types import AgentId

    from .ports import Record

UNNAMED: Final = ""
"""The deal of what a voucher pays beyond any deal: arrears, deals whose own vouchers are late, or
what a lost journal knew."""


@dataclass(frozen=True, slots=True)
class Payment:
    """One step of a channel's signed total, and the deal that it pays for."""

    at_ms: int
    deal: str
    units: int
    total_units: int


@dataclass(slots=True)
class KeptChannel:
    """One end of a channel, as its journal has it."""

    agent: AgentId
    channel_id: bytes
    side: Role
    config: ChannelConfig
    opened_ms: int = 0
    payments: list[Payment] = field(default_factory=list)
    voucher: Voucher | None = None
    """The seller's last one."""
    signed_units: int = 0
    """The total that the buyer has promised, or that the seller holds a voucher for."""
    refund_nonce: int = 0
    stopped: str = ""
    """Why the buyer signs nothing there any more."""
    deposits: dict[str, int] = field(default_factory=dict)
    """What was to be deposited, by the id of the effect."""
    deposited: set[str] = field(default_factory=set)
    """The deposits that went through."""

    @property
    def counterparty(self) -> AgentId:
        """The other side."""
        return self.config.receiver if self.side is Role.BUYER else self.config.payer

    @property
    def base_units(self) -> int:
        """What of the total was signed before this journal begins: it tells of no such payment."""
        return self.signed_units - sum(one.units for one in self.payments)

    def paid(self) -> dict[str, int]:
        """Return what was paid for each deal."""
        found: dict[str, int] = {}
        for one in self.payments:
            found[one.deal] = found.get(one.deal, 0) + one.units
        return found

    def claim(self, view: ChannelView) -> Claim | None:
        """Return what the seller can claim of a channel that the chain says this of."""
        if self.voucher is None:
            return None
        units = min(self.voucher.units, view.balance_units)
        return Claim(self.config, self.voucher, units) if units > view.claimed_units else None

    def rest_units(self, view: ChannelView) -> int:
        """Return what the buyer can have back without taking from the seller what was signed."""
        return max(0, view.balance_units - max(self.signed_units, view.claimed_units))

    def take_in(self, record: Record) -> None:
        """Take in a line of the journal.

        :raises ValueError: if it is none of a channel
        """
        match record.kind:
            case "deposit":
                row = json.loads(record.data)
                self.deposits[str(row["id"])] = int(row["units"])
            case "deposited":
                self.deposited.add(record.data.decode())
            case _:
                self._move(record)

    def _move(self, record: Record) -> None:
        match decode_record(record.data):
            case VoucherTaken(deal, units, total, signature):
                # A seller whose journal is lost begins with what the total is above its payment.
                before = total - units if self.voucher is None else self.signed_units
                self._pay(record.at_ms, UNNAMED, total - before - units, total - units)
                self._pay(record.at_ms, deal, units, total)
                self.voucher = Voucher(self.channel_id, total, signature)
                self.signed_units = total
            case VoucherBooked(deal, units):
                # Its own voucher came after one with a higher total, which brought this, too.
                self._pay(record.at_ms, UNNAMED, -units, self.signed_units - units)
                self._pay(record.at_ms, deal, units, self.signed_units)
            case VoucherPromised(deal, units, total):
                self._pay(record.at_ms, deal, units, total)
                self.signed_units = total
            case TotalRecovered(total) if total > self.signed_units:
                self._pay(record.at_ms, UNNAMED, total - self.signed_units, total)
                self.signed_units = total
            case ChannelOpened(nonce, signed):
                self.refund_nonce, self.signed_units = nonce, signed
            case SigningStopped(why):
                self.stopped = self.stopped or why

    def _pay(self, at_ms: int, deal: str, units: int, total: int) -> None:
        if units:
            self.payments.append(Payment(at_ms, deal, units, total))


def kept_channels(records: Iterable[Record], faults: list[str] | None = None) -> list[KeptChannel]:
    """Return the channels that ``records`` tell of, each agent's in the order of the journal.

    What cannot be read is left out, and named in ``faults``.
    """
    told = [record for record in records if record.kind in STREAM_RECORDS]
    told.sort(key=lambda record: (record.agent, record.deal))  # Stable: each keeps its order.
    found = []
    for (agent, name), group in groupby(told, key=lambda record: (record.agent, record.deal)):
        try:
            first, *rest = group
            channel = _opened(first)
            for record in rest:
                channel.take_in(record)
        except (ValueError, KeyError, TypeError) as error:
            if faults is not None:
                faults.append(f"the records of channel {name} of {agent} do not follow: {error!r}")
            continue
        found.append(channel)
    return found


def _opened(record: Record) -> KeptChannel:
    if record.kind != "channel":
        raise ValueError("it does not say which channel it is")
    row = json.loads(record.data)
    config = ChannelConfig(**{**row["config"], "salt": bytes.fromhex(row["config"]["salt"])})
    channel_id, side = bytes.fromhex(record.deal), Role(row["side"])
    return KeptChannel(record.agent, channel_id, side, config, record.at_ms)
