"""A stock x402 client and facilitator on the embedded chain, and ours beside them.

Nothing of theirs is told where anything is: they have the addresses built in.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
from eth_account import Account
from eth_utils.address import to_checksum_address
from x402.mechanisms.evm import FacilitatorWeb3Signer
from x402.mechanisms.evm.batch_settlement import abi as their_abi
from x402.mechanisms.evm.batch_settlement import constants
from x402.mechanisms.evm.batch_settlement import types as theirs
from x402.mechanisms.evm.batch_settlement.authorizer_signer import LocalAuthorizerSigner
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme
from x402.mechanisms.evm.batch_settlement.facilitator import BatchSettlementEvmFacilitator
from x402.mechanisms.evm.constants import MULTICALL3_ADDRESS, PERMIT2_ADDRESS
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.schemas import PaymentPayload, PaymentRequirements

from coase.escrow.accounts import BuyerChannel, BuyerLimits, SellerChannel, SellerPolicy
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.abi import Abi, token_abi
from coase.escrow.backends.evm.artifacts import artifact
from coase.escrow.backends.evm.chain import Request
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.evm.fixed import (
    AUTHORIZATION_COLLECTOR,
    MULTICALL3,
    PERMIT2,
    PERMIT2_COLLECTOR,
)
from coase.escrow.ports import MemoryTxStore
from coase.escrow.voucher import (
    CHANNELS,
    ChannelConfig,
    Claim,
    ClaimAll,
    GiveBack,
    PayOut,
    Voucher,
    voucher_digest,
)
from coase.protocol.identity import Identity, keccak256

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHAIN: Final = 31337
BUYER, SELLER, RELAY = (Identity(keccak256(b"x402" + name)) for name in (b"b", b"s", b"r"))
START_UNITS: Final = 10_000
COIN_WEI: Final = 10**18


@dataclass(slots=True)
class World:
    """A chain, our view of its channels, and their client and facilitator."""

    channels: EvmChannels
    client: Any
    facilitator: Any

    def requirements(self, **extra: object) -> Any:
        """What a server would ask for: 100 units a call."""
        return PaymentRequirements(
            scheme="batch-settlement",
            network=f"eip155:{CHAIN}",
            amount="100",
            asset=self.channels.asset.token,
            pay_to=SELLER.address,
            max_timeout_seconds=600,
            extra={
                "receiverAuthorizer": SELLER.address,
                "withdrawDelay": 900,
                "name": "Coase",
                "version": "1",
                **extra,
            },
        )

    async def pay(self, payload: dict[str, Any], requirements: Any) -> Any:
        """Have the facilitator verify and settle, in a thread, since it blocks."""
        payment = PaymentPayload(x402_version=2, accepted=requirements, payload=payload)
        verified = None
        if payload["type"] in ("deposit", "voucher"):
            verified = await asyncio.to_thread(self.facilitator.verify, payment, requirements)
            assert verified.is_valid, verified
        if payload["type"] == "voucher":
            return verified
        settled = await asyncio.to_thread(self.facilitator.settle, payment, requirements)
        assert settled.success, settled
        return settled

    async def units(self, who: Identity) -> int:
        """What somebody holds."""
        return await self.channels.balance(who.address)


def ours(config: dict[str, Any]) -> ChannelConfig:
    """Our form of their channel."""
    return ChannelConfig(
        payer=config["payer"].lower(),
        payer_authorizer=config["payerAuthorizer"].lower(),
        receiver=config["receiver"].lower(),
        receiver_authorizer=config["receiverAuthorizer"].lower(),
        token=config["token"].lower(),
        withdraw_delay_s=config["withdrawDelay"],
        salt=bytes.fromhex(config["salt"][2:]),
    )


def voucher_of(payload: dict[str, Any]) -> Voucher:
    """Our form of their voucher."""
    told = payload["voucher"]
    return Voucher(
        bytes.fromhex(told["channelId"][2:]),
        int(told["maxClaimableAmount"]),
        bytes.fromhex(told["signature"].removeprefix("0x")),
    )


@pytest.fixture
async def world() -> AsyncIterator[World]:
    node = DevNode(manual_time_s=int(time.time()) - 60, seed=b"x402")  # They look at a real clock.
    await node.serve()
    for who, units in ((BUYER, START_UNITS), (SELLER, 0), (RELAY, 0)):
        node.give(bytes.fromhex(who.address[2:]), units, COIN_WEI)
    node.engine.seal()
    channels = await EvmChannels.connect(
        node.url, token=node.token, store=MemoryTxStore(), poll_s=0.01
    )
    keys = [Account.from_key(who.secret_for_keystore()) for who in (BUYER, SELLER)]
    signer = FacilitatorWeb3Signer("0x" + RELAY.secret_for_keystore().hex(), node.url)
    yield World(
        channels,
        BatchSettlementEvmScheme(EthAccountSigner(keys[0])),
        BatchSettlementEvmFacilitator(signer, LocalAuthorizerSigner(keys[1])),
    )
    await channels.close()
    await node.close()


def test_our_addresses_are_theirs() -> None:
    pairs = {
        CHANNELS: constants.BATCH_SETTLEMENT_ADDRESS,
        AUTHORIZATION_COLLECTOR: constants.ERC3009_DEPOSIT_COLLECTOR_ADDRESS,
        PERMIT2_COLLECTOR: constants.PERMIT2_DEPOSIT_COLLECTOR_ADDRESS,
        PERMIT2: PERMIT2_ADDRESS,
        MULTICALL3: MULTICALL3_ADDRESS,
    }
    assert {to_checksum_address(mine): their for mine, their in pairs.items()} == {
        their: their for their in pairs.values()
    }


def test_our_contract_has_all_that_their_abi_names() -> None:
    mine, their = Abi(artifact("PaymentChannels").abi), Abi(their_abi.BATCH_SETTLEMENT_ABI)
    assert len(their.functions) > 30  # Each by its name and by its signature.
    for name, function in their.functions.items():
        assert mine.functions[name] == function
    for topic, event in their.events.items():
        assert mine.events[topic] == event


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["eip3009", "permit2"])
async def test_a_stock_client_pays_through_the_channel(world: World, method: str) -> None:
    asked = world.requirements(assetTransferMethod=method)
    if method == "permit2":
        data = token_abi().encode("approve", PERMIT2, START_UNITS)
        request = Request(world.channels.asset.token, data, 100_000)
        await world.channels.chain.send("approve", BUYER, request, token_abi())

    payload = world.client.create_payment_payload(asked)
    assert payload["type"] == "deposit"
    deposit = await world.pay(payload, asked)
    config, voucher = ours(payload["channelConfig"]), voucher_of(payload)
    channel_id = config.channel_id(world.channels.domain)
    assert voucher.channel_id == channel_id
    view = (await world.channels.views([channel_id]))[channel_id]
    assert view.balance_units == int(deposit.amount) == 500
    assert await world.units(BUYER) == START_UNITS - 500

    # Our seller takes the stock client's voucher by all its rules, and ours are good for them.
    policy = SellerPolicy(
        tokens=frozenset((world.channels.asset.token,)),
        chunk_max_units=100,
        exposure_max_units=100,
        withdraw_delay_min_s=900,
    )
    now_s = (await world.channels.head()).time_s
    seller = SellerChannel.accept(config, world.channels.domain, policy, seller=SELLER.address).see(
        view
    )
    seller, _ = seller.take(voucher, deal_id="call 1", units=100, now_s=now_s)

    row = claim_of(payload, units=100)
    await world.pay(theirs.ClaimPayload(claims=[row]).to_dict(), asked)
    paid = theirs.SettlePayload(receiver=SELLER.address, token=world.channels.asset.token)
    await world.pay(paid.to_dict(), asked)
    assert await world.units(SELLER) == 100


def claim_of(payload: dict[str, Any], *, units: int) -> Any:
    """A row of a claim in their form."""
    return theirs.VoucherClaim(
        channel=theirs.ChannelConfig.from_dict(payload["channelConfig"]),
        max_claimable_amount=payload["voucher"]["maxClaimableAmount"],
        signature=payload["voucher"]["signature"],
        total_claimed=str(units),
    )


@pytest.mark.anyio
async def test_our_buyer_pays_a_stock_server_and_gets_the_rest_back(world: World) -> None:
    asked = world.requirements()
    payload = world.client.create_payment_payload(asked)
    await world.pay(payload, asked)
    config = ours(payload["channelConfig"])
    channel_id = config.channel_id(world.channels.domain)
    view = (await world.channels.views([channel_id]))[channel_id]
    limits = BuyerLimits(deposit_max_units=500, chunk_max_units=100, exposure_max_units=100)
    buyer, _ = BuyerChannel.after_loss(config, world.channels.domain, limits, view)
    buyer, _ = buyer.recover(voucher_of(payload))  # The stock client has signed one already.
    buyer, _ = buyer.promise(deal_id="call 2", units=100)
    voucher = buyer.sign(BUYER)
    assert voucher.signature == BUYER.sign(voucher_digest(world.channels.domain, channel_id, 200))
    told = {
        "type": "voucher",
        "channelConfig": payload["channelConfig"],
        "voucher": {
            "channelId": "0x" + channel_id.hex(),
            "maxClaimableAmount": "200",
            "signature": "0x" + voucher.signature.hex(),
        },
    }
    verified = await world.pay(told, asked)
    assert verified.extra["balance"] == "500"

    # Our seller claims, and their facilitator brings the rest home by the seller's signature.
    await world.channels.perform("claim", ClaimAll((Claim(config, voucher, 200),)), SELLER)
    back = {**told, "type": "refund", "amount": "250", "refundNonce": "0", "claims": []}
    settled = await world.pay(back, asked)
    assert settled.amount == "250"
    await world.channels.perform("rest", GiveBack(config, 1000), SELLER)
    await world.channels.perform("pay", PayOut(SELLER.address), RELAY)
    assert (await world.units(BUYER), await world.units(SELLER)) == (START_UNITS - 200, 200)
    assert await world.channels.held() == 0
