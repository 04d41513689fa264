"""The other process of a benchmark: ``responder.py bare|seller NETWORK_JSON``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # Run as a script from anywhere.

from typing import TYPE_CHECKING

import anyio

from coase.agents import Agent, Job
from coase.agents.admission import Admission
from coase.agents.config import Network
from coase.agents.seller import Windows
from coase.agents.wares import Summarise, Summary
from coase.negotiation.pricing import Price
from coase.protocol.identity import Identity
from tests.bench.bare import bare_reply, raw_client
from tests.bench.parts import LOCK_S, bench_node

if TYPE_CHECKING:
    from nats.aio.msg import Msg

SELLER_SECRET = 7


async def bare(network: Network) -> None:
    """Verify each signed ping and answer it with a signed pong."""
    identity = Identity(SELLER_SECRET.to_bytes(32, "big"))
    client = await raw_client(network)

    async def on_message(message: Msg) -> None:
        await client.publish(message.reply, bare_reply(identity, message.data))

    await client.subscribe("bench.bare", cb=on_message)
    await client.flush()
    print("ready")
    await anyio.sleep_forever()


async def seller(network: Network) -> None:
    """Sell to whoever asks, without limit."""
    agent = Agent("bench-seller", by_rounds=True)

    @agent.offers(
        "summarise",
        price=Price.per_task("0.02", floor_permille=500),
        strategy="linear",
        capacity=1_000_000,
        deliver_within=60,
        windows=Windows(lock_s=LOCK_S),
    )
    async def work(task: Summarise, job: Job) -> Summary:
        return Summary(summary=task.text)

    async with bench_node(network, agent, SELLER_SECRET):
        if agent.seat is not None:
            # One buyer plays the whole market here, and would be slowed down as a flood.
            agent.seat.desk.admission = Admission(
                per_s=10**6, burst=10**6, address_per_s=10**6, address_burst=10**6
            )
        print("ready")
        await anyio.sleep_forever()


if __name__ == "__main__":
    which = {"bare": bare, "seller": seller}[sys.argv[1]]
    anyio.run(which, Network.model_validate_json(sys.argv[2]))
