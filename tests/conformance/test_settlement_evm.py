"""The escrow contract on the embedded chain passes the suite of all settlements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import FundingKind, MemoryTxStore, Settlement
from tests.conformance.settlement_suite import SettlementSuite
from tests.conformance.settlement_world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.types import AgentId

START_S = 1_800_000_000
POLL_S = 0.002
COIN = 10**18


class EvmWorld(World):
    """The embedded chain in this process, its blocks and its clock in the test's hands."""

    can_reorg = True
    can_block = False

    def __init__(self) -> None:
        self.node = DevNode(manual_time_s=START_S, seed=b"conformance")
        assert self.node.manual is not None
        self.clock = self.node.manual
        self.clock.automatic = False
        self.store = MemoryTxStore()
        self.opened: list[Settlement] = []

    async def start(self) -> None:
        await self.node.serve()
        self.settlement = await self.another()

    async def mint(self, owner: AgentId, units: int) -> None:
        self.node.give(bytes.fromhex(owner[2:]), units, COIN)
        await self.seal()

    async def set_time(self, time_s: int) -> None:
        self.clock.time_s = time_s

    async def seal(self) -> None:
        if self.node.engine.head.time_s >= self.clock.time_s:
            self.clock.time_s = self.node.engine.head.time_s + 1
        self.node.engine.seal()

    async def pending(self) -> int:
        return len(self.node.engine.pool)

    async def another(
        self, *, confirmations: int = 0, funding: FundingKind = FundingKind.AUTHORIZATION
    ) -> Settlement:
        settlement = await EvmSettlement.connect(
            self.node.url,
            escrow=self.node.escrow,
            store=self.store,
            confirmations=confirmations,
            funding=funding,
            poll_s=POLL_S,
        )
        self.opened.append(settlement)
        return settlement

    async def reorg(self, depth: int, *, drop: bool) -> None:
        raws = self.node.engine.rewind(depth)
        for raw in raws:
            if not drop:
                self.node.engine.submit(raw)

    async def close(self) -> None:
        for settlement in self.opened:
            await settlement.close()
        await self.node.close()


class TestEvmSettlement(SettlementSuite):
    """Every promise of the port, kept by the contract."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        world = EvmWorld()
        await world.start()
        yield world
        await world.close()
