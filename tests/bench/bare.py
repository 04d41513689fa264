"""The raw baseline: a pydantic message, signed and verified with coincurve, over NATS."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import nats
from pydantic import BaseModel, ConfigDict

from coase.protocol.identity import Identity, keccak256, require_signer

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from coase.agents.config import Network

PAYLOAD = "x" * 512  # About what a request weighs.


class Ping(BaseModel):
    """A message with nothing to say."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    sender: str
    number: int
    payload: str


def signed(identity: Identity, number: int) -> bytes:
    """Return a signed ping."""
    ping = Ping(sender=identity.address, number=number, payload=PAYLOAD)
    data = ping.model_dump_json().encode()
    return identity.sign(keccak256(data)) + data


def verified(wire: bytes) -> Ping:
    """Return the ping of a wire, its signature checked."""
    ping = Ping.model_validate_json(wire[65:])
    require_signer(keccak256(wire[65:]), wire[:65], ping.sender)
    return ping


def bare_reply(identity: Identity, wire: bytes) -> bytes:
    """Return a signed answer to a verified ping."""
    return signed(identity, verified(wire).number)


async def raw_client(network: Network) -> Client:
    """Return a plain client of the NATS library."""
    nats_ = network.nats
    return await nats.connect(nats_.url, user=nats_.user, password=nats_.password)


async def round_trips(network: Network, count: int, *, in_flight: int) -> list[int]:
    """Return the nanoseconds of each of ``count`` signed and verified round trips."""
    client = await raw_client(network)
    identity = Identity(b"\x05" * 32)
    inbox = client.new_inbox()
    waiting: dict[int, asyncio.Future[None]] = {}

    async def on_message(message: Msg) -> None:
        waiting.pop(verified(message.data).number).set_result(None)

    await client.subscribe(inbox, cb=on_message)
    taken: list[int] = []
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            started = time.perf_counter_ns()
            future = waiting[number] = asyncio.get_running_loop().create_future()
            await client.publish("bench.bare", signed(identity, number), reply=inbox)
            await future
            taken.append(time.perf_counter_ns() - started)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    await client.close()
    return taken
