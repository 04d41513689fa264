"""The channels port over x402's contract, at any endpoint of an EVM chain."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from eth_abi.abi import encode as abi_encode

from coase.escrow.ports import ChannelEvent, Channels, FundingKind, Receipt
from coase.escrow.voucher import (
    CHANNELS,
    AskWithdrawal,
    ChannelCall,
    ChannelConfig,
    ChannelView,
    ClaimAll,
    Fund,
    GiveBack,
    PayOut,
    TakeWithdrawal,
    channels_domain,
    deposit_nonce,
    permit2_deposit_digest,
)
from coase.protocol.errors import (
    CallReverted,
    ChainUnavailable,
    ConfigurationError,
    LocalProtocolError,
)
from coase.protocol.terms import receive_digest
from coase.protocol.types import ZERO_ADDRESS, AgentId, Head

from .abi import Abi, token_abi
from .artifacts import artifact
from .chain import EvmChain, Request, other_call
from .deploy import created_by_proxy
from .fixed import AUTHORIZATION_COLLECTOR, PERMIT2, PERMIT2_COLLECTOR
from .rpc import RpcFailed
from .settlement import APPROVE_GAS, UINT256_MAX, EvmSettlement, TokenFacts, token_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coase.escrow.ports import TxStore
    from coase.escrow.voucher import Claim
    from coase.protocol.identity import Identity

    from .rpc import ChainBlock

# Far above what was measured with our token, since other tokens cost more.
FUND_GAS: Final = 400_000
CLAIM_GAS: Final = 100_000
CLAIM_ROW_GAS: Final = 80_000
MOVE_GAS: Final = 250_000
LOGS_RANGE_MAX_BLOCKS: Final = 2_000  # What careful public endpoints give at a time.
READS: Final = ("channels", "pendingWithdrawals", "refundNonce")
KINDS: Final = {
    "ChannelCreated": "created",
    "ChannelClosed": "closed",
    "Deposited": "deposited",
    "Claimed": "claimed",
    "Refunded": "refunded",
    "WithdrawInitiated": "withdrawing",
    "WithdrawFinalized": "withdrawn",
}
_UNITS: Final = ("amount", "claimAmount")
_TOTALS: Final = ("newBalance", "newTotalClaimed")


@cache
def channels_abi() -> Abi:
    """Return the contract's ABI, with the errors that tokens and collectors raise through it."""
    names = ("CoaseToken", "ERC3009Collector", "Permit2Collector", "Permit2")
    errors = [item for name in names for item in artifact(name).abi if item["type"] == "error"]
    return Abi([*errors, *artifact("PaymentChannels").abi])


class EvmChannels(Channels):
    """Channels on a real chain. Make it with ``connect``."""

    def __init__(
        self,
        chain: EvmChain,
        token: TokenFacts,
        *,
        contract: str,
        confirmations: int,
        own_chain: bool = True,
    ) -> None:
        self.chain = chain
        self.asset = token.asset
        self.domain = channels_domain(chain.chain_id, contract)
        self.confirmations = confirmations
        self._token = token
        self._own_chain = own_chain
        self._by_signature, self._by_permit2 = collectors_of(contract)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str,
        store: TxStore,
        chain_id: int | None = None,
        contract: str = CHANNELS,
        confirmations: int = 0,
        **options: Any,
    ) -> EvmChannels:
        """Return the channels of ``token`` at ``url``.

        :raises ChainUnavailable: if the endpoint does not answer
        :raises ConfigurationError: if the contract is not there, or the chain is another one
        """
        chain = await EvmChain.connect(url, store=store, chain_id=chain_id, **options)
        try:
            await require_channels(chain, contract)
            facts = await token_facts(chain, token)
        except BaseException:
            await chain.close()
            raise
        return cls(chain, facts, contract=contract, confirmations=confirmations)

    @classmethod
    async def beside(cls, settlement: EvmSettlement, *, contract: str = CHANNELS) -> EvmChannels:
        """Return the channels of ``settlement``'s token over the connection that it has already.

        One client for both keeps the order of a key's transactions. It is the settlement's to
        close.

        :raises ConfigurationError: if there are no channels at ``contract``
        """
        await require_channels(settlement.chain, contract)
        facts = TokenFacts(settlement.asset, settlement.token_domain, settlement.kinds)
        return cls(
            settlement.chain,
            facts,
            contract=contract,
            confirmations=settlement.confirmations,
            own_chain=False,
        )

    async def close(self) -> None:
        """Release the connections, if they are not a settlement's. Safe to repeat."""
        if self._own_chain:
            await self.chain.close()

    # -- reading -----------------------------------------------------------------------------

    async def head(self) -> Head:
        """Return the newest block.

        :raises ChainUnavailable: if the endpoint does not answer
        """
        block = await self.chain.endpoint.latest()
        return Head(block.number, block.time_s)

    async def views(self, channel_ids: Sequence[bytes]) -> dict[bytes, ChannelView]:
        """Return what one block, ``confirmations`` below the newest, says of each channel."""
        ids = list(dict.fromkeys(channel_ids))
        block = await self._settled()
        if block is None or not ids:
            return dict.fromkeys(ids, ChannelView())
        abi = channels_abi()
        requests = [
            ("eth_call", [self._request(abi.encode(name, one)), hex(block.number)])
            for one in ids
            for name in READS
        ]
        try:
            answers = await self.chain.endpoint.ask_many(requests)
        except RpcFailed as error:
            raise ChainUnavailable(
                f"{self.chain.endpoint.url} does not tell of channels: {error}"
            ) from error
        told = [bytes.fromhex(str(answer)[2:]) for answer in answers]
        return {
            one: view_of(told[place : place + len(READS)], block.time_s)
            for one, place in zip(ids, range(0, len(told), len(READS)), strict=True)
        }

    async def unpaid(self, receiver: AgentId) -> int:
        """Return the units that were claimed for ``receiver`` and not yet paid out."""
        abi = channels_abi()
        data = abi.encode("receivers", receiver, self.asset.token)
        claimed, paid = abi.functions["receivers"].decode(
            await self.chain.call(self.domain.contract, data, abi)
        )
        return int(claimed - paid)

    async def held(self) -> int:
        """Return all token units that the contract holds."""
        return await self.balance(self.domain.contract)

    async def balance(self, owner: AgentId) -> int:
        """Return the token units that ``owner`` holds outside of any channel."""
        data = token_abi().encode("balanceOf", owner)
        return int.from_bytes(await self.chain.call(self.asset.token, data, token_abi()), "big")

    async def gas_price_wei(self) -> int:
        """Return what a unit of gas costs now, for ``plan_claims``."""
        try:
            return int(await self.chain.endpoint.ask("eth_gasPrice"), 16)
        except RpcFailed as error:
            raise ChainUnavailable(
                f"{self.chain.endpoint.url} tells no price of gas: {error}"
            ) from error

    async def events(self, from_block: int) -> tuple[list[ChannelEvent], int]:
        """Return the events from ``from_block`` on, oldest first, and the next block to ask."""
        block = await self._settled()
        events: list[ChannelEvent] = []
        first = from_block
        while block is not None and first <= block.number:
            last = min(block.number, first + LOGS_RANGE_MAX_BLOCKS - 1)
            events += await self._events(first, last)
            first = last + 1
        return events, first

    async def _events(self, first: int, last: int) -> list[ChannelEvent]:
        abi = channels_abi()
        query = {
            "address": self.domain.contract,
            "topics": [["0x" + abi.topic(name).hex() for name in KINDS]],
            "fromBlock": hex(first),
            "toBlock": hex(last),
        }
        try:
            raws = await self.chain.endpoint.ask("eth_getLogs", query)
        except RpcFailed as error:
            raise ChainUnavailable(f"{self.chain.endpoint.url} gives no logs: {error}") from error
        numbers = dict.fromkeys(int(raw["blockNumber"], 16) for raw in raws)
        blocks = await asyncio.gather(*(self.chain.endpoint.block(hex(one)) for one in numbers))
        times = {block.number: block.time_s for block in blocks}
        return [event_of(raw, times[int(raw["blockNumber"], 16)]) for raw in raws]

    async def _settled(self) -> ChainBlock | None:
        """Return the newest block that counts; None while the chain is not as deep."""
        block = await self.chain.endpoint.latest()
        if not self.confirmations:
            return block
        if block.number < self.confirmations:
            return None
        return await self.chain.endpoint.block(hex(block.number - self.confirmations))

    def _request(self, data: bytes) -> dict[str, str]:
        return {"to": self.domain.contract, "input": "0x" + data.hex()}

    # -- writing -----------------------------------------------------------------------------

    async def perform(self, effect_id: str, call: ChannelCall, identity: Identity) -> Receipt:
        """Send ``call`` from ``identity`` and return its receipt once it is in a block.

        :raises CallReverted: if the contract or the token refuses it; it is tried before it is sent
        :raises LocalProtocolError: if that id stands for another call
        :raises ChainUnavailable: if it cannot be told whether it went through; repeat it
        """
        data = self._call_data(call, identity)
        kept = await self.chain.kept(effect_id)
        if kept is not None and kept[0] != data:
            raise other_call(effect_id)
        if kept is None and isinstance(call, Fund) and not self._by_authorization:
            await self._approve(effect_id, identity, call.units)
        request = Request(self.domain.contract, data, _gas(call))
        receipt = await self.chain.send(effect_id, identity, request, channels_abi())
        block = await self.chain.endpoint.block(hex(receipt.block))
        return Receipt(receipt.tx_hash, receipt.block, block.time_s, receipt.gas)

    @property
    def _by_authorization(self) -> bool:
        return FundingKind.AUTHORIZATION in self._token.kinds

    def _call_data(self, call: ChannelCall, identity: Identity) -> bytes:
        abi = channels_abi()
        match call:
            case Fund():
                collector, data = self._funding(call, identity)
                return abi.encode("deposit", _tuple(call.config), call.units, collector, data)
            case ClaimAll(rows):
                return abi.encode("claim", [_row(row) for row in rows])
            case PayOut(receiver):
                return abi.encode("settle", receiver, self.asset.token)
            case AskWithdrawal(config, units):
                return abi.encode("initiateWithdraw", _tuple(config), units)
            case TakeWithdrawal(config):
                return abi.encode("finalizeWithdraw", _tuple(config))
            case GiveBack(config, units):
                return abi.encode("refund", _tuple(config), units)

    def _funding(self, call: Fund, identity: Identity) -> tuple[str, bytes]:
        """Return the collector, and what it needs to take the payer's money, signed by him."""
        if call.config.payer != identity.address:
            raise LocalProtocolError(f"{identity.address} is not the payer of this channel")
        if call.config.token != self.asset.token:
            raise LocalProtocolError(f"this channel is of another token, {call.config.token}")
        channel_id = call.config.channel_id(self.domain)
        nonce = deposit_nonce(channel_id, call.salt)
        if self._by_authorization:
            digest = receive_digest(
                self._token.domain,
                identity.address,
                self._by_signature,
                call.units,
                0,
                call.deadline_s,
                nonce,
            )
            salt = int.from_bytes(call.salt, "big")
            values = (0, call.deadline_s, salt, identity.sign(digest))
            return self._by_signature, abi_encode(
                ["uint256", "uint256", "uint256", "bytes"], values
            )
        number = int.from_bytes(nonce, "big")
        digest = permit2_deposit_digest(
            chain_id=self.chain.chain_id,
            permit2=PERMIT2,
            collector=self._by_permit2,
            token=self.asset.token,
            units=call.units,
            nonce=number,
            deadline_s=call.deadline_s,
            channel_id=channel_id,
        )
        permitted = (number, call.deadline_s, identity.sign(digest), b"")
        return self._by_permit2, abi_encode(["uint256", "uint256", "bytes", "bytes"], permitted)

    async def _approve(self, effect_id: str, identity: Identity, units: int) -> None:
        """See to it that Permit2 may draw ``units``: a standing allowance, given once."""
        abi, token = token_abi(), self.asset.token
        asked = abi.encode("allowance", identity.address, PERMIT2)
        if int.from_bytes(await self.chain.call(token, asked, abi), "big") >= units:
            return
        request = Request(token, abi.encode("approve", PERMIT2, UINT256_MAX), APPROVE_GAS)
        await self.chain.send(f"{effect_id}/approve", identity, request, abi)


def collectors_of(contract: str) -> tuple[str, str]:
    """Return who brings deposits to the channels at ``contract``: by EIP-3009, and by Permit2.

    Beside another contract than everybody's, those that its deployment put there.
    """
    if contract == CHANNELS:
        return AUTHORIZATION_COLLECTOR, PERMIT2_COLLECTOR
    by_signature, by_permit2 = (created_by_proxy(code) for code in collector_codes(contract))
    return by_signature, by_permit2


def collector_codes(contract: str) -> tuple[bytes, bytes]:
    """Return the code that makes each of the two collectors."""
    where = abi_encode(["address"], [contract])
    return (
        artifact("ERC3009Collector").bytecode + where,
        artifact("Permit2Collector").bytecode + where,
    )


async def require_channels(chain: EvmChain, contract: str) -> None:
    """Return if the contract gives channels the same ids as we do, whoever wrote its code.

    :raises ConfigurationError: if it does not
    """
    one = ChannelConfig(*(ZERO_ADDRESS,) * 5, withdraw_delay_s=1)
    abi = channels_abi()
    expected = one.channel_id(channels_domain(chain.chain_id, contract))
    try:
        found = await chain.call(contract, abi.encode("getChannelId", _tuple(one)), abi)
    except CallReverted:
        found = b""
    if found != expected:
        raise ConfigurationError(
            f"at {contract} on chain {chain.chain_id} are no payment channels: on a local chain, "
            "start it with a fresh state directory"
        )


def _tuple(config: ChannelConfig) -> tuple[object, ...]:
    return tuple(getattr(config, name) for name in config.__slots__)


def _row(row: Claim) -> tuple[object, ...]:
    return ((_tuple(row.config), row.voucher.units), row.voucher.signature, row.units)


def _gas(call: ChannelCall) -> int:
    match call:
        case Fund():
            return FUND_GAS
        case ClaimAll(rows):
            return CLAIM_GAS + CLAIM_ROW_GAS * len(rows)
    return MOVE_GAS


def view_of(told: list[bytes], time_s: int) -> ChannelView:
    """Return what the answers to the calls ``READS`` say of a channel."""
    functions = channels_abi().functions
    balance, claimed = functions["channels"].decode(told[0])
    withdrawing, since = functions["pendingWithdrawals"].decode(told[1])
    (nonce,) = functions["refundNonce"].decode(told[2])
    return ChannelView(balance, claimed, withdrawing, since, nonce, time_s)


def event_of(raw: dict[str, Any], time_s: int) -> ChannelEvent:
    """Return an event out of a log of the contract."""
    topics = [bytes.fromhex(topic[2:]) for topic in raw["topics"]]
    event = channels_abi().events[topics[0]]
    fields = event.decode(topics, bytes.fromhex(raw["data"][2:]))
    return ChannelEvent(
        kind=KINDS[event.name],
        channel_id=topics[1],
        block=int(raw["blockNumber"], 16),
        log_index=int(raw["logIndex"], 16),
        time_s=time_s,
        tx_hash=raw["transactionHash"],
        units=next((fields[name] for name in _UNITS if name in fields), 0),
        total_units=next((fields[name] for name in _TOTALS if name in fields), 0),
    )
