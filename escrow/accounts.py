"""The two ends of a channel: what each side signs, takes and sends, so that one chunk is at risk.

Each end is a value. A move returns the end as it is afterwards and the record of it, or raises and
nothing has changed. The record is journalled first; only then is the voucher signed or the chunk
sent. Replaying the records gives the same end again, all but the view of the chain, which is read
anew: nothing is taken or signed on what was seen before a restart.

A seller sends a chunk when all earlier ones of that stream are paid; a buyer pays for at most one
chunk beyond those that he has checked. So either side can lose one chunk, and over all streams of
a channel, those that ended included, no more than its limit says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import (
    BadSignature,
    BudgetExhausted,
    LocalProtocolError,
    RemoteProtocolError,
)
from coase.protocol.types import ZERO_ADDRESS, AgentId

from .voucher import (
    WITHDRAW_DELAY_MAX_S,
    WITHDRAW_DELAY_MIN_S,
    ChannelConfig,
    ChannelView,
    Claim,
    Voucher,
    voucher_digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coase.protocol.identity import Identity
    from coase.protocol.terms import Domain, Terms

PUBLIC_DELAY_MIN_S: Final = 24 * 3600
"""A seller must be able to sleep through a night, or a halt of the chain, and still claim."""
VIEW_AGE_PARTS: Final = 3
"""A view is good for a third of the delay: a withdrawal armed after it cannot have ended yet."""
POLL_PARTS: Final = 6
"""Looking six times in a delay leaves, after one look that fails, two thirds of it to claim."""


class Fault(StrEnum):
    """Why a channel or a voucher is not good enough."""

    OTHER_RECEIVER = "other_receiver"
    FOREIGN_AUTHORIZER = "foreign_authorizer"
    """Somebody else than the receiver could refund what is not claimed yet."""
    REVOCABLE_SIGNATURE = "revocable_signature"
    """No key is named that signs vouchers: a contract may take its signature back."""
    OTHER_ASSET = "other_asset"
    WITHDRAW_DELAY = "withdraw_delay"
    OTHER_CHANNEL = "other_channel"
    BAD_SIGNATURE = "bad_signature"
    NOT_ABOVE_LAST = "not_above_last"
    TOO_LITTLE = "too_little"
    ABOVE_BALANCE = "above_balance"
    WITHDRAWAL_PENDING = "withdrawal_pending"


class VoucherRefused(RemoteProtocolError):
    """The other side's channel or voucher does not secure the money that it promises."""

    def __init__(self, fault: Fault, detail: str = "") -> None:
        super().__init__(f"{fault.value}: {detail}" if detail else fault.value)
        self.fault = fault


class ViewTooOld(LocalProtocolError):
    """The chain has to be asked first: what is known of the channel is too old, or nothing."""

    def __init__(self, age_s: int | None) -> None:
        told = "was never read" if age_s is None else f"is {age_s} s old"
        super().__init__(f"the channel's state {told}: read it from the chain first")
        self.age_s = age_s


class ExposureExceeded(LocalProtocolError):
    """One chunk more would put more at risk than is allowed."""

    def __init__(self, what: str, asked_units: int, limit_units: int) -> None:
        super().__init__(f"{what}: {asked_units} units asked for, {limit_units} allowed")
        self.asked_units, self.limit_units = asked_units, limit_units


class ChannelStopped(LocalProtocolError):
    """Nothing is signed on this channel any more; ask for the rest of the money back."""


def require_final(terms: Terms) -> None:
    """Return if nothing in ``terms`` waits for an arbiter: what a voucher paid, nobody can split.

    :raises LocalProtocolError: if they promise what a channel cannot keep
    """
    for name in ("bond_units", "stake_units", "default_to_seller_units"):
        if getattr(terms, name):
            raise LocalProtocolError(f"terms that are settled by a channel have {name} of 0")
    if terms.arbiter != ZERO_ADDRESS:
        raise LocalProtocolError("terms that are settled by a channel have no arbiter")


# ---- Records ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VoucherTaken:
    """The seller holds a voucher, and ``units`` of its increase pay for a deal."""

    deal_id: str
    units: int
    total_units: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class VoucherBooked:
    """A voucher came after one with a higher total: of what that one brought, ``units`` were meant
    for this deal."""

    deal_id: str
    units: int


@dataclass(frozen=True, slots=True)
class ChunkSent:
    """The seller is about to send a chunk worth ``units``."""

    deal_id: str
    units: int


@dataclass(frozen=True, slots=True)
class ChannelOpened:
    """The buyer begins to use a channel whose refund nonce was this."""

    refund_nonce: int
    signed_units: int = 0


@dataclass(frozen=True, slots=True)
class VoucherPromised:
    """The buyer is about to sign a total, of which ``units`` more pay for a deal."""

    deal_id: str
    units: int
    total_units: int


@dataclass(frozen=True, slots=True)
class ChunkChecked:
    """The buyer got a chunk worth ``units`` and it was good."""

    deal_id: str
    units: int


@dataclass(frozen=True, slots=True)
class TotalRecovered:
    """The buyer found his own signature over a total that his journal did not have."""

    total_units: int


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """Nothing more is sent or paid for a deal on this channel."""

    deal_id: str


@dataclass(frozen=True, slots=True)
class SigningStopped:
    """The buyer signs nothing more on this channel."""

    why: str


SellerRecord = VoucherTaken | VoucherBooked | ChunkSent | StreamEnded
BuyerRecord = (
    ChannelOpened | VoucherPromised | ChunkChecked | TotalRecovered | StreamEnded | SigningStopped
)


_KINDS: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        VoucherTaken,
        VoucherBooked,
        ChunkSent,
        ChannelOpened,
        VoucherPromised,
        ChunkChecked,
        TotalRecovered,
        StreamEnded,
        SigningStopped,
    )
}


def encode_record(record: SellerRecord | BuyerRecord) -> bytes:
    """Return a record as a journal keeps it."""
    told = {one.name: _as_text(getattr(record, one.name)) for one in fields(record)}
    return json.dumps({"kind": type(record).__name__, **told}, sort_keys=True).encode()


def decode_record(data: bytes) -> SellerRecord | BuyerRecord:
    """Return the record that ``encode_record`` wrote.

    :raises ValueError: if it did not
    """
    told = json.loads(data)
    if not isinstance(told, dict) or told.get("kind") not in _KINDS:
        raise ValueError("no record of a channel")
    kind = _KINDS[told.pop("kind")]
    types = {one.name: str(one.type) for one in fields(kind)}
    if told.keys() != types.keys():
        raise ValueError(f"a record of another form: {sorted(told)}")
    record: SellerRecord | BuyerRecord = kind(
        **{name: _from_text(types[name], text) for name, text in told.items()}
    )
    return record


def _as_text(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)


def _from_text(kind: str, text: str) -> object:
    if kind == "int":
        return int(text)
    return bytes.fromhex(text[2:]) if kind == "bytes" else text


@dataclass(frozen=True, slots=True)
class Stream:
    """One deal's share of a channel: the work that is done, and the vouchers booked to it."""

    work_units: int = 0
    """What was sent, for a seller; what was checked, for a buyer."""
    paid_units: int = 0


def _booked(
    streams: Mapping[str, Stream], deal_id: str, *, work_units: int = 0, paid_units: int = 0
) -> dict[str, Stream]:
    if not work_units and not paid_units:
        return dict(streams)  # A stranger's name alone makes no stream.
    old = streams.get(deal_id, Stream())
    new = Stream(old.work_units + work_units, old.paid_units + paid_units)
    return {**streams, deal_id: new}


def _unpaid(stream: Stream | None) -> int:
    return max(0, stream.work_units - stream.paid_units) if stream is not None else 0


def _unworked(stream: Stream | None) -> int:
    return max(0, stream.paid_units - stream.work_units) if stream is not None else 0


def _without(streams: Mapping[str, Stream], deal_id: str) -> dict[str, Stream]:
    return {name: stream for name, stream in streams.items() if name != deal_id}


# ---- The seller ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SellerPolicy:
    """What a seller accepts. Limits are units of the token."""

    tokens: frozenset[str]
    chunk_max_units: int
    exposure_max_units: int
    """For all streams of one channel together."""
    withdraw_delay_min_s: int = PUBLIC_DELAY_MIN_S


@dataclass(frozen=True, slots=True)
class SellerChannel:
    """A seller's end. Make it with ``accept``."""

    config: ChannelConfig
    domain: Domain
    policy: SellerPolicy
    voucher: Voucher | None = None
    streams: Mapping[str, Stream] = field(default_factory=dict)
    left_units: int = 0
    """What streams that ended have left unpaid."""
    unbooked_units: int = 0
    """What vouchers brought beyond what they paid for: it pays what is left unpaid, or deals whose
    own vouchers are on their way still."""
    view: ChannelView | None = None

    @classmethod
    def accept(
        cls,
        config: ChannelConfig,
        domain: Domain,
        policy: SellerPolicy,
        *,
        seller: AgentId,
        records: Iterable[SellerRecord] = (),
    ) -> SellerChannel:
        """Return the seller's end of a channel, as ``records`` have left it.

        :raises VoucherRefused: if vouchers of such a channel are not safe to take
        """
        if config.receiver != seller:
            raise VoucherRefused(Fault.OTHER_RECEIVER, config.receiver)
        if config.receiver_authorizer != seller:
            raise VoucherRefused(Fault.FOREIGN_AUTHORIZER, config.receiver_authorizer)
        if config.payer_authorizer == ZERO_ADDRESS:
            raise VoucherRefused(Fault.REVOCABLE_SIGNATURE)
        if config.token not in policy.tokens:
            raise VoucherRefused(Fault.OTHER_ASSET, config.token)
        shortest = max(WITHDRAW_DELAY_MIN_S, policy.withdraw_delay_min_s)
        if not shortest <= config.withdraw_delay_s <= WITHDRAW_DELAY_MAX_S:
            raise VoucherRefused(Fault.WITHDRAW_DELAY, f"{config.withdraw_delay_s} s")
        channel = cls(config, domain, policy)
        for record in records:
            channel = channel.after(record)
        return channel

    def after(self, record: SellerRecord) -> SellerChannel:
        """Return the end after a move that was journalled."""
        match record:
            case VoucherTaken(deal_id, units, total, signature):
                return replace(
                    self,
                    voucher=Voucher(self.channel_id, total, signature),
                    streams=_booked(self.streams, deal_id, paid_units=units),
                    unbooked_units=self.unbooked_units + self._surplus(deal_id, units, total),
                )
            case VoucherBooked(deal_id, units):
                return replace(
                    self,
                    streams=_booked(self.streams, deal_id, paid_units=units),
                    unbooked_units=self.unbooked_units - units,
                )
            case ChunkSent(deal_id, units):
                return replace(self, streams=_booked(self.streams, deal_id, work_units=units))
            case StreamEnded(deal_id):
                return replace(
                    self,
                    streams=_without(self.streams, deal_id),
                    left_units=self.left_units + _unpaid(self.streams.get(deal_id)),
                )

    def _surplus(self, deal_id: str, units: int, total: int) -> int:
        """Return what a voucher brings beyond ``units``.

        What lies below the first is not known. It may be old, and delivered for by a seller who
        lost his journal, so it pays no more than what is open in other deals now.
        """
        if self.voucher is not None:
            return total - self.voucher.units - units
        others = sum(_unpaid(one) for name, one in self.streams.items() if name != deal_id)
        return min(total - units, others)

    @property
    def arrears_units(self) -> int:
        """What ended streams have left unpaid: nobody gets a chunk for nothing again and again."""
        return max(0, self.left_units - self.unbooked_units)

    @property
    def channel_id(self) -> bytes:
        """The channel's id."""
        return self.config.channel_id(self.domain)

    @property
    def poll_every_s(self) -> int:
        """How often the chain must be asked for a pending withdrawal, while money is claimable."""
        return self.config.withdraw_delay_s // POLL_PARTS

    @property
    def exposed_units(self) -> int:
        """What was sent and is not paid, over all streams there are and were."""
        return self.arrears_units + sum(_unpaid(one) for one in self.streams.values())

    @property
    def secured_units(self) -> int:
        """The total that the seller holds a voucher for, or has claimed."""
        signed = self.voucher.units if self.voucher is not None else 0
        return max(signed, self.view.claimed_units if self.view is not None else 0)

    def see(self, view: ChannelView) -> SellerChannel:
        """Return the end with what the chain says of the channel now."""
        return replace(self, view=view)

    def forget_view(self) -> SellerChannel:
        """Return the end as after a restart or a top-up: the chain must be asked again."""
        return replace(self, view=None)

    def take(
        self, voucher: Voucher, *, deal_id: str, units: int, now_s: int
    ) -> tuple[SellerChannel, tuple[SellerRecord, ...]]:
        """Take a voucher that raises the total by at least ``units``, which pay for a deal.

        The same voucher again changes nothing, and pays for nothing more. What it raises the total
        by beyond ``units`` pays arrears, or the deals whose own vouchers come later than this one,
        which do not raise it any more; and else nobody: a seller who lost his journal is not made
        to deliver for it.

        :raises VoucherRefused: if it secures less than it says
        :raises ViewTooOld: if the chain has to be asked first
        """
        if self.voucher == voucher:
            return self, ()
        if voucher.channel_id != self.channel_id:
            raise VoucherRefused(Fault.OTHER_CHANNEL)
        if voucher.units <= self.secured_units and 0 < units <= self.unbooked_units:
            self._check_signed(voucher)
            booked = VoucherBooked(deal_id, units)
            return self.after(booked), (booked,)
        view = self._view(now_s)
        if view.is_withdrawing:
            raise VoucherRefused(Fault.WITHDRAWAL_PENDING)
        if voucher.units > view.solid_units:
            raise VoucherRefused(Fault.ABOVE_BALANCE, f"{voucher.units} of {view.solid_units}")
        if voucher.units <= self.secured_units:
            raise VoucherRefused(Fault.NOT_ABOVE_LAST, f"{voucher.units}")
        if units < 0 or voucher.units < self.secured_units + units:
            raise VoucherRefused(Fault.TOO_LITTLE, f"{voucher.units - self.secured_units}")
        self._check_signed(voucher)
        record = VoucherTaken(deal_id, units, voucher.units, voucher.signature)
        return self.after(record), (record,)

    def _check_signed(self, voucher: Voucher) -> None:
        try:
            signer = voucher.signer(self.domain)
        except BadSignature as error:
            raise VoucherRefused(Fault.BAD_SIGNATURE, str(error)) from error
        if signer != self.config.payer_authorizer:
            raise VoucherRefused(Fault.BAD_SIGNATURE, f"signed by {signer}")

    def send(
        self, *, deal_id: str, units: int, now_s: int
    ) -> tuple[SellerChannel, tuple[SellerRecord, ...]]:
        """Send the next chunk of a deal, worth ``units``, before it is paid.

        :raises ExposureExceeded: if the chunk before it is not paid, or it is too much at once
        :raises VoucherRefused: if the channel could not pay for it
        :raises ViewTooOld: if the chain has to be asked first
        """
        stream = self.streams.get(deal_id, Stream())
        ahead = stream.work_units - stream.paid_units
        if ahead > 0:
            raise ExposureExceeded(f"{deal_id} has a chunk that is not paid", ahead, 0)
        if not 0 < units <= self.policy.chunk_max_units:
            raise ExposureExceeded("one chunk", units, self.policy.chunk_max_units)
        at_risk = self.exposed_units + max(0, units + ahead)
        if at_risk > self.policy.exposure_max_units:
            limit = self.policy.exposure_max_units
            raise ExposureExceeded("all streams of the channel", at_risk, limit)
        view = self._view(now_s)
        if view.is_withdrawing:
            raise VoucherRefused(Fault.WITHDRAWAL_PENDING)
        if self.secured_units + at_risk - self.arrears_units > view.solid_units:
            left = view.solid_units - self.secured_units
            raise VoucherRefused(Fault.ABOVE_BALANCE, f"{left} units are left")
        record = ChunkSent(deal_id, units)
        return self.after(record), (record,)

    def end(self, deal_id: str) -> tuple[SellerChannel, tuple[SellerRecord, ...]]:
        """End a stream; what is not paid by then is in arrears."""
        if deal_id not in self.streams:
            return self, ()
        record = StreamEnded(deal_id)
        return self.after(record), (record,)

    @property
    def claim(self) -> Claim | None:
        """What can be claimed now, as far as the chain was seen; None if that is nothing."""
        if self.voucher is None or self.view is None:
            return None
        units = min(self.voucher.units, self.view.balance_units)
        return Claim(self.config, self.voucher, units) if units > self.view.claimed_units else None

    @property
    def refundable_units(self) -> int:
        """What may be given back: nothing that a voucher covers, and nothing in mid-stream."""
        if self.view is None or self.streams:
            return 0
        return max(0, self.view.balance_units - self.secured_units)

    def _view(self, now_s: int) -> ChannelView:
        age_s = None if self.view is None else now_s - self.view.time_s
        if self.view is None or age_s is None:
            raise ViewTooOld(None)
        if age_s > self.config.withdraw_delay_s // VIEW_AGE_PARTS:
            raise ViewTooOld(age_s)
        return self.view


# ---- The buyer -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BuyerLimits:
    """What a buyer risks with one seller. Limits are units of the token."""

    deposit_max_units: int
    """All that is free in the channel: a thief of the signing key gets no more to spend."""
    chunk_max_units: int
    exposure_max_units: int
    """For all streams of one channel together."""


@dataclass(frozen=True, slots=True)
class BuyerChannel:
    """A buyer's end. Make it with ``open`` or, without a journal, with ``after_loss``."""

    config: ChannelConfig
    domain: Domain
    limits: BuyerLimits
    signed_units: int = 0
    """The highest total that was ever promised; it may be signed again at any time."""
    refund_nonce: int = 0
    streams: Mapping[str, Stream] = field(default_factory=dict)
    arrears_units: int = 0
    """What was paid ahead in streams that ended, and never came."""
    stopped: str = ""
    view: ChannelView | None = None

    @classmethod
    def open(
        cls, config: ChannelConfig, domain: Domain, limits: BuyerLimits, view: ChannelView
    ) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Begin to use a channel that this side has never signed for."""
        record = ChannelOpened(view.refund_nonce)
        return cls(config, domain, limits).after(record).see(view)[0], (record,)

    @classmethod
    def after_loss(
        cls, config: ChannelConfig, domain: Domain, limits: BuyerLimits, view: ChannelView
    ) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Begin again with what the chain knows, where the journal is lost."""
        record = ChannelOpened(view.refund_nonce, view.claimed_units)
        return cls(config, domain, limits).after(record).see(view)[0], (record,)

    @classmethod
    def replay(
        cls,
        config: ChannelConfig,
        domain: Domain,
        limits: BuyerLimits,
        records: Iterable[BuyerRecord],
    ) -> BuyerChannel:
        """Return the end as ``records`` have left it; the chain must be asked before it signs."""
        channel = cls(config, domain, limits)
        for record in records:
            channel = channel.after(record)
        return channel

    def after(self, record: BuyerRecord) -> BuyerChannel:
        """Return the end after a move that was journalled."""
        match record:
            case ChannelOpened(nonce, signed):
                return replace(self, refund_nonce=nonce, signed_units=signed)
            case VoucherPromised(deal_id, units, total):
                streams = _booked(self.streams, deal_id, paid_units=units)
                return replace(self, signed_units=total, streams=streams)
            case ChunkChecked(deal_id, units):
                return replace(self, streams=_booked(self.streams, deal_id, work_units=units))
            case TotalRecovered(total):
                return replace(self, signed_units=max(self.signed_units, total))
            case StreamEnded(deal_id):
                return replace(
                    self,
                    streams=_without(self.streams, deal_id),
                    arrears_units=self.arrears_units + _unworked(self.streams.get(deal_id)),
                )
            case SigningStopped(why):
                return replace(self, stopped=self.stopped or why)

    @property
    def channel_id(self) -> bytes:
        """The channel's id."""
        return self.config.channel_id(self.domain)

    @property
    def exposed_units(self) -> int:
        """What was promised beyond what was checked, over all streams there are and were."""
        return self.arrears_units + sum(_unworked(one) for one in self.streams.values())

    @property
    def rest_units(self) -> int:
        """What can be asked back without taking from the seller what was signed."""
        if self.view is None:
            return 0
        return max(0, self.view.balance_units - max(self.signed_units, self.view.claimed_units))

    def see(self, view: ChannelView) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Take note of what the chain says; stop signing if the channel is no longer as agreed."""
        after, why = replace(self, view=view), ""
        if view.refund_nonce != self.refund_nonce:
            why = "the seller refunded"
        elif view.claimed_units > self.signed_units:
            why = "more was claimed than this journal knows to have signed"
        elif view.is_withdrawing:
            why = "a withdrawal is pending"
        if not why or self.stopped:
            return after, ()
        record = SigningStopped(why)
        return after.after(record), (record,)

    def check_deposit(self, units: int) -> None:
        """Return if ``units`` may be put into the channel.

        :raises BudgetExhausted: if more would be free there than one seller is trusted with
        :raises ChannelStopped: if this side signs nothing there any more
        """
        self._check_going()
        free = self.view.free_units if self.view is not None else 0
        left = self.limits.deposit_max_units - free
        if units <= 0 or units > left:
            raise BudgetExhausted(
                limit="deposit with one seller", asked_units=units, left_units=max(0, left)
            )

    def promise(self, *, deal_id: str, units: int) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Pay ``units`` more for a deal: for chunks that were checked, and at most one ahead.

        The voucher is signed by ``sign``, after the record is on the disk.

        :raises ExposureExceeded: if that is too far ahead of what was checked
        :raises BudgetExhausted: if the channel does not hold so much
        :raises ChannelStopped: if this side signs nothing more
        """
        self._check_going()
        if self.view is None:
            raise ViewTooOld(None)
        stream = self.streams.get(deal_id, Stream())
        ahead = stream.paid_units + units - stream.work_units
        if units <= 0 or ahead > self.limits.chunk_max_units:
            raise ExposureExceeded("one chunk", ahead, self.limits.chunk_max_units)
        at_risk = self.exposed_units - _unworked(stream) + max(0, ahead)
        if at_risk > self.limits.exposure_max_units:
            limit = self.limits.exposure_max_units
            raise ExposureExceeded("all streams of the channel", at_risk, limit)
        left = self.view.solid_units - self.signed_units
        if units > left:
            raise BudgetExhausted(limit="the channel", asked_units=units, left_units=max(0, left))
        record = VoucherPromised(deal_id, units, self.signed_units + units)
        return self.after(record), (record,)

    def sign(self, identity: Identity) -> Voucher:
        """Return the voucher over all that was promised; the same bytes each time.

        :raises LocalProtocolError: if that key does not sign for this channel
        """
        if identity.address != self.config.payer_authorizer:
            raise LocalProtocolError(f"{identity.address} does not sign for this channel")
        digest = voucher_digest(self.domain, self.channel_id, self.signed_units)
        return Voucher(self.channel_id, self.signed_units, identity.sign(digest))

    def check(self, *, deal_id: str, units: int) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Note that a chunk worth ``units`` came and was good."""
        record = ChunkChecked(deal_id, units)
        return self.after(record), (record,)

    def recover(self, theirs: Voucher) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Adopt the total that the seller holds, which is above what this journal knows.

        :raises VoucherRefused: if it does not carry this side's own signature
        :raises ExposureExceeded: if it is more than one chunk above; do not sign on, withdraw
        """
        if theirs.channel_id != self.channel_id:
            raise VoucherRefused(Fault.OTHER_CHANNEL)
        try:
            signer = theirs.signer(self.domain)
        except BadSignature as error:
            raise VoucherRefused(Fault.BAD_SIGNATURE, str(error)) from error
        if signer != self.config.payer_authorizer:
            raise VoucherRefused(Fault.BAD_SIGNATURE, f"signed by {signer}")
        if theirs.units <= self.signed_units:
            return self, ()
        above = theirs.units - self.signed_units
        if above > self.limits.chunk_max_units:
            raise ExposureExceeded("a total unknown here", above, self.limits.chunk_max_units)
        record = TotalRecovered(theirs.units)
        return self.after(record), (record,)

    def end(self, deal_id: str) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """End a stream; what was paid ahead by then is in arrears."""
        if deal_id not in self.streams:
            return self, ()
        record = StreamEnded(deal_id)
        return self.after(record), (record,)

    def stop(self, why: str) -> tuple[BuyerChannel, tuple[BuyerRecord, ...]]:
        """Sign nothing more, before asking for the rest back."""
        if self.stopped:
            return self, ()
        record = SigningStopped(why)
        return self.after(record), (record,)

    def _check_going(self) -> None:
        if self.stopped:
            raise ChannelStopped(f"this channel is at its end: {self.stopped}")
