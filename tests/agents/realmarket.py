"""A market whose money is real: the embedded chain in this process, nodes with journals on disk."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.agents import Agent, Job, Price
from coase.agents.backends.sqlite import SqliteJournal, StateDirectory
from coase.agents.beside import BESIDE, open_beside
from coase.agents.config import NatsAddress, Network, save_network
from coase.agents.node import Node, running
from coase.agents.seller import Windows
from coase.agents.wares import Summarise, Summary
from coase.agents.wiring import open_settlement
from coase.agents.withdrawal import serve_owner
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.keystore import open_keyring
from coase.protocol.backends.memory import MemoryNetwork
from coase.protocol.errors import DealFailed
from coase.protocol.identity import Identity, keccak256
from tests.agents.market import MARGINS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ARBITER: Final = Identity(keccak256(b"arbiter of the tests"))
FUNDS: Final = 10_000_000
COIN: Final = 10**18
BLOCK_S: Final = 0.1
LONG: Final = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
"""Nobody's silence is waited for here, and a slow machine must not make any."""
REST_MAX_S: Final = 90.0


class RealMarket:
    """The chain, the network, and whoever runs on them."""

    def __init__(self, home: Path, dev: DevNode) -> None:
        self.home, self.dev = home, dev
        self.transport = MemoryNetwork(net="test")
        self.network = Network(
            net="test",
            nats=NatsAddress(url="nats://127.0.0.1:1"),
            rpc=dev.url,
            chain_id=dev.engine.chain_id,
            token=dev.token,
            factory=dev.factory,
            escrow=dev.escrow,
            **{name: getattr(dev, name) for name in BESIDE},
            arbiters=(ARBITER.address,),
            faucet=True,
        )
        save_network(self.network, home / "network.json")

    def place(self, name: str) -> Path:
        """Return the directory of a node."""
        return self.home / "nodes" / f"test-{self.dev.escrow[2:10]}" / name

    @asynccontextmanager
    async def node(self, name: str = "swarm") -> AsyncIterator[Node]:
        """Run a node on its directory, as often as wanted one after the other."""
        directory = StateDirectory(self.place(name))
        try:
            journal = SqliteJournal(directory.path / "journal.sqlite")
            transport = self.transport.transport()
            settlement = await open_settlement(self.network, journal)
            seed = open_keyring(directory.path)
            node = Node(
                self.network,
                transport,
                settlement,
                journal,
                seed=seed,
                margins=MARGINS,
                directory=directory.path,
                beside=await open_beside(self.network, settlement),
            )
            try:
                async with running(node):
                    await node.add_arbiter(ARBITER)
                    serve_owner(node, journal, directory.path)
                    yield node
            finally:
                with anyio.CancelScope(shield=True):
                    await settlement.close()
                    await transport.close()
                    await journal.close()
        finally:
            directory.release()

    async def fund(self, *addresses: str, units: int = FUNDS, wei: int = COIN) -> None:
        """Give money to keys that have none."""
        for address in addresses:
            self.dev.give(bytes.fromhex(address[2:]), units, wei)
            self.seal()

    async def join(self, node: Node, *agents: Agent) -> None:
        """Give agents their places, and money if they have none."""
        for agent in agents:
            await node.add(agent)
            if not await node.settlement.balance(agent.address):
                await self.fund(agent.address)
        if not await node.settlement.balance(ARBITER.address):
            await self.fund(ARBITER.address, units=0)

    async def rest(self, node: Node) -> None:
        """Return when no deal of a node is open."""
        with anyio.fail_after(REST_MAX_S):
            await node.at_rest()

    def seal(self) -> None:
        """Make a block now."""
        assert self.dev.manual is not None
        self.dev.manual.time_s = max(int(time.time()), self.dev.engine.head.time_s)
        self.dev.engine.seal()


@asynccontextmanager
async def real_market(home: Path) -> AsyncIterator[RealMarket]:
    """Yield a chain with the contracts, whose clock is the wall's and whose blocks are quick."""
    dev = DevNode(manual_time_s=int(time.time()), seed=b"money")
    await dev.serve()
    market = RealMarket(home, dev)

    async def seal_for_ever() -> None:
        while True:
            await anyio.sleep(BLOCK_S)
            market.seal()

    async with AsyncExitStack() as stack:
        stack.push_async_callback(dev.close)
        group = await stack.enter_async_context(anyio.create_task_group())
        group.start_soon(seal_for_ever)
        try:
            yield market
        finally:
            group.cancel_scope.cancel()


def scribe(name: str, *, price: str = "0.02", gate: anyio.Event | None = None) -> Agent:
    """Return a seller of summaries; it lies about a text that asks for it, and fails on another."""
    agent = Agent(name, by_rounds=True)

    @agent.offers("summarise", price=Price.per_task(price), deliver_within=100, windows=LONG)
    async def summarise(task: Summarise, job: Job) -> Summary:
        if gate is not None:
            await gate.wait()
        if "fail" in task.text:
            raise ValueError("no ideas today")
        if "lie" in task.text:
            return Summary.model_construct(summary="")
        return Summary(summary=task.text[:10])

    return agent


async def buy(buyer: Agent, text: str, **wish: Any) -> int:
    """Buy a summary and return what was paid; 0 if the deal failed."""
    order: dict[str, Any] = {
        "returns": Summary,
        "max_price": "0.05",
        "decide_after_ms": 100,
        "deliver_within": 100,
    }
    try:
        bought = await buyer.purchase("summarise", Summarise(text=text), **order | wish)
    except DealFailed:
        return 0
    return bought.paid_units
