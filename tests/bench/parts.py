"""What the benchmarks are made of: a broker, two processes, a settlement that costs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.config import NatsAddress, Network
from coase.agents.node import Node, running
from coase.escrow.backends.memory import At, MemoryChain, MemorySettlement, seal_for_ever
from coase.protocol.backends.nats import NatsTransport
from coase.protocol.backends.nats_config import NatsConfig
from coase.protocol.identity import Identity
from coase.protocol.types import Asset

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.agents.agent import Agent
    from coase.escrow.ports import Receipt
    from coase.protocol.effects import Call

ASSET: Final = Asset(31337, "0x" + "33" * 20)
ESCROW: Final = "0x" + "44" * 20


def emit(figure: str, value: float, unit: str, **beside: Any) -> None:
    """Print one figure as a line of JSON, with what it is to be compared with."""
    line = {"figure": figure, "value": round(value, 3), "unit": unit}
    line |= {k: round(v, 3) if isinstance(v, float) else v for k, v in beside.items()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def network_of(url: str, user: str, password: str) -> Network:
    """Return a network whose chain is in memory: only the wire and the disk are measured."""
    return Network(
        net="bench",
        nats=NatsAddress(url=url, user=user, password=password),
        rpc="memory",
        chain_id=ASSET.chain_id,
        token=ASSET.token,
        factory="0x" + "55" * 20,
        escrow=ESCROW,
    )


async def connect(network: Network) -> NatsTransport:
    """Return a transport to the bench's broker."""
    nats = network.nats
    config = NatsConfig(urls=(nats.url,), net=network.net, user=nats.user, password=nats.password)
    return await NatsTransport.connect(config)


FUNDS_UNITS: Final = 10**12
LOCK_S: Final = 5
"""What is agreed lapses after this, since nobody locks: the history of a bench has ended deals."""


class Idle(MemorySettlement):
    """A settlement that locks nothing, so that little after ``agreed`` costs anything."""

    async def perform(self, effect_id: str, call: Call | At, identity: Identity) -> Receipt:
        """Wait for ever."""
        await anyio.sleep_forever()
        raise AssertionError("unreachable")


@asynccontextmanager
async def bench_node(network: Network, agent: Agent, secret: int) -> AsyncIterator[Node]:
    """Yield a node with one agent, a real journal and a chain in memory.

    Every deal stays agreed until its lock lapses.
    """
    with tempfile.TemporaryDirectory(prefix="coase-bench-") as folder:
        journal = SqliteJournal(Path(folder) / "journal.sqlite")
        chain = MemoryChain(ASSET, escrow=ESCROW, time_s=int(time.time()))
        settlement = Idle(chain, lambda: int(time.time()))
        transport = await connect(network)
        seed = Identity(secret.to_bytes(32, "big"))
        node = Node(network, transport, settlement, journal, seed=seed)
        try:
            async with running(node), anyio.create_task_group() as group:
                group.start_soon(seal_for_ever, chain, lambda: int(time.time()))
                await node.add(agent)
                chain.mint(agent.address, FUNDS_UNITS)
                if agent.seat is not None:
                    await node.runtime.look_at_means(agent.seat)
                yield node
                group.cancel_scope.cancel()
        finally:
            await transport.close()
            await journal.close()


def spawn(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start ``tests/bench/<module>.py`` as a process of its own, and wait until it is ready."""
    script = Path(__file__).with_name(module + ".py")
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != "ready":
        process.kill()
        raise RuntimeError(f"{module} did not start: {line!r}")
    return process
