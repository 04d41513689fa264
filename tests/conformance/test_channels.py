"""Channels in memory and x402's contract on the embedded chain pass one suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.memory_channels import MemoryChannels, MemoryLedger
from coase.escrow.ports import MemoryTxStore
from coase.protocol.types import Asset
from tests.conformance.channels_suite import (
    BUYER,
    SELLER,
    START_UNITS,
    THIEF,
    ChannelsSuite,
    ChannelsWorld,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S: Final = 1_800_000_000
POLL_S: Final = 0.002
COIN_WEI: Final = 10**18


class MemoryWorld(ChannelsWorld):
    """A ledger in memory."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(Asset(31337, "0x" + "70" * 20), time_s=START_S)
        self.channels = MemoryChannels(self.ledger)
        for who in (BUYER, SELLER, THIEF):
            self.ledger.mint(who.address, START_UNITS)

    async def pass_time(self, seconds: int) -> None:
        self.ledger.time_s += seconds

    async def close(self) -> None:
        await self.channels.close()


class EvmWorld(ChannelsWorld):
    """The embedded chain in this process; each call is sealed as it comes."""

    def __init__(self) -> None:
        self.node = DevNode(manual_time_s=START_S, seed=b"channels")

    async def start(self) -> None:
        await self.node.serve()
        for who in (BUYER, SELLER, THIEF):
            self.node.give(bytes.fromhex(who.address[2:]), START_UNITS, COIN_WEI)
        self.node.engine.seal()
        self.channels = await EvmChannels.connect(
            self.node.url, token=self.node.token, store=MemoryTxStore(), poll_s=POLL_S
        )

    async def pass_time(self, seconds: int) -> None:
        assert self.node.manual is not None
        self.node.manual.time_s = self.node.engine.head.time_s + seconds
        self.node.engine.seal()

    async def close(self) -> None:
        await self.channels.close()
        await self.node.close()


class TestMemoryChannels(ChannelsSuite):
    """The memory twin."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[ChannelsWorld]:
        world = MemoryWorld()
        yield world
        await world.close()


class TestEvmChannels(ChannelsSuite):
    """The contract."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[ChannelsWorld]:
        world = EvmWorld()
        await world.start()
        yield world
        await world.close()
