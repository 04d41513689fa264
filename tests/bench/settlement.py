"""What settling costs: vouchers beside bare signatures, gas beside the standard's, many channels.

The chain is the embedded one in this process: the EVM's work, the client's and the JSON between
them are all in the figure, and so they are in that of the plain transfers beside it. Seconds are
those of the processor.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import coincurve

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.abi import token_abi
from coase.escrow.backends.evm.chain import Request
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.claims import Claimable, ClaimPolicy, GasPrice, plan_claims
from coase.escrow.ports import MemoryTxStore
from coase.escrow.voucher import (
    ChannelConfig,
    ChannelView,
    Claim,
    ClaimAll,
    Fund,
    PayOut,
    Voucher,
    channels_domain,
    voucher_digest,
)
from coase.protocol.identity import Identity
from tests.bench.parts import emit

if TYPE_CHECKING:
    from collections.abc import Callable

SNAPSHOT: Final = Path(__file__).parents[2] / "escrow" / "contracts" / "gas-snapshot.json"
CHAIN_ID: Final = 31337
START_S: Final = 1_800_000_000
CALLS: Final = (10, 100, 1_000)
CHANNELS_OPEN: Final = 1_000
TRANSFERS: Final = 100
BUYER: Final = Identity(b"\x05" * 32)
SELLER: Final = Identity(b"\x06" * 32)
UNITS: Final = 100
ROUNDS: Final = 5  # The best of them: what else runs on the machine only ever adds.


def rate(work: Callable[[int], object], count: int) -> float:
    """Return how often ``work`` is done in a second of CPU time."""
    best = 0.0
    for _ in range(ROUNDS):
        started = time.process_time_ns()
        for number in range(count):
            work(number)
        best = max(best, count * 1e9 / (time.process_time_ns() - started))
    return best


def vouchers(count: int) -> None:
    """Measure signing and verifying, beside libsecp256k1 alone on hashes that are there already."""
    domain, channel_id = channels_domain(CHAIN_ID), b"\x07" * 32
    key = coincurve.PrivateKey(b"\x05" * 32)
    hashes = [voucher_digest(domain, channel_id, number) for number in range(count)]
    bare = [key.sign_recoverable(one, hasher=None) for one in hashes]
    signed = [Voucher(channel_id, n, BUYER.sign(one)) for n, one in enumerate(hashes)]

    def sign(number: int) -> Voucher:
        digest = voucher_digest(domain, channel_id, number)
        return Voucher(channel_id, number, BUYER.sign(digest))

    def verify(number: int) -> None:
        if signed[number].signer(domain) != BUYER.address:
            raise RuntimeError("a voucher of another signer")

    for name, ours, alone in (
        ("signed", sign, lambda n: key.sign_recoverable(hashes[n], hasher=None)),
        (
            "verified",
            verify,
            lambda n: coincurve.PublicKey.from_signature_and_message(
                bare[n], hashes[n], hasher=None
            ),
        ),
    ):
        value, beside = rate(ours, count), rate(alone, count)
        emit(
            f"vouchers_{name}",
            value,
            "1/s",
            bare_coincurve_per_s=beside,
            ratio=value / beside,
            aim_ratio=0.70,
        )


def gas() -> None:
    """Print what a deal and a paid call take, from what the contracts' own tests measured."""
    taken = json.loads(SNAPSHOT.read_text())
    plain = taken["plain.sum"]
    for name, opened in (
        ("deal_by_allowance", "open.allowance"),
        ("deal_by_permit", "open.permit"),
        ("deal_by_authorization", "open.authorization"),
        ("first_deal_by_permit", "open.permit.first"),
    ):
        deal = taken[opened] + taken["settle.working"]
        emit(
            f"gas_{name}",
            deal,
            "gas",
            plain_erc8183=plain,
            ratio=deal / plain,
            aim_ratio=0.5,
        )
    silent = taken["open.allowance"] + taken["submit"] + taken["poke.silentBuyer"]
    emit("gas_deal_when_the_buyer_is_silent", silent, "gas", plain_erc8183=plain)
    # One deposit, claim and payment for all calls; a buyer who ends pays for the refund too.
    used = taken["channel.deposit"] + taken["channel.claimAndSettle"]
    for calls in CALLS:
        aim = {"aim": 200} if calls == CALLS[-1] else {}
        refunded = (used + taken["channel.refund"]) / calls
        emit(f"gas_per_channel_call_{calls}", used / calls, "gas", **aim, with_refund=refunded)


class Till:
    """A seller with many channels open, on a chain of its own."""

    def __init__(self, channels: EvmChannels, node: DevNode) -> None:
        self.channels, self.node = channels, node

    def _config(self, number: int) -> ChannelConfig:
        buyer, seller = BUYER.address, SELLER.address
        salt = number.to_bytes(32, "big")
        return ChannelConfig(buyer, buyer, seller, seller, self.channels.asset.token, 900, salt)

    async def open(self, count: int) -> list[ChannelConfig]:
        """Open that many channels."""
        configs = [self._config(number) for number in range(count)]
        for config in configs:
            call = Fund(config, UNITS, bytes(32), START_S + 10_000)
            await self.channels.perform(f"fund {config.salt.hex()}", call, BUYER)
        return configs

    async def settle(self, configs: list[ChannelConfig], name: str, units: int) -> int:
        """Claim a voucher of each channel and have all paid out; return the transactions."""
        domain = self.channels.domain
        views = await self.channels.views([one.channel_id(domain) for one in configs])
        ready = [self._claimable(config, views, units) for config in configs]
        policy = ClaimPolicy()
        batches = plan_claims(ready, price=GasPrice(0, 0), policy=policy, now_s=START_S)
        for number, batch in enumerate(batches):
            await self.channels.perform(f"{name} {number}", ClaimAll(batch.rows), SELLER)
        await self.channels.perform(f"{name} paid", PayOut(SELLER.address), SELLER)
        return len(batches) + 1

    def _claimable(
        self, config: ChannelConfig, views: dict[bytes, ChannelView], units: int
    ) -> Claimable:
        channel_id = config.channel_id(self.channels.domain)
        digest = voucher_digest(self.channels.domain, channel_id, units)
        voucher = Voucher(channel_id, units, BUYER.sign(digest))
        return Claimable(Claim(config, voucher, units), views[channel_id], START_S)

    async def transfers(self, count: int) -> float:
        """Return plain transfers of the token in a second, each a transaction."""
        started = time.process_time()
        data = token_abi().encode("transfer", SELLER.address, 1)
        request = Request(self.node.token, data, 100_000)
        for number in range(count):
            await self.channels.chain.send(f"transfer {number}", BUYER, request, token_abi())
        return count / (time.process_time() - started)


async def many_channels(count: int) -> None:
    """Measure how many channels a seller settles in a second with all of them open."""
    node = DevNode(manual_time_s=START_S, seed=b"bench")
    await node.serve()
    try:
        for who in (BUYER, SELLER):
            node.give(bytes.fromhex(who.address[2:]), 1_000_000, 10**19)
        node.engine.seal()
        channels = await EvmChannels.connect(
            node.url, token=node.token, store=MemoryTxStore(), poll_s=0.001
        )
        try:
            till = Till(channels, node)
            configs = await till.open(count)
            await till.settle(configs, "first", UNITS // 2)  # What a channel's first claim costs.
            started = time.process_time()
            sent = await till.settle(configs, "next", UNITS)
            value = count / (time.process_time() - started)
            beside = await till.transfers(TRANSFERS)
            emit(
                "channels_settled",
                value,
                "1/s",
                channels_open=count,
                transactions=sent,
                plain_transfers_per_s=beside,
                ratio=value / beside,
            )
        finally:
            await channels.close()
    finally:
        await node.close()


def settlement(count: int, *, quick: bool = False) -> None:
    """Measure everything of this page."""
    vouchers(count)
    gas()
    asyncio.run(many_channels(CHANNELS_OPEN // 10 if quick else CHANNELS_OPEN))
