"""Money out of channels: an order of the owner's, who wants home what is free there.

What a seller holds vouchers for is claimed and paid out at once. What a buyer deposited and did not
sign away comes back after the channel's delay: signing stops, the withdrawal is asked for, and when
its time has come it is taken. Between the two lie minutes or a day, so the order is kept until it
is done: by the node if it runs, and else by whoever gives the order again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.accounts import SigningStopped, encode_record
from coase.escrow.backends.evm.beside import read_channels
from coase.escrow.backends.evm.moves import settled_head
from coase.escrow.voucher import AskWithdrawal, PayOut, TakeWithdrawal
from coase.protocol.errors import CallReverted
from coase.protocol.states import Role

from .ports import Record
from .promises import kept_channels
from .steps import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.backends.evm.beside import Channel, ChannelFacts
    from coase.escrow.backends.evm.channels import EvmChannels
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.escrow.voucher import ChannelCall
    from coase.protocol.identity import Identity
    from coase.protocol.types import AgentId

    from .backends.sqlite import SqliteJournal
    from .promises import KeptChannel
    from .runtime import Runtime

TAKEBACK: Final = "takeback:"
WHY: Final = "its owner takes the rest back"
_ID: Final = re.compile(r"[0-9a-z]{1,64}\Z")
_ADDRESS: Final = re.compile(r"0x[0-9a-f]{40}\Z")


@dataclass(frozen=True, slots=True)
class TakeBack:
    """All that is free in the channels of one key is to come home to it."""

    id: str
    owner: AgentId

    @property
    def name(self) -> str:
        """How the journal calls it."""
        return TAKEBACK + self.id

    def to_json(self) -> str:
        """Return it as it is written down."""
        return json.dumps({"kind": "takeback", "id": self.id, "owner": self.owner})

    @classmethod
    def from_json(cls, data: bytes | str) -> TakeBack:
        """Return the order that was written down.

        :raises ValueError: if it is none
        """
        try:
            row = json.loads(data)
            order = cls(str(row["id"]), str(row["owner"]))
            good = row["kind"] == "takeback"
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no order: {error!r}") from error
        if not (good and _ID.match(order.id) and _ADDRESS.match(order.owner)):
            raise ValueError("no order of this kind")
        return order


@dataclass(slots=True)
class Pass:
    """What one pass over the channels of a key has done, and what is left to do."""

    claimed_units: int = 0
    paid_units: int = 0
    """What came into the key's own account by claims."""
    asked_units: int = 0
    taken_units: int = 0
    """What came back of deposits."""
    waiting: dict[bytes, int] = field(default_factory=dict)
    """Channels with a pending withdrawal, and when it can be taken."""
    busy: list[bytes] = field(default_factory=list)
    """Channels that still pay for a deal: first it ends."""
    refused: list[str] = field(default_factory=list)
    """What the contract did not take, and why."""

    @property
    def over(self) -> bool:
        """Whether nothing is left to come."""
        return not (self.waiting or self.busy)

    @property
    def next_s(self) -> int:
        """The chain time before which there is nothing to do; 0 if that is not known."""
        return 0 if self.busy or not self.waiting else min(self.waiting.values())


class TakeBacks:
    """Performs such orders on one journal and one chain."""

    def __init__(
        self,
        settlement: EvmSettlement,
        channels: EvmChannels,
        journal: SqliteJournal,
        *,
        identity_of: Callable[[AgentId], Identity],
        now_ms: Callable[[], int],
        first: int = 0,
        runtime: Runtime | None = None,
    ) -> None:
        """``runtime`` is that of the node that runs on the journal, if one does."""
        self.settlement, self.channels, self.journal = settlement, channels, journal
        self._identity_of, self._now_ms, self._first = identity_of, now_ms, first
        self._runtime = runtime

    def unfinished(self) -> list[TakeBack]:
        """Return the orders that were written down and are not done, oldest first."""
        rows = self.journal.read(
            "SELECT data FROM records WHERE open = 1 AND kind = 'takeback' ORDER BY seq"
        )
        return list(dict.fromkeys(TakeBack.from_json(bytes(row[0])) for row in rows))

    async def perform(self, order: TakeBack, *, renewed: bool = True) -> Pass:
        """Do what can be done now, and return what that was. Safe to repeat, after a crash as well.

        An order means the channels that there are when it is given: an agent that goes on buying
        opens others. ``renewed`` says that it is given now, and not gone on with.

        :raises ChainUnavailable: if it cannot be told what went through; repeat it
        :raises ConfigurationError: if the key is not here, or has no coin for gas
        :raises JournalFailed: if the disk refused; nothing was sent that is not written down
        """
        identity, done = self._identity_of(order.owner), Pass()
        if renewed or order not in self.unfinished():
            await self._write(order, "takeback", order.to_json())
        given_ms = self._given_ms(order)
        facts, kept = await self._look(order.owner)
        await self._claim(identity, facts, kept, done)
        for channel_id, channel in facts.channels.items():
            one = kept.get(channel_id)
            meant = one is None or one.opened_ms <= given_ms
            if meant and channel.config.payer == order.owner:
                await self._one(identity, channel_id, channel, facts, done)
        if done.over:
            told: dict[str, Any] = {"refused": done.refused}
            await self._write(order, "takenback", json.dumps(told), over=True)
        return done

    def _given_ms(self, order: TakeBack) -> int:
        query = "SELECT max(at_ms) FROM records WHERE open = 1 AND deal = ? AND kind = 'takeback'"
        return int(self.journal.read(query, (order.name,))[0][0] or 0)

    async def _look(self, owner: AgentId) -> tuple[ChannelFacts, dict[bytes, KeptChannel]]:
        """Return the channels of a key on the chain, lost ones too, and as the journal has them."""
        kept = self._kept(owner)
        head = await settled_head(self.settlement)
        facts = await read_channels(
            self.settlement,
            [owner],
            [one.config for one in kept.values()],
            contract=self.channels.domain.contract,
            first=self._first,
            last=head.number,
        )
        return facts, kept

    def _kept(self, owner: AgentId) -> dict[bytes, KeptChannel]:
        rows = self.journal.read(
            "SELECT agent, deal, kind, at_ms, data FROM records"
            " WHERE open = 1 AND agent = ? AND kind IN"
            " ('channel', 'voucher', 'deposit', 'deposited') ORDER BY seq",
            (owner,),
        )
        records = [Record(row[0], row[1], row[2], row[3], bytes(row[4])) for row in rows]
        return {one.channel_id: one for one in kept_channels(records)}

    # ---- as a seller -----------------------------------------------------------------------------

    async def _claim(
        self,
        identity: Identity,
        facts: ChannelFacts,
        kept: dict[bytes, KeptChannel],
        done: Pass,
    ) -> None:
        """Claim all that vouchers cover, and have it paid out."""
        owner = identity.address
        rows = [
            claim
            for channel_id, one in kept.items()
            if one.side is Role.SELLER and channel_id in facts.channels
            if (claim := one.claim(facts.channels[channel_id].view)) is not None
        ]
        if rows:
            outcome = await self.channels.claim("claim", rows, identity)
            for row in outcome.claimed:
                before = facts.channels[row.voucher.channel_id].view.claimed_units
                done.claimed_units += row.units - before
            told = [f"a claim on {row.config.payer}: {why}" for row, why in outcome.refused]
            done.refused += told
        unpaid = await self.channels.unpaid(owner)
        if unpaid:
            head = await self.channels.head()
            call = PayOut(owner)
            if await self._send(f"payout:{owner}:{head.number}", call, identity, done):
                done.paid_units += unpaid

    # ---- as a buyer ------------------------------------------------------------------------------

    async def _one(
        self,
        identity: Identity,
        channel_id: bytes,
        channel: Channel,
        facts: ChannelFacts,
        done: Pass,
    ) -> None:
        """Bring one channel's rest a step nearer home."""
        view, config, owner = channel.view, channel.config, identity.address
        if view.is_withdrawing:
            due_s = view.withdraw_since_s + config.withdraw_delay_s
            if view.time_s < due_s:
                done.waiting[channel_id] = due_s
                return
            effect_id = f"{TAKEBACK}{channel_id.hex()}:take:{view.withdraw_since_s}@{owner}"
            if await self._send(effect_id, TakeWithdrawal(config), identity, done):
                done.taken_units += min(view.withdrawing_units, view.free_units)
            return
        if not self._rest(owner, channel_id, channel):
            return
        if not self._stop(owner, channel_id):
            done.busy.append(channel_id)
            return
        await self.journal.durable(self.journal.append(()))
        if not self._stop(owner, channel_id):  # Its agent may have come in between.
            done.busy.append(channel_id)
            return
        units = self._rest(owner, channel_id, channel)  # After the last that it will ever sign.
        if not units:
            return
        asked = sum(
            event.kind == "withdrawing" and event.channel_id == channel_id for event in facts.events
        )
        effect_id = f"{TAKEBACK}{channel_id.hex()}:ask:{asked}:{units}@{owner}"
        if await self._send(effect_id, AskWithdrawal(config, units), identity, done):
            done.asked_units += units
            done.waiting[channel_id] = view.time_s + config.withdraw_delay_s

    def _rest(self, owner: AgentId, channel_id: bytes, channel: Channel) -> int:
        """Return what is free in a channel; where a journal is lost, all that is not claimed.

        A seller who holds vouchers of a lost journal has the whole delay to claim them.
        """
        one = self._kept(owner).get(channel_id)
        return channel.view.free_units if one is None else one.rest_units(channel.view)

    async def _send(
        self, effect_id: str, call: ChannelCall, identity: Identity, done: Pass
    ) -> bool:
        try:
            await self.channels.perform(effect_id, call, identity)
        except CallReverted as error:
            done.refused.append(f"{type(call).__name__}: {error}")
            return False
        return True

    def _stop(self, owner: AgentId, channel_id: bytes) -> bool:
        """Write that nothing is signed any more; False if a deal there has to end first."""
        seat = self._runtime.seats.get(owner) if self._runtime is not None else None
        if self._runtime is not None and seat is not None:
            if not seat.desk.streams.leave(channel_id):
                return False
            step = Step()
            seat.desk.streams.stop(channel_id, WHY, step, now_ms=self._now_ms())
            self._runtime.apply(seat, step)
            return True
        if self._runtime is not None and self._has_deals(owner):
            return False  # Its agent comes back in a moment, and goes on with them.
        one = self._kept(owner).get(channel_id)
        if one is not None and not one.stopped:
            data = encode_record(SigningStopped(WHY))
            record = Record(owner, channel_id.hex(), "voucher", self._now_ms(), data)
            self.journal.append([record])
        return True

    def _has_deals(self, owner: AgentId) -> bool:
        query = "SELECT 1 FROM records WHERE open = 1 AND agent = ? AND kind = 'thread' LIMIT 1"
        return bool(self.journal.read(query, (owner,)))

    async def _write(self, order: TakeBack, kind: str, text: str, *, over: bool = False) -> None:
        record = Record(order.owner, order.name, kind, self._now_ms(), text.encode())
        group = self.journal.append([record])
        if over:
            group = self.journal.close_deals(order.owner, [(order.name, b"")])
        await self.journal.durable(group)
