"""Channels in memory: the rules of the contract, refusal for refusal, each call a block of its own.

``MemoryLedger`` is synchronous and deterministic; ``MemoryChannels`` is the port over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.escrow.ports import ChannelEvent, Channels, Receipt
from coase.escrow.voucher import (
    WITHDRAW_DELAY_MAX_S,
    WITHDRAW_DELAY_MIN_S,
    AskWithdrawal,
    ChannelCall,
    ChannelConfig,
    ChannelView,
    Claim,
    ClaimAll,
    Fund,
    GiveBack,
    PayOut,
    TakeWithdrawal,
    channels_domain,
)
from coase.protocol.errors import BadSignature, CallReverted, LocalProtocolError
from coase.protocol.identity import keccak256
from coase.protocol.types import UNITS_MAX, ZERO_ADDRESS, AgentId, Asset, Head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.protocol.identity import Identity

_CANNOT_BE_ZERO: Final = ("payer", "receiver", "receiver_authorizer", "token")


@dataclass(slots=True)
class _Channel:
    balance: int = 0
    claimed: int = 0
    withdrawing: int = 0
    since_s: int = 0
    refunds: int = 0

    @property
    def free(self) -> int:
        return self.balance - self.claimed


class MemoryLedger:
    """One token and its channels. ``time_s`` is the time of the next block: a test moves it."""

    def __init__(self, asset: Asset, *, time_s: int = 0) -> None:
        self.asset = asset
        self.domain = channels_domain(asset.chain_id)
        self.time_s = time_s
        self.number = 0
        self.balances: dict[AgentId, int] = {}
        self.events: list[ChannelEvent] = []
        self._channels: dict[bytes, _Channel] = {}
        self._claimed: dict[AgentId, int] = {}
        self._paid: dict[AgentId, int] = {}
        self._deposits: set[tuple[bytes, bytes]] = set()
        self._told: list[tuple[str, bytes, int, int]] = []

    def mint(self, owner: AgentId, units: int) -> None:
        """Give ``owner`` new units."""
        self.balances[owner] = self.balances.get(owner, 0) + units

    def view(self, channel_id: bytes) -> ChannelView:
        """Return what the newest block says of a channel."""
        one = self._channels.get(channel_id, _Channel())
        return ChannelView(
            one.balance, one.claimed, one.withdrawing, one.since_s, one.refunds, self.time_s
        )

    def unpaid(self, receiver: AgentId) -> int:
        """Return what was claimed for ``receiver`` and not yet paid out."""
        return self._claimed.get(receiver, 0) - self._paid.get(receiver, 0)

    def execute(self, call: ChannelCall, caller: AgentId) -> Receipt:
        """Make a block of ``call``, or refuse it and change nothing.

        :raises CallReverted: by the name that the contract would give
        """
        self._told = []
        match call:
            case Fund():
                self._fund(call, caller)
            case ClaimAll(rows):
                self._claim(rows, caller)
            case PayOut(receiver):
                units = self.unpaid(receiver)
                self._paid[receiver] = self._claimed.get(receiver, 0)
                self._move(self.domain.contract, receiver, units)
            case AskWithdrawal(config, units):
                self._ask(config, units, caller)
            case TakeWithdrawal(config):
                self._take(config, caller)
            case GiveBack(config, units):
                self._give_back(config, units, caller)
        self.number += 1
        tx_hash = "0x" + keccak256(b"channels/%d" % self.number).hex()
        for index, (kind, channel_id, units, total) in enumerate(self._told):
            self.events.append(
                ChannelEvent(
                    kind, channel_id, self.number, index, self.time_s, tx_hash, units, total
                )
            )
        return Receipt(tx_hash, self.number, self.time_s, 0)

    # -- the rules ---------------------------------------------------------------------------

    def _fund(self, call: Fund, caller: AgentId) -> None:
        config, channel_id = call.config, call.config.channel_id(self.domain)
        if config.payer != caller or config.token != self.asset.token:
            raise LocalProtocolError(f"{caller} cannot pay into this channel here")
        if ZERO_ADDRESS in [getattr(config, name) for name in _CANNOT_BE_ZERO]:
            raise CallReverted("InvalidChannel")
        if not WITHDRAW_DELAY_MIN_S <= config.withdraw_delay_s <= WITHDRAW_DELAY_MAX_S:
            raise CallReverted("WithdrawDelayOutOfRange")
        if call.units == 0:
            raise CallReverted("ZeroDeposit")
        one = self._channels.get(channel_id, _Channel())
        if one.balance + call.units > UNITS_MAX:
            raise CallReverted("DepositOverflow")
        if self.time_s >= call.deadline_s:
            raise CallReverted("ERC3009InvalidAuthorizationTime", 0, call.deadline_s)
        if (channel_id, call.salt) in self._deposits:
            raise CallReverted("ERC3009UsedAuthorization", caller)
        if self.balances.get(caller, 0) < call.units:
            raise CallReverted(
                "ERC20InsufficientBalance", caller, self.balances.get(caller, 0), call.units
            )
        self._deposits.add((channel_id, call.salt))
        if one.balance == one.claimed == 0:
            self._told.append(("created", channel_id, 0, 0))
        one.balance += call.units
        self._channels[channel_id] = one
        self._move(caller, self.domain.contract, call.units)
        self._told.append(("deposited", channel_id, call.units, one.balance))

    def _claim(self, rows: Sequence[Claim], caller: AgentId) -> None:
        if not rows:
            raise CallReverted("EmptyBatch")
        totals: dict[bytes, int] = {}
        for row in rows:
            config, channel_id = row.config, row.config.channel_id(self.domain)
            if caller not in (config.receiver, config.receiver_authorizer):
                raise CallReverted("NotAuthorizedToClaim")
            one = self._channels.get(channel_id, _Channel())
            before = totals.get(channel_id, one.claimed)
            if row.units <= before:
                continue
            if row.units > row.voucher.units:
                raise CallReverted("ClaimExceedsCeiling")
            if row.units > one.balance:
                raise CallReverted("ClaimExceedsBalance")
            self._check_signed(row, channel_id)
            totals[channel_id] = row.units
            self._told.append(("claimed", channel_id, row.units - before, row.units))
        receivers = {row.config.channel_id(self.domain): row.config.receiver for row in rows}
        for channel_id, total in totals.items():
            one, receiver = self._channels[channel_id], receivers[channel_id]
            self._claimed[receiver] = self._claimed.get(receiver, 0) + total - one.claimed
            one.claimed = total

    def _check_signed(self, row: Claim, channel_id: bytes) -> None:
        signer = row.config.payer_authorizer
        if signer == ZERO_ADDRESS:
            signer = row.config.payer
        try:
            fine = (
                row.voucher.channel_id == channel_id and row.voucher.signer(self.domain) == signer
            )
        except BadSignature:
            fine = False
        if not fine:
            raise CallReverted("InvalidSignature")

    def _ask(self, config: ChannelConfig, units: int, caller: AgentId) -> None:
        if caller not in (config.payer, config.payer_authorizer):
            raise CallReverted("InvalidChannel")
        if units == 0:
            raise CallReverted("NothingToWithdraw")
        channel_id = config.channel_id(self.domain)
        one = self._channels.get(channel_id, _Channel())
        if one.since_s:
            raise CallReverted("WithdrawalAlreadyPending")
        if units > one.free:
            raise CallReverted("WithdrawAmountExceedsAvailable")
        one.withdrawing, one.since_s = units, self.time_s
        self._told.append(("withdrawing", channel_id, units, 0))

    def _take(self, config: ChannelConfig, caller: AgentId) -> None:
        if caller not in (config.payer, config.payer_authorizer):
            raise CallReverted("NotAuthorizedToFinalizeWithdraw")
        channel_id = config.channel_id(self.domain)
        one = self._channels.get(channel_id, _Channel())
        if not one.since_s:
            raise CallReverted("WithdrawalNotPending")
        if self.time_s < one.since_s + config.withdraw_delay_s:
            raise CallReverted("WithdrawDelayNotElapsed")
        units = min(one.withdrawing, one.free)
        one.withdrawing = one.since_s = 0
        self._told.append(("withdrawn", channel_id, units, 0))
        self._pay_back(config, channel_id, units)

    def _give_back(self, config: ChannelConfig, asked: int, caller: AgentId) -> None:
        if caller not in (config.receiver, config.receiver_authorizer):
            raise CallReverted("NotAuthorizedToRefund")
        if asked == 0:
            raise CallReverted("ZeroRefund")
        channel_id = config.channel_id(self.domain)
        one = self._channels.setdefault(channel_id, _Channel())
        one.refunds += 1
        units = min(asked, one.free)
        if units == 0:
            return
        if units < one.withdrawing:
            one.withdrawing -= units
        else:
            one.withdrawing = one.since_s = 0
        self._told.append(("refunded", channel_id, units, 0))
        self._pay_back(config, channel_id, units)

    def _pay_back(self, config: ChannelConfig, channel_id: bytes, units: int) -> None:
        one = self._channels[channel_id]
        one.balance -= units
        self._move(self.domain.contract, config.payer, units)
        if one.balance == one.claimed == 0:
            self._told.append(("closed", channel_id, 0, 0))

    def _move(self, source: AgentId, to: AgentId, units: int) -> None:
        self.balances[source] = self.balances.get(source, 0) - units
        self.balances[to] = self.balances.get(to, 0) + units


class MemoryChannels(Channels):
    """The port over a ledger in memory."""

    def __init__(self, ledger: MemoryLedger) -> None:
        self.ledger = ledger
        self.asset = ledger.asset
        self.domain = ledger.domain
        self.confirmations = 0
        self._done: dict[tuple[AgentId, str], tuple[ChannelCall, Receipt]] = {}

    async def head(self) -> Head:
        """Return the newest block."""
        return Head(self.ledger.number, self.ledger.time_s)

    async def views(self, channel_ids: Sequence[bytes]) -> dict[bytes, ChannelView]:
        """Return what the newest block says of each channel."""
        return {one: self.ledger.view(one) for one in channel_ids}

    async def unpaid(self, receiver: AgentId) -> int:
        """Return the units that were claimed for ``receiver`` and not yet paid out."""
        return self.ledger.unpaid(receiver)

    async def held(self) -> int:
        """Return all token units that the channels hold."""
        return await self.balance(self.domain.contract)

    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of any channel."""
        return self.ledger.balances.get(owner, 0)

    async def gas_price_wei(self) -> int:
        """Return 0: nothing costs gas here."""
        return 0

    async def perform(self, effect_id: str, call: ChannelCall, identity: Identity) -> Receipt:
        """Execute ``call``, once for each effect id of a sender.

        :raises CallReverted: if the contract would refuse it
        :raises LocalProtocolError: if that id stands for another call
        """
        known = self._done.get((identity.address, effect_id))
        if known is not None:
            if known[0] != call:
                raise LocalProtocolError(f"the effect {effect_id!r} was another call")
            return known[1]
        receipt = self.ledger.execute(call, identity.address)
        self._done[identity.address, effect_id] = (call, receipt)
        return receipt

    async def events(self, from_block: int) -> tuple[list[ChannelEvent], int]:
        """Return the events from ``from_block`` on, and the next block to ask from."""
        found = [event for event in self.ledger.events if event.block >= from_block]
        return found, max(from_block, self.ledger.number + 1)

    async def close(self) -> None:
        """Do nothing."""
