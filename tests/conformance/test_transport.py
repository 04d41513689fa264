"""Both transports keep the same promises; the one in memory also keeps its own, of bad luck."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.backends.memory import MemoryNetwork, MemoryTransport, Trouble
from coase.protocol.backends.nats import NatsTransport
from coase.protocol.errors import ConfigurationError
from tests.conformance.transport_suite import (
    ALICE,
    BOB,
    CAROL,
    Mailbox,
    OpenTransport,
    TransportSuite,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.ports import Transport


class TestMemoryTransport(TransportSuite):
    @pytest.fixture
    def open_transport(self) -> OpenTransport:
        network = MemoryNetwork()

        async def open_one() -> Transport:
            return network.transport()

        return open_one


class TestNatsTransport(TransportSuite):
    @pytest.fixture
    async def open_transport(self) -> AsyncIterator[OpenTransport]:
        broker = EmbeddedBroker()
        await broker.start()
        opened: list[Transport] = []

        async def open_one() -> Transport:
            opened.append(await NatsTransport.connect(broker.client_config()))
            return opened[-1]

        yield open_one
        for transport in opened:
            await transport.close()
        await broker.stop()


SENT = [number.to_bytes(2, "big") for number in range(400)]


async def _suffer(trouble: Trouble, *, seed: int = 7) -> list[bytes]:
    network = MemoryNetwork(rng=random.Random(seed), trouble=trouble)
    sender, receiver = network.transport(), network.transport()
    inbox = Mailbox()
    await receiver.listen(BOB, inbox)
    for envelope in SENT:
        await sender.send(BOB, envelope)
        await _turns(1)
    await _turns(20)
    return inbox.all


async def _turns(count: int) -> None:

    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.anyio
async def test_loss_takes_some_and_doubles_or_reorders_none() -> None:
    arrived = await _suffer(Trouble(lost_per_mille=250))
    assert 200 < len(arrived) < 400
    assert arrived == sorted(set(arrived))


@pytest.mark.anyio
async def test_doubling_loses_none() -> None:
    arrived = await _suffer(Trouble(doubled_per_mille=250))
    assert 400 < len(arrived) < 600
    assert set(arrived) == set(SENT)


@pytest.mark.anyio
async def test_lateness_reorders_and_loses_none() -> None:
    arrived = await _suffer(Trouble(late_per_mille=250))
    assert arrived != SENT
    assert sorted(arrived) == SENT


@pytest.mark.anyio
async def test_the_same_seed_brings_the_same_trouble() -> None:
    trouble = Trouble(lost_per_mille=100, doubled_per_mille=100, late_per_mille=100)
    assert await _suffer(trouble) == await _suffer(trouble)
    assert await _suffer(trouble) != await _suffer(trouble, seed=8)


@pytest.mark.anyio
async def test_a_partition_keeps_islands_apart_until_it_heals() -> None:
    network = MemoryNetwork()
    inboxes = {agent: Mailbox() for agent in (ALICE, BOB, CAROL)}
    transports: dict[str, MemoryTransport] = {}
    for agent, inbox in inboxes.items():
        transports[agent] = network.transport()
        await transports[agent].listen(agent, inbox)
    network.partition([transports[ALICE], transports[BOB]])
    for agent in inboxes:
        await transports[ALICE].send(agent, b"apart")
    await transports[CAROL].send(CAROL, b"alone")
    await _turns(5)
    assert [inbox.all for inbox in inboxes.values()] == [[b"apart"], [b"apart"], [b"alone"]]
    network.heal()
    await transports[ALICE].send(CAROL, b"together")
    assert await inboxes[CAROL].has(2) == [b"alone", b"together"]


def test_trouble_needs_a_seed_and_shares_of_a_thousand() -> None:
    with pytest.raises(ConfigurationError, match="seed"):
        MemoryNetwork(trouble=Trouble(lost_per_mille=1))
    with pytest.raises(ConfigurationError, match="share"):
        Trouble(lost_per_mille=1001)
