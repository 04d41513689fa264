"""The chain in memory passes the suite of all settlements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.escrow.backends.memory import MemoryChain, MemorySettlement
from coase.escrow.ports import FundingKind, Settlement
from coase.protocol.types import AgentId, Asset
from tests.conformance.settlement_suite import SettlementSuite
from tests.conformance.settlement_world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ASSET = Asset(31337, "0x" + "70" * 20)
ESCROW = "0x" + "e5" * 20
START_S = 1_800_000_000


class MemoryWorld(World):
    """A chain in memory in the test's hands."""

    can_reorg = True
    can_block = True

    def __init__(
        self,
        *,
        start_s: int = START_S,
        asset: Asset = ASSET,
        escrow: str = ESCROW,
        kind: type[MemoryChain] = MemoryChain,
    ) -> None:
        self.chain = kind(asset, escrow=escrow, time_s=start_s)
        self.time_s = start_s
        self.opened: list[Settlement] = []
        self.settlement = MemorySettlement(self.chain, lambda: self.time_s)

    async def mint(self, owner: AgentId, units: int) -> None:
        self.chain.mint(owner, units)

    async def set_time(self, time_s: int) -> None:
        self.time_s = time_s

    async def seal(self) -> None:
        if self.chain.head().time_s >= self.time_s:
            self.time_s = self.chain.head().time_s + 1
        self.chain.seal(self.time_s)
        self.chain.check()

    async def pending(self) -> int:
        return self.chain.pending()

    async def another(
        self, *, confirmations: int = 0, funding: FundingKind = FundingKind.AUTHORIZATION
    ) -> Settlement:
        settlement = MemorySettlement(
            self.chain, lambda: self.time_s, confirmations=confirmations, funding=funding
        )
        self.opened.append(settlement)
        return settlement

    async def reorg(self, depth: int, *, drop: bool) -> None:
        self.chain.reorg(depth, drop=lambda _: drop)
        self.chain.check()

    async def block(self, owner: AgentId, *, blocked: bool) -> None:
        if blocked:
            self.chain.faults.blacklist.add(owner)
        else:
            self.chain.faults.blacklist.discard(owner)

    async def close(self) -> None:
        """Close every settlement on it."""
        for settlement in (*self.opened, self.settlement):
            await settlement.close()


class TestMemorySettlement(SettlementSuite):
    """Every promise of the port, kept in memory."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        world = MemoryWorld()
        yield world
        await world.close()
