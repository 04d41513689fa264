"""Channels on a chain: other funding, depth, crashes, and what an endpoint must have."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.evm.fixed import MULTICALL3, PERMIT2
from coase.escrow.ports import FundingKind, MemoryTxStore
from coase.escrow.voucher import (
    AskWithdrawal,
    ChannelConfig,
    ChannelView,
    Claim,
    ClaimAll,
    Fund,
    PayOut,
    TakeWithdrawal,
    Voucher,
    voucher_digest,
)
from coase.protocol.errors import CallReverted, ConfigurationError, LocalProtocolError
from coase.protocol.identity import Identity, keccak256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S: Final = 1_800_000_000
POLL_S: Final = 0.002
COIN_WEI: Final = 10**18
UNITS: Final = 10_000
BUYER, SELLER = (Identity(keccak256(b"channels" + name)) for name in (b"b", b"s"))


@pytest.fixture
async def node() -> AsyncIterator[DevNode]:
    node = DevNode(manual_time_s=START_S, seed=b"evm channels")
    await node.serve()
    for who in (BUYER, SELLER):
        node.give(bytes.fromhex(who.address[2:]), UNITS, COIN_WEI)
    node.engine.seal()
    yield node
    await node.close()


async def connect(node: DevNode, **options: Any) -> EvmChannels:
    given: dict[str, Any] = {"token": node.token, "store": MemoryTxStore(), "poll_s": POLL_S}
    return await EvmChannels.connect(node.url, **given | options)


@pytest.fixture
async def channels(node: DevNode) -> AsyncIterator[EvmChannels]:
    channels = await connect(node)
    yield channels
    await channels.close()


def config_of(channels: EvmChannels, number: int = 0) -> ChannelConfig:
    buyer, seller = BUYER.address, SELLER.address
    salt = number.to_bytes(32, "big")
    return ChannelConfig(buyer, buyer, seller, seller, channels.asset.token, 900, salt)


def row(channels: EvmChannels, config: ChannelConfig, units: int) -> Claim:
    channel_id = config.channel_id(channels.domain)
    digest = voucher_digest(channels.domain, channel_id, units)
    return Claim(config, Voucher(channel_id, units, BUYER.sign(digest)), units)


def fund(config: ChannelConfig, units: int = 100) -> Fund:
    return Fund(config, units, bytes(32), START_S + 10_000)


async def view(channels: EvmChannels, config: ChannelConfig) -> ChannelView:
    channel_id = config.channel_id(channels.domain)
    return (await channels.views([channel_id]))[channel_id]


@pytest.mark.anyio
async def test_a_token_without_signatures_is_paid_by_permit2(channels: EvmChannels) -> None:
    channels._token = replace(channels._token, kinds=(FundingKind.ALLOWANCE,))
    config = config_of(channels)
    for _ in range(2):
        await channels.perform("fund", fund(config), BUYER)
    assert (await view(channels, config)).balance_units == 100
    # The allowance stands, so the next deposit is one transaction.
    nonce = await channels.chain.endpoint.ask("eth_getTransactionCount", BUYER.address, "latest")
    await channels.perform("more", replace(fund(config), salt=keccak256(b"more")), BUYER)
    after = await channels.chain.endpoint.ask("eth_getTransactionCount", BUYER.address, "latest")
    assert int(after, 16) == int(nonce, 16) + 1
    with pytest.raises(CallReverted) as raised:
        await channels.perform("again", fund(config), BUYER)
    assert raised.value.error == "InvalidNonce"
    assert await channels.balance(PERMIT2) == 0


@pytest.mark.anyio
async def test_a_deposit_is_the_payers_and_of_this_token(channels: EvmChannels) -> None:
    config = config_of(channels)
    with pytest.raises(LocalProtocolError):
        await channels.perform("fund", fund(config), SELLER)
    with pytest.raises(LocalProtocolError):
        await channels.perform("fund", fund(replace(config, token=MULTICALL3)), BUYER)


@pytest.mark.anyio
async def test_what_was_sent_before_a_crash_is_found_again(node: DevNode) -> None:
    store = MemoryTxStore()
    first = await connect(node, store=store)
    config = config_of(first)
    rows = [row(first, config, 30)]
    await first.perform("fund", fund(config), BUYER)
    before = await first.claim("claim", rows, SELLER)
    await first.close()
    again = await connect(node, store=store)
    assert await again.claim("claim", rows, SELLER) == before
    assert await again.perform("fund", fund(config), BUYER) != before.receipts[0]
    assert (await view(again, config)).balance_units == 100
    with pytest.raises(LocalProtocolError):
        await again.perform("fund", fund(config, 101), BUYER)
    await again.close()


@pytest.mark.anyio
async def test_views_and_events_lie_as_deep_as_was_asked(node: DevNode) -> None:
    store = MemoryTxStore()
    newest = await connect(node, store=store)
    deep = await connect(node, store=store, confirmations=2)
    config = config_of(newest)
    receipt = await newest.perform("fund", fund(config), BUYER)
    for left in (2, 1):
        told, past = await deep.events(0)
        assert (told, past) == ([], receipt.block + 1 - left)
        assert (await view(deep, config)).balance_units == 0
        node.engine.seal()
    told, past = await deep.events(past)
    assert [event.kind for event in told] == ["created", "deposited"]
    assert past == receipt.block + 1
    held = await view(deep, config)
    assert (held.balance_units, held.time_s) == (100, receipt.time_s)
    assert (await view(newest, config)).time_s == node.engine.head.time_s
    for channels in (newest, deep):
        await channels.close()


@pytest.mark.anyio
async def test_a_claim_too_late_is_refused_alone(node: DevNode, channels: EvmChannels) -> None:
    """The buyer of one channel of four has taken his money meanwhile."""
    configs = [config_of(channels, number) for number in range(4)]
    for number, config in enumerate(configs):
        await channels.perform(f"fund/{number}", fund(config), BUYER)
    await channels.perform("ask", AskWithdrawal(configs[2], 100), BUYER)
    assert node.manual is not None
    node.manual.time_s = node.engine.head.time_s + 900
    await channels.perform("take", TakeWithdrawal(configs[2]), BUYER)
    rows = [row(channels, config, 50) for config in configs]
    outcome = await channels.claim("all", rows, SELLER)
    assert [refused for refused, _ in outcome.refused] == [rows[2]]
    assert len(outcome.receipts) == 2
    await channels.perform("pay", PayOut(SELLER.address), SELLER)
    assert await channels.balance(SELLER.address) == UNITS + 150


@pytest.mark.anyio
async def test_many_channels_are_claimed_in_one_transaction(channels: EvmChannels) -> None:
    configs = [config_of(channels, number) for number in range(12)]
    for number, config in enumerate(configs):
        await channels.perform(f"fund/{number}", fund(config, 10), BUYER)
    outcome = await channels.claim("all", [row(channels, one, 7) for one in configs], SELLER)
    (receipt,) = outcome.receipts
    assert await channels.unpaid(SELLER.address) == 84
    assert receipt.gas < 12 * 60_000  # A channel's first claim writes where nothing stood.
    told = await channels.views([one.channel_id(channels.domain) for one in configs])
    assert {one.claimed_units for one in told.values()} == {7}
    rows = [row(channels, one, 9) for one in configs]
    later = await channels.perform("later", ClaimAll(tuple(rows)), SELLER)
    assert later.gas < 12 * 30_000


@pytest.mark.anyio
async def test_the_contract_is_looked_for(node: DevNode) -> None:
    for wrong in (PERMIT2, SELLER.address):
        with pytest.raises(ConfigurationError, match="no payment channels"):
            await connect(node, contract=wrong)
    with pytest.raises(ConfigurationError, match="expected"):
        await connect(node, chain_id=1)
    with pytest.raises(ConfigurationError, match="no token"):
        await connect(node, token=PERMIT2)
