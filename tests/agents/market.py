"""A whole market in one event loop: memory network, memory chain, a real journal on disk."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.beside import Beside
from coase.agents.config import NatsAddress, Network
from coase.agents.node import Node, running
from coase.agents.seller import Windows
from coase.escrow.backends.memory import MemoryChain, MemorySettlement, seal_for_ever
from coase.escrow.backends.memory_channels import MemoryChannels, MemoryLedger
from coase.protocol.backends.memory import MemoryNetwork
from coase.protocol.identity import Identity
from coase.protocol.session import Margins
from coase.protocol.types import Asset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.agent import Agent
    from coase.agents.arbiter import Arbiter

ASSET: Final = Asset(31337, "0x" + "33" * 20)
ESCROW: Final = "0x" + "44" * 20
FUNDS: Final = 10_000_000
BLOCK_S: Final = 0.1
REST_MAX_S: Final = 30.0
SHORT: Final = Windows(lock_s=3, dispute_s=3, answer_s=3, rule_s=6)
MARGINS: Final = Margins(chain_s=1, settle_patience_ms=600, halt_s=0)


class Market:
    """One node on a market of its own, and what it takes to look at the money."""

    def __init__(self, node: Node, chain: MemoryChain, arbiter: Arbiter) -> None:
        self.node, self.chain, self.arbiter = node, chain, arbiter

    async def join(self, *agents: Agent, units: int = FUNDS) -> None:
        """Give agents their places and money."""
        for agent in agents:
            await self.node.add(agent)
            if units:
                self.chain.mint(agent.address, units)
            if isinstance(self.node.channels, MemoryChannels):
                self.node.channels.ledger.mint(agent.address, FUNDS)

    async def rest(self) -> None:
        """Return when no deal is open."""
        deadline = anyio.current_time() + REST_MAX_S
        while open_ := self._open():
            assert anyio.current_time() < deadline, f"still open: {open_}"
            await anyio.sleep(0.05)

    def _open(self) -> list[str]:
        found = []
        for agent in self.node.agents:
            if agent.seat is None:
                continue
            desk = agent.seat.desk
            for deal in desk.bound():
                thread = desk.threads[deal]
                found.append(
                    f"{agent.name}: {thread.state} {thread.view} at {desk.head}, {desk.counts},"
                    f" {desk.dead[-3:]}, {[entry.move for entry in thread.history]}"
                )
        return found

    def earned(self, agent: Agent) -> int:
        """Return what an agent has more than it was given."""
        return self.chain.balance(agent.address) - FUNDS


@asynccontextmanager
async def market(
    folder: Path,
    *,
    asset: Asset = ASSET,
    faucet: bool = True,
    margins: Margins | None = MARGINS,
    channels: bool = False,
) -> AsyncIterator[Market]:
    """Yield a running market with an arbiter; checks at the end that no unit came or went.

    Without ``margins`` they are those that the chain of ``asset`` asks for. With ``channels`` there
    are some, on a ledger of their own.
    """

    def clock_s() -> int:
        return int(time.time())

    chain = MemoryChain(asset, escrow=ESCROW, time_s=clock_s())
    seed = Identity(b"\x01" * 32)
    arbiter_key = seed.derive("arbiter")
    network = Network(
        net="test",
        nats=NatsAddress(url="memory"),
        rpc="memory",
        chain_id=asset.chain_id,
        token=asset.token,
        factory="0x" + "55" * 20,
        escrow=ESCROW,
        arbiters=(arbiter_key.address,),
        faucet=faucet,
    )
    journal = SqliteJournal(folder / "journal.sqlite")
    settlement = MemorySettlement(chain, clock_s)
    transport = MemoryNetwork(net="test").transport()
    ledger = MemoryLedger(asset, time_s=clock_s())
    beside = Beside(channels=MemoryChannels(ledger)) if channels else None
    node = Node(network, transport, settlement, journal, seed=seed, margins=margins, beside=beside)
    async with anyio.create_task_group() as group:

        async def seal() -> None:
            await seal_for_ever(chain, clock_s, interval_s=BLOCK_S)

        async def pass_time() -> None:
            while True:
                ledger.time_s = clock_s()
                await anyio.sleep(BLOCK_S)

        group.start_soon(seal)
        group.start_soon(pass_time)
        try:
            async with running(node):
                yield Market(node, chain, await node.add_arbiter(arbiter_key))
        finally:
            group.cancel_scope.cancel()
            await settlement.close()
            await transport.close()
            with anyio.CancelScope(shield=True):
                await journal.close()
    assert chain.total() == chain.minted_units
