"""Paying while the work is done: the channels of one desk, both ends, in step with its journal.

A buyer keeps one channel with each seller, deposits for many deals at once, and signs for a chunk
when it came and was good. A seller sends a chunk when the one before is paid. The rules of both are
those of ``escrow.accounts``; here they meet the deals, the journal and the purse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.accounts import (
    PUBLIC_DELAY_MIN_S,
    BuyerChannel,
    BuyerLimits,
    BuyerRecord,
    Fault,
    SellerChannel,
    SellerPolicy,
    SellerRecord,
    ViewTooOld,
    VoucherRefused,
    decode_record,
    encode_record,
)
from coase.escrow.claims import Claimable
from coase.escrow.voucher import ChannelConfig, Fund, Voucher
from coase.protocol.errors import BudgetExhausted, LocalProtocolError, Refused
from coase.protocol.identity import keccak256
from coase.protocol.messages import ZERO_BYTES32_TEXT
from coase.protocol.session import fail, see
from coase.protocol.states import Role, State
from coase.protocol.types import JobView, Phase

from .ports import Record
from .steps import Notice, OnChannel, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.voucher import ChannelView
    from coase.protocol.messages import Voucher as VoucherBody
    from coase.protocol.session import Thread
    from coase.protocol.terms import Domain
    from coase.protocol.types import AgentId, Asset

    from .desk import Desk

LOCAL_DELAY_S: Final = 900  # The shortest that the contract takes.
DEPOSIT_DEALS: Final = 20
"""A deposit covers so many deals of the price at hand: it costs as much gas as six claims."""
CALLS_AHEAD: Final = 4  # Of the largest that a rate contract allows, for which a channel is kept.
CHANNELS_MAX: Final = 10_000  # With different agents; a view of each is asked for when it is used.
IDLE_S: Final = 5  # The next deal of a busy pair comes sooner: then one claim is enough for both.
DEPOSIT_PAUSE_MS: Final = 2_000
READY: Final = JobView(Phase.WORKING)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPolicy:
    """What either end of a channel risks; amounts are units of the token."""

    chunk_max_units: int
    """What a seller delivers to a stranger before it is paid: a chunk, and the whole of work that
    is not counted from its text. Names cost nothing, so it is what opening a channel costs.
    """
    paid_share: int = 2
    """Who has paid before may owe a part of that, one of so many, if that is more.

    Either is one bound over all deals and channels of a buyer, those that ended unpaid included.
    """
    withdraw_delay_s: int = LOCAL_DELAY_S
    """How long a buyer waits for a rest, and a seller at least asks for."""

    @classmethod
    def of(cls, asset: Asset) -> StreamPolicy:
        """Return what is usual: a cent where a token is a dollar."""
        return cls(chunk_max_units=max(1, 10**asset.decimals // 100))


@dataclass(slots=True)
class _Deposit:
    """A deposit that is on its way, by the id under which it may be repeated."""

    effect_id: str
    deal: str
    units: int
    deadline_s: int
    balance_units: int
    """What the channel holds once it is there."""
    next_ms: int = 0
    landed: bool = False
    """Whether it is in a block. It is under way until the channel was read since."""


@dataclass(slots=True)
class _Line:
    """One channel of ours: its end, and what of it is under way."""

    seller: SellerChannel | None = None
    buyer: BuyerChannel | None = None
    deposit: _Deposit | None = None
    since_s: int = 0
    """When the oldest voucher that is not claimed was taken."""
    used_s: int = 0
    read_ms: int = 0
    """When the chain was asked about it last, by our own clock."""


@dataclass(slots=True)
class Streams:
    """All channels of one agent."""

    desk: Desk
    domain: Domain
    """The EIP-712 domain of the channels' contract."""
    policy: StreamPolicy
    enabled: bool = False
    """Whether there are channels on this network."""
    lines: dict[bytes, _Line] = field(default_factory=dict)
    _views: dict[bytes, tuple[ChannelView, int]] = field(default_factory=dict)
    """What was read of channels that are not ours yet, and when by our own clock."""
    _numbers: dict[AgentId, int] = field(default_factory=dict)
    """How many channels with a seller were used up before the present one."""
    _wanted: dict[bytes, None] = field(default_factory=dict)

    def open(self, domain: Domain, *, is_local: bool) -> None:
        """Use the channels of a network; a seller on a public one can sleep through a night."""
        delay_s = LOCAL_DELAY_S if is_local else PUBLIC_DELAY_MIN_S
        self.domain, self.enabled = domain, True
        self.policy = replace(self.policy, withdraw_delay_s=delay_s)

    # ---- what the chain says ------------------------------------------------------------------

    def wanted(self) -> list[bytes]:
        """Return the channels that have to be read now: new ones, and those read too long ago."""
        now_s = self.desk.head.time_s
        found = dict(self._wanted)
        # A call under a rate contract is not to wait for what could have been read before.
        rated = {thread.counterparty for thread in self.desk.contracts()}
        for channel_id, line in self.lines.items():
            end = line.seller or line.buyer
            if end is None or end.view is None:
                continue
            every_s = end.config.withdraw_delay_s // 6
            busy = bool(end.streams) or (line.seller is not None and line.seller.claim is not None)
            busy = busy or bool(rated & {end.config.payer, end.config.receiver})
            if busy and now_s - end.view.time_s >= every_s:
                found[channel_id] = None
        return list(found)

    def look(self, views: dict[bytes, ChannelView], step: Step, *, now_ms: int) -> None:
        """Take what the chain says of channels, and see which deals can begin."""
        for channel_id, view in views.items():
            self._wanted.pop(channel_id, None)
            line = self.lines.get(channel_id)
            if line is None:
                self._views[channel_id] = view, now_ms
                continue
            line.read_ms = now_ms
            if line.seller is not None:
                line.seller = line.seller.see(view)
                if line.seller.claim is None:
                    line.since_s = 0
            if line.buyer is not None:
                line.buyer, records = line.buyer.see(view)
                self._see_deposit(channel_id, line, step, now_ms=now_ms)
                self._write(channel_id, records, step, now_ms=now_ms)
                if line.buyer.stopped:
                    self._pass_over(channel_id, line.buyer.config.receiver)

    def _pass_over(self, channel_id: bytes, seller: AgentId) -> None:
        """Use the next channel with a seller from now on."""
        number = self._numbers.get(seller, 0)
        if self._config(seller, number).channel_id(self.domain) == channel_id:
            self._numbers[seller] = number + 1

    def leave(self, channel_id: bytes) -> bool:
        """Begin no deal on a channel where we buy any more; return whether none is left there."""
        line = self.lines.get(channel_id)
        end = line.buyer if line is not None else None
        if line is None or end is None:
            return True
        theirs = [
            thread
            for thread in (self.desk.threads[deal] for deal in self.desk.bound())
            if (thread.side, thread.counterparty) == (Role.BUYER, end.config.receiver)
            and thread.method == "channel"
            and thread.state in (State.LOCKED, State.DELIVERED)
        ]
        filling = line.deposit is not None and line.deposit.deadline_s >= self.desk.head.time_s
        if filling or any(thread.task is None for thread in theirs):
            return False  # What is about to name this channel must find it.
        self._pass_over(channel_id, end.config.receiver)
        return all(
            self._config_of(thread).channel_id(self.domain) != channel_id for thread in theirs
        )

    def stop(self, channel_id: bytes, why: str, step: Step, *, now_ms: int) -> None:
        """Sign nothing more on a channel where we buy: its rest is to be taken back."""
        line = self.lines.get(channel_id)
        if line is None or line.buyer is None:
            return
        line.buyer, records = line.buyer.stop(why)
        self._write(channel_id, records, step, now_ms=now_ms)
        self._pass_over(channel_id, line.buyer.config.receiver)
        self.want(channel_id)

    def claimable(self) -> list[Claimable]:
        """Return what could be claimed of each channel where we sell."""
        now_s = self.desk.head.time_s
        found = []
        for line in self.lines.values():
            end = line.seller
            if end is None or end.view is None or (claim := end.claim) is None:
                continue
            ended = not end.streams and now_s > line.used_s + IDLE_S
            found.append(Claimable(claim, end.view, line.since_s or now_s, ended=ended))
        return found

    # ---- a deal begins --------------------------------------------------------------------------

    def consider(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Begin a deal that both have signed, as soon as its channel holds the price."""
        if thread.state is not State.AGREED or thread.failed:
            return
        if thread.is_contract:
            if thread.side is Role.BUYER and thread.method == "channel":
                self._keep_open(thread, step, now_ms=now_ms)
            return
        if thread.method == "none":
            self._begin(thread, step, now_ms=now_ms)
        elif thread.side is Role.BUYER:
            self._consider_buying(thread, step, now_ms=now_ms)
        elif thread.task is not None:
            self._consider_selling(thread, step, now_ms=now_ms)

    def _begin(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        chain_s = self.desk.head.time_s
        seen = see(thread, READY, chain_s=chain_s, now_ms=now_ms)
        if seen is thread:
            return
        buyer = self.desk.buyer
        if thread.side is Role.BUYER and buyer is not None and seen.state is State.LOCKED:
            buyer.paying(thread, 0, now_ms=now_ms)
        self.desk.saw(seen, READY, chain_s, step, now_ms=now_ms)

    def _consider_buying(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        seller, price = thread.counterparty, thread.agreed_terms.price_units
        config = self._config(seller, self._numbers.get(seller, 0))
        channel_id = config.channel_id(self.domain)
        line = self.lines.get(channel_id)
        if line is None:
            if channel_id not in self._views:
                self.want(channel_id)
                return
            view, _ = self._views[channel_id]
            if view.balance_units or view.claimed_units or view.refund_nonce:
                # Of another life, whose journal is lost: what we signed there nobody knows.
                self._numbers[seller] = self._numbers.get(seller, 0) + 1
                self._consider_buying(thread, step, now_ms=now_ms)
                return
            line = self._open(channel_id, config, view, step, now_ms=now_ms)
        end = line.buyer
        if end is None or end.view is None:
            self.want(channel_id)
            return
        room = self._room(thread, end.view.solid_units - end.signed_units)
        if room >= price:
            self._begin(thread, step, now_ms=now_ms)
        elif line.deposit is None:
            self._deposit(thread, line, end, price - room, step, now_ms=now_ms)
        else:
            self._send_deposit(line, step, now_ms=now_ms)

    def ready_units(self, thread: Thread) -> int:
        """Return what lies in the channel with the seller of ``thread`` and no deal has taken."""
        end = self._present(thread.counterparty)
        if end is None or end.view is None:
            return 0
        return max(0, self._room(thread, end.view.solid_units - end.signed_units))

    def _keep_open(self, contract: Thread, step: Step, *, now_ms: int) -> None:
        """Have a channel that we have filled before hold the next calls under a rate contract."""
        end, buyer = self._present(contract.counterparty), self.desk.buyer
        if end is None or end.view is None or buyer is None:
            return
        line = self.lines[end.channel_id]
        missing = CALLS_AHEAD * contract.agreed_terms.price_units - self.ready_units(contract)
        if line.deposit is not None:
            self._send_deposit(line, step, now_ms=now_ms)
        elif missing > 0:
            spare = buyer.spare_units(contract.counterparty, now_ms=now_ms)
            if spare is None or spare >= missing:
                self._deposit(contract, line, end, missing, step, now_ms=now_ms)

    def _present(self, seller: AgentId) -> BuyerChannel | None:
        """Return our end of the channel with ``seller`` that is in use, if there is one."""
        config = self._config(seller, self._numbers.get(seller, 0))
        line = self.lines.get(config.channel_id(self.domain))
        return line.buyer if line is not None else None

    def _open(
        self,
        channel_id: bytes,
        config: ChannelConfig,
        view: ChannelView,
        step: Step,
        *,
        now_ms: int,
    ) -> _Line:
        end, records = BuyerChannel.open(config, self.domain, self._limits(), view)
        line = self.lines[channel_id] = _Line(buyer=end)
        self._views.pop(channel_id, None)
        self._write_opening(channel_id, config, "buyer", step, now_ms=now_ms)
        self._write(channel_id, records, step, now_ms=now_ms)
        return line

    def _deposit(
        self,
        thread: Thread,
        line: _Line,
        end: BuyerChannel,
        missing_units: int,
        step: Step,
        *,
        now_ms: int,
    ) -> None:
        """Fund a channel for this deal and, as far as the purse allows, for some more."""
        buyer, terms = self.desk.buyer, thread.agreed_terms
        deadline_s = terms.lock_by_s - self.desk.margins.chain_s
        if buyer is None or deadline_s <= self.desk.head.time_s:
            return
        spare = buyer.spare_units(thread.counterparty, now_ms=now_ms)
        more = terms.price_units * (DEPOSIT_DEALS - 1)
        if spare is not None:
            # Of what is left then, half stays for other sellers and other ways to pay.
            more = min(more, max(0, spare - missing_units) // 2)
        units = missing_units + more
        there = end.view.balance_units if end.view is not None else 0
        # What is not seen yet is the same deposit; but one deal may fill a channel again, as rates
        # do before more is signed, or another channel.
        which = f"{end.channel_id.hex()[:8]}:{end.signed_units}:{there}"
        effect_id = f"{thread.deal}:fund:{which}@{self.desk.me}"
        balance = units + there
        line.deposit = _Deposit(effect_id, thread.deal, units, deadline_s, balance)
        told = {
            "id": effect_id,
            "deal": thread.deal,
            "units": str(units),
            "by": deadline_s,
            "balance": str(balance),
        }
        channel_id = end.channel_id
        self._record(channel_id, "deposit", json.dumps(told).encode(), step, now_ms=now_ms)
        self._send_deposit(line, step, now_ms=now_ms)

    def _send_deposit(self, line: _Line, step: Step, *, now_ms: int) -> None:
        deposit, end = line.deposit, line.buyer
        if deposit is None or end is None or now_ms < deposit.next_ms:
            return
        if self.desk.head.time_s > deposit.deadline_s:
            line.deposit = None  # Nobody can make it any more; another deal may try another.
            return
        if deposit.landed:
            self.want(end.channel_id)  # What was read of it last is from before.
            return
        deposit.next_ms = now_ms + 60_000  # Until it ended; see ``deposit_ended``.
        salt = keccak256(deposit.effect_id.encode())
        call = Fund(end.config, deposit.units, salt, deposit.deadline_s)
        step.wait = True
        step.effects.append(OnChannel(deposit.effect_id, deposit.deal, call))

    def deposit_ended(self, effect_id: str, error: str, step: Step, *, now_ms: int) -> None:
        """Take the end of a deposit; one that failed is tried again while its deal can wait."""
        for channel_id, line in self.lines.items():
            deposit = line.deposit
            if deposit is None or deposit.effect_id != effect_id:
                continue
            self.want(channel_id)
            if not error:
                deposit.landed = True
                self._see_deposit(channel_id, line, step, now_ms=now_ms)
            else:
                deposit.next_ms = now_ms + DEPOSIT_PAUSE_MS
                step.effects.append(Notice("chain_error", deposit.deal, detail=error))
            return

    def _see_deposit(self, channel_id: bytes, line: _Line, step: Step, *, now_ms: int) -> None:
        """Let a deposit be over once the channel shows it: a second one would double it.

        Whether we heard of its end does not matter: that may have been in an earlier life.
        """
        deposit, end = line.deposit, line.buyer
        if deposit is None or end is None or end.view is None:
            return
        if end.view.balance_units >= deposit.balance_units:
            line.deposit = None
            done = deposit.effect_id.encode()
            self._record(channel_id, "deposited", done, step, now_ms=now_ms)

    def _consider_selling(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        config = self._config_of(thread)
        channel_id = config.channel_id(self.domain)
        line = self.lines.get(channel_id)
        try:
            end = line.seller if line is not None and line.seller is not None else None
            if end is None:
                end = SellerChannel.accept(
                    config, self.domain, self._policy(config.payer), seller=self.desk.me
                )
                if channel_id in self._views:
                    end = end.see(self._views[channel_id][0])
        except VoucherRefused as error:
            self._refuse(thread, str(error), step, now_ms=now_ms)
            return
        view = end.view
        if view is None:
            self.want(channel_id)
            return
        if view.is_withdrawing:
            self._refuse(thread, "a withdrawal from the channel is pending", step, now_ms=now_ms)
            return
        room = self._room(thread, view.solid_units - end.secured_units)
        if room < thread.agreed_terms.price_units:
            self.want(channel_id)  # The deposit may not be as deep yet as we trust.
            return
        if line is None:
            if len(self.lines) >= CHANNELS_MAX:
                self._refuse(thread, "no more channels", step, now_ms=now_ms)
                return
            _, read_ms = self._views.pop(channel_id)
            self.lines[channel_id] = _Line(seller=end, read_ms=read_ms)
            self._write_opening(channel_id, config, "seller", step, now_ms=now_ms)
        self._begin(thread, step, now_ms=now_ms)

    def holds(self, thread: Thread) -> bool:
        """Return whether a deal that we are called for could begin now; it holds no place before.

        What was read of its channel may be old; then the next call finds it read.
        """
        if thread.method != "channel":
            return True
        channel_id = self._config_of(thread).channel_id(self.domain)
        line = self.lines.get(channel_id)
        end = line.seller if line is not None else None
        if end is None:
            return False
        if end.view is not None and not end.view.is_withdrawing:
            room = self._room(thread, end.view.solid_units - end.secured_units)
            if room >= thread.agreed_terms.price_units:
                return True
        self.want(channel_id)
        return False

    def _refuse(self, thread: Thread, why: str, step: Step, *, now_ms: int) -> None:
        self.desk.failed(fail(thread, why), step, now_ms=now_ms)

    def _room(self, thread: Thread, free_units: int) -> int:
        """Return what a channel has left for a deal once all others that it pays are covered."""
        taken = 0
        for deal in self.desk.bound():
            other = self.desk.threads[deal]
            if (
                deal != thread.deal
                and other.method == "channel"
                and (other.side, other.counterparty) == (thread.side, thread.counterparty)
                and other.state in (State.LOCKED, State.DELIVERED)
            ):
                taken += other.agreed_terms.price_units - other.paid_units
        return free_units - taken

    def covers(self, buyer: AgentId, at_once_units: int) -> bool:
        """Return whether we would sell to ``buyer`` what costs so much before it is first paid."""
        return self.enabled and at_once_units <= self.trusted_units(buyer)

    def is_known(self, buyer: AgentId) -> bool:
        """Return whether ``buyer`` has a channel with us, which took a transaction to fill."""
        return bool(self._sold_to(buyer))

    def trusted_units(self, buyer: AgentId) -> int:
        """Return what we deliver to ``buyer`` now before it is paid.

        What it owes counts against it, in whichever of its channels: the next one makes it nobody
        new, and who never pays gets no more.
        """
        return max(0, self._allowed_units(buyer) - self._owed_units(buyer))

    def _allowed_units(self, buyer: AgentId) -> int:
        paid = sum(end.secured_units for end in self._sold_to(buyer))
        return max(self.policy.chunk_max_units, paid // self.policy.paid_share)

    def _owed_units(self, buyer: AgentId, *, but: bytes = b"") -> int:
        """Return what a buyer owes in all of its channels, or in all but one."""
        return sum(end.exposed_units for end in self._sold_to(buyer) if end.channel_id != but)

    def _sold_to(self, buyer: AgentId) -> list[SellerChannel]:
        ends = (line.seller for line in self.lines.values())
        return [end for end in ends if end is not None and end.config.payer == buyer]

    def free_units(self, seller: AgentId) -> int:
        """Return what lies in our channel with ``seller`` and is not promised to it."""
        end = self._present(seller)
        if end is None or end.view is None:
            return 0
        return max(0, end.view.solid_units - end.signed_units)

    # ---- chunks and vouchers --------------------------------------------------------------------

    def pay(self, thread: Thread, step: Step, *, now_ms: int) -> dict[str, object]:
        """Return the voucher for what is owed in a deal, journalled with its step.

        :raises LocalProtocolError: if the channel or the purse does not allow it
        """
        line, end = self._buying(thread)
        units, deal_id = thread.owed_units, thread.deal
        buyer = self.desk.buyer
        if buyer is not None:
            try:
                buyer.paying(thread, thread.paid_units + units, now_ms=now_ms)
            except BudgetExhausted as error:
                raise LocalProtocolError(str(error)) from error
        try:
            end, checked = end.check(deal_id=deal_id, units=units)
            end, promised = end.promise(deal_id=deal_id, units=units)
        except BudgetExhausted as error:
            raise LocalProtocolError(str(error)) from error
        except ViewTooOld:
            self.want(end.channel_id)
            raise
        line.buyer = end
        self._write(end.channel_id, (*checked, *promised), step, now_ms=now_ms)
        voucher = end.sign(self.desk.codec.identity)
        return {
            "units": str(units),
            "total_units": str(voucher.units),
            "signature": "0x" + voucher.signature.hex(),
        }

    def _time_s(self, line: _Line, end: SellerChannel, *, now_ms: int) -> int:
        """Return the chain's time now; where the chain is away, our own clock goes on with it.

        A withdrawal that is armed behind our back does not wait until we see the chain again.
        """
        if end.view is None:
            return self.desk.head.time_s
        since_s = max(0, now_ms - line.read_ms) // 1000
        return max(self.desk.head.time_s, end.view.time_s + since_s)

    def taking(
        self, thread: Thread, body: VoucherBody, *, now_ms: int
    ) -> Callable[[Step, int], None]:
        """Check a voucher and return what takes it, once the deal has taken it as well.

        :raises VoucherRefused: if it does not secure what it says
        :raises ViewTooOld: if the chain has to be asked first: it is to be said again
        """
        line, end = self._selling(thread)
        channel_id = end.channel_id
        voucher = Voucher(channel_id, int(body.total_units), bytes.fromhex(body.signature[2:]))
        now_s = self._time_s(line, end, now_ms=now_ms)
        try:
            after, records = end.take(
                voucher, deal_id=thread.deal, units=int(body.units), now_s=now_s
            )
        except ViewTooOld:
            self.want(channel_id)
            raise
        if not records:
            raise VoucherRefused(Fault.NOT_ABOVE_LAST, "it has paid for something already")

        def commit(step: Step, now_ms: int) -> None:
            line.seller, line.used_s = after, now_s
            line.since_s = line.since_s or now_s
            self._write(channel_id, records, step, now_ms=now_ms)

        return commit

    def can_send(self, thread: Thread, units: int, *, now_ms: int) -> bool:
        """Return whether ``units`` more may be delivered now, unpaid; if not, perhaps soon."""
        if thread.method != "channel" or units <= 0:
            return True
        line, end = self._selling(thread)
        try:
            now_s = self._time_s(line, end, now_ms=now_ms)
            end.send(deal_id=thread.deal, units=units, now_s=now_s)
        except ViewTooOld:
            self.want(end.channel_id)
            return False
        except (LocalProtocolError, VoucherRefused):
            return False
        return True

    def sending(self, thread: Thread, units: int, step: Step, *, now_ms: int) -> None:
        """Note that a chunk or result that costs ``units`` goes out now.

        :raises LocalProtocolError: if an earlier one is not paid, or it is too much at once
        """
        if thread.method != "channel" or units <= 0:
            return
        line, end = self._selling(thread)
        now_s = self._time_s(line, end, now_ms=now_ms)
        try:
            after, records = end.send(deal_id=thread.deal, units=units, now_s=now_s)
        except ViewTooOld:
            self.want(end.channel_id)
            raise
        except VoucherRefused as error:
            raise LocalProtocolError(str(error)) from error
        line.seller, line.used_s = after, now_s
        self._write(end.channel_id, records, step, now_ms=now_ms)

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """End the stream of a deal that is over."""
        if thread.method != "channel" or thread.task is None:
            return
        channel_id = self._config_of(thread).channel_id(self.domain)
        line = self.lines.get(channel_id)
        if line is None:  # It came to nothing, and whoever named the channel may name any number.
            self._views.pop(channel_id, None)
            self._wanted.pop(channel_id, None)
            return
        if thread.side is Role.SELLER and line.seller is not None:
            line.seller, sold = line.seller.end(thread.deal)
            self._write(channel_id, sold, step, now_ms=now_ms)
        elif line.buyer is not None:
            line.buyer, bought = line.buyer.end(thread.deal)
            self._write(channel_id, bought, step, now_ms=now_ms)

    def task_fields(self, thread: Thread) -> dict[str, object]:
        """Return what a task says of the channel that pays it."""
        if thread.method != "channel":
            return {"withdraw_delay_s": 0, "channel_salt": ZERO_BYTES32_TEXT}
        seller = thread.counterparty
        config = self._config(seller, self._numbers.get(seller, 0))
        return {
            "withdraw_delay_s": config.withdraw_delay_s,
            "channel_salt": "0x" + config.salt.hex(),
        }

    # ---- the journal ----------------------------------------------------------------------------

    def recall(self, record: Record) -> None:
        """Take in one line of the journal."""
        channel_id = bytes.fromhex(record.deal)
        match record.kind:
            case "channel":
                row = json.loads(record.data)
                self._recall_opening(channel_id, row)
            case "voucher":
                line = self.lines[channel_id]
                move = decode_record(record.data)
                if line.buyer is not None:
                    line.buyer = line.buyer.after(move)  # type: ignore[arg-type]
                    if line.buyer.stopped:
                        self._pass_over(channel_id, line.buyer.config.receiver)
                elif line.seller is not None:
                    line.seller = line.seller.after(move)  # type: ignore[arg-type]
            case "deposit":
                row = json.loads(record.data)
                self.lines[channel_id].deposit = _Deposit(
                    row["id"],
                    row["deal"],
                    int(row["units"]),
                    row["by"],
                    int(row.get("balance", row["units"])),
                )
            case "deposited":
                self.lines[channel_id].deposit = None
        self.want(channel_id)

    def _recall_opening(self, channel_id: bytes, row: dict[str, Any]) -> None:
        config = ChannelConfig(**{**row["config"], "salt": bytes.fromhex(row["config"]["salt"])})
        line = self.lines[channel_id] = _Line()
        if row["side"] == "buyer":
            line.buyer = BuyerChannel(config, self.domain, self._limits())
            number = int.from_bytes(config.salt, "big")
            self._numbers[config.receiver] = max(self._numbers.get(config.receiver, 0), number)
        else:
            line.seller = SellerChannel(config, self.domain, self._policy(config.payer))

    def _write_opening(
        self, channel_id: bytes, config: ChannelConfig, side: str, step: Step, *, now_ms: int
    ) -> None:
        told = {
            "payer": config.payer,
            "payer_authorizer": config.payer_authorizer,
            "receiver": config.receiver,
            "receiver_authorizer": config.receiver_authorizer,
            "token": config.token,
            "withdraw_delay_s": config.withdraw_delay_s,
            "salt": config.salt.hex(),
        }
        data = json.dumps({"side": side, "config": told}).encode()
        self._record(channel_id, "channel", data, step, now_ms=now_ms)

    def _write(
        self,
        channel_id: bytes,
        records: tuple[SellerRecord | BuyerRecord, ...],
        step: Step,
        *,
        now_ms: int,
    ) -> None:
        for one in records:
            self._record(channel_id, "voucher", encode_record(one), step, now_ms=now_ms)

    def _record(
        self, channel_id: bytes, kind: str, data: bytes, step: Step, *, now_ms: int
    ) -> None:
        step.records.append(Record(self.desk.me, channel_id.hex(), kind, now_ms, data))

    # ---- which channel ------------------------------------------------------------------------

    def _config(self, seller: AgentId, number: int) -> ChannelConfig:
        """Return our channel with ``seller``; a new number where the last is used up."""
        return ChannelConfig(
            payer=self.desk.me,
            payer_authorizer=self.desk.me,
            receiver=seller,
            receiver_authorizer=seller,
            token=self.desk.asset.token,
            withdraw_delay_s=self.policy.withdraw_delay_s,
            salt=number.to_bytes(32, "big"),
        )

    def _config_of(self, thread: Thread) -> ChannelConfig:
        """Return the channel that a deal's task names."""
        if thread.task is None:
            raise LocalProtocolError(f"no task names a channel in thread {thread.deal}")
        terms = thread.agreed_terms
        return ChannelConfig(
            payer=terms.buyer,
            payer_authorizer=terms.buyer,
            receiver=terms.seller,
            receiver_authorizer=terms.seller,
            token=terms.asset,
            withdraw_delay_s=thread.task.withdraw_delay_s,
            salt=bytes.fromhex(thread.task.channel_salt[2:]),
        )

    def _buying(self, thread: Thread) -> tuple[_Line, BuyerChannel]:
        line = self.lines.get(self._config_of(thread).channel_id(self.domain))
        if line is None or line.buyer is None:
            raise LocalProtocolError(f"no channel pays the deal {thread.deal}")
        return line, line.buyer

    def _selling(self, thread: Thread) -> tuple[_Line, SellerChannel]:
        if thread.task is None:
            raise Refused("wrong_state", "a voucher before the task")
        line = self.lines.get(self._config_of(thread).channel_id(self.domain))
        if line is None or line.seller is None:
            raise Refused("wrong_state", "the deal has no channel yet")
        policy = self._policy(line.seller.config.payer, line.seller.channel_id)
        return line, replace(line.seller, policy=policy)

    def want(self, channel_id: bytes) -> None:
        """Have a channel read anew from the chain."""
        self._wanted[channel_id] = None

    def _limits(self) -> BuyerLimits:
        # Nothing is signed before it came and was good; how much may lie there is the purse's say.
        most = 2**127
        return BuyerLimits(deposit_max_units=most, chunk_max_units=most, exposure_max_units=most)

    def _policy(self, buyer: AgentId, channel_id: bytes = b"") -> SellerPolicy:
        """Return what ``buyer`` may owe in one channel, given what it owes in others."""
        most = self._allowed_units(buyer)
        return SellerPolicy(
            tokens=frozenset((self.desk.asset.token,)),
            chunk_max_units=most,
            exposure_max_units=max(0, most - self._owed_units(buyer, but=channel_id)),
            withdraw_delay_min_s=self.policy.withdraw_delay_s,
        )
