"""Strangers on the live broker: what they send changes nothing, and honest deals are made."""

from __future__ import annotations

import json
import secrets
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import nats
import pytest

from coase.agents import Agent, Node
from coase.agents.admission import ADDRESS_BURST, ADDRESS_PER_S
from coase.agents.asks import Wish
from coase.agents.bargain import BuyerBargain, SellerBargain
from coase.agents.buyer import BuyerDesk
from coase.agents.desk import Desk
from coase.agents.node import SystemChance
from coase.agents.ports import Codec
from coase.agents.seller import SellerDesk, Ware
from coase.agents.steps import Publish, Transmit
from coase.negotiation.pricing import Price
from coase.protocol.envelope import pack
from coase.protocol.identity import Identity
from coase.protocol.messages import ENVELOPE_SIZE_MAX_BYTES, schemas_hash
from coase.protocol.subjects import inbox_subject
from tests.live.market import FUNDS_UNITS, PRICE_UNITS, Market, eventually
from tests.live.test_runtime import Result, Task, ask, node_with, rest, seller_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.protocol.backends.nats import NatsTransport

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]

FLOOD_REQUESTS = 10_000
FLOOD_SHARE = (
    10  # As much of the flood, and of what a seller reads of one address, is the short test.
)
FLOOD_OFFERS = 2_000
KINDS = ("offer", "counter", "accept", "agreed", "task", "result", "settle", "reject", "withdraw")


@dataclass
class Stranger:
    """Somebody with a key of its own and a connection to the broker."""

    live: Market
    node: Node
    transport: NatsTransport
    identity: Identity = field(default_factory=lambda: Identity(secrets.token_bytes(32)))
    heard: list[bytes] = field(default_factory=list)

    def desk(self) -> Desk:
        """The means of an honest agent, for what an honest agent would not do with them."""
        settlement = self.node.settlement
        codec = Codec(self.identity, net=self.live.network.net)
        chance = SystemChance()
        return Desk(codec, chance, domain=settlement.domain, asset=settlement.asset)

    async def tap(self, *agents: str) -> None:
        """Hear what others get, as anybody who has the broker's password may."""
        for agent in agents:
            await self.transport.listen(agent, self.heard.append)

    def forge(self, to: str, *, kind: str = "task", body: str = "{}", **more: object) -> bytes:
        """Return a well-formed envelope, signed by the stranger."""
        now_ms = time.time_ns() // 1_000_000
        fields = {
            "net": self.live.network.net,
            "kind": kind,
            "message_id": secrets.token_hex(16),
            "to": to,
            "deal": secrets.token_hex(16),
            "re": "",
            "seq": 0,
            "sent_ms": now_ms,
            "expires_ms": now_ms + 60_000,
            "sealed": False,
            "body": body,
        }
        return pack(self.identity, **{**fields, **more})  # type: ignore[arg-type]

    async def until_heard(self, agent: Agent) -> None:
        """Return when ``agent`` has handled all that was sent to it before."""
        answers: list[bytes] = []
        await self.transport.listen(self.identity.address, answers.append)
        wire = self.forge(agent.address)  # A task of no deal: whoever is verified gets a NACK.
        mark = str(json.loads(wire[65:])["id"]).encode()
        await self.transport.send(agent.address, wire)
        await eventually(lambda: any(mark in answer for answer in answers), "an answer comes")


@asynccontextmanager
async def stranger(live: Market, node: Node) -> AsyncIterator[Stranger]:
    async with live.transport() as transport:
        yield Stranger(live, node, transport)


def rows(node: Node) -> int:
    """How many records the node's journal has, whoever's."""
    return int(node.journal.read("SELECT count(*) FROM records")[0][0])  # type: ignore[attr-defined]


def counted(agent: Agent, name: str) -> int:
    assert agent.seat is not None
    return agent.seat.desk.counts.get(name, 0)


def flipped(wire: bytes, place: int) -> bytes:
    return wire[:place] + bytes([wire[place] ^ 1]) + wire[place + 1 :]


def sender_of(wire: bytes) -> str:
    try:
        return str(json.loads(wire[65:])["sender"])
    except ValueError:
        return ""


async def barrage(eve: Stranger, victim: Agent, wires: list[bytes]) -> None:
    """Send a victim everything that is wrong, made of what is right."""
    me = victim.address
    now_ms = time.time_ns() // 1_000_000
    await eve.transport.send(me, b"")
    for size in (1, 65, 66, 1_000, ENVELOPE_SIZE_MAX_BYTES):
        await eve.transport.send(me, secrets.token_bytes(size))
    await eve.transport.send(me, b"\0" * 65 + b'{"v":1}')
    for wire in wires:
        await eve.transport.send(me, wire)  # Replayed.
        for place in (3, 64, 80, len(wire) // 2, len(wire) - 2):
            await eve.transport.send(me, flipped(wire, place))
        header = json.loads(wire[65:])
        again = {"message_id": header["id"], "deal": header["deal"], "re": header["re"]}
        await eve.transport.send(
            me, eve.forge(me, kind=header["kind"], body=header["body"], **again)
        )
        forged = eve.forge(me, kind=header["kind"], body=header["body"], **again)
        claimed = forged[65:].replace(eve.identity.address.encode(), str(header["sender"]).encode())
        await eve.transport.send(me, forged[:65] + claimed)  # In another's name.
    for kind in KINDS:
        await eve.transport.send(me, eve.forge(me, kind=kind))
    await eve.transport.send(me, eve.forge(me, kind="unheardof"))
    await eve.transport.send(me, eve.forge(me, net="another"))
    await eve.transport.send(me, eve.forge("0x" + "77" * 20))
    await eve.transport.send(
        me, eve.forge(me, sent_ms=now_ms - 400_000, expires_ms=now_ms - 100_000)
    )
    await eve.transport.send(
        me, eve.forge(me, sent_ms=now_ms + 400_000, expires_ms=now_ms + 500_000)
    )
    await eve.transport.send(me, eve.forge(me, sent_ms=now_ms, expires_ms=now_ms + 900_000))
    await eve.until_heard(victim)


async def send_too_large(live: Market, to: str) -> None:
    """Send one byte more than an envelope may have, past our own transport, which would not."""
    address = live.network.nats
    client = await nats.connect(address.url, user=address.user, password=address.password)
    subject = inbox_subject(live.network.net, to)
    await client.publish(subject, b"x" * (ENVELOPE_SIZE_MAX_BYTES + 1))
    await client.flush()
    await client.close()


async def test_what_is_wrong_gets_its_treatment_and_changes_nothing(
    live: Market, tmp_path: Path
) -> None:
    seller, buyer = seller_of("besieged"), Agent("buyer")
    async with node_with(live, tmp_path / "s", seller, buyer) as node, stranger(live, node) as eve:
        await eve.tap(seller.address, buyer.address)
        assert await ask(buyer, "besieged", "first") == "first"
        await rest(node, seller, buyer)
        before = rows(node)
        recorded = list(eve.heard)
        assert len(recorded) >= 6

        for victim in (seller, buyer):
            await barrage(eve, victim, recorded)
            await send_too_large(live, victim.address)

        assert rows(node) == before, "what strangers and the past say is not journalled"
        for victim in (seller, buyer):
            assert victim.seat is not None
            assert victim.seat.desk.threads == {}
            for name in ("malformed", "misaddressed", "bad_signature", "repeated"):
                assert counted(victim, name) > 0, name
            for reason in ("unknown_deal", "unknown_kind", "expired", "clock", "malformed"):
                assert counted(victim, f"refused_{reason}") > 0, reason
        health = node.transport.health()
        await eventually(lambda: health.oversize_drops >= 2, "what is too large is dropped")
        assert health.callback_errors == 0

        async with anyio.create_task_group() as group:  # The same in the midst of a deal.
            group.start_soon(ask, buyer, "besieged", "linger")
            eve.heard.clear()
            await eventually(lambda: any(b'"kind":"task"' in w for w in eve.heard), "a task")
            recorded = [w for w in eve.heard if sender_of(w) in (seller.address, buyer.address)]
            for victim in (seller, buyer):
                await barrage(eve, victim, recorded)
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - 2 * PRICE_UNITS
        assert await node.settlement.balance(seller.address) == FUNDS_UNITS + 2 * PRICE_UNITS


@pytest.mark.parametrize("share", [FLOOD_SHARE, pytest.param(1, marks=pytest.mark.slow)])
async def test_ten_thousand_requests_from_one_address_stop_nobody(
    live: Market, tmp_path: Path, share: int
) -> None:
    seller, buyer = seller_of("flooded"), Agent("buyer")
    async with node_with(live, tmp_path / "s", seller, buyer) as node, stranger(live, node) as eve:
        assert seller.seat is not None
        door, requests = seller.seat.desk.admission, FLOOD_REQUESTS // share
        door.address_per_s, door.address_burst = ADDRESS_PER_S // share, ADDRESS_BURST // share
        desk = eve.desk()
        desk.buyer = asking = BuyerDesk(desk, arbiters=live.network.arbiters)
        (offering,) = seller.offerings.values()
        wish = Wish(
            capability=offering.capability,
            schemas=schemas_hash(Task.model_json_schema(), Result.model_json_schema()),
            task="{}",
            features={"bytes": 2},
            reply_within_ms=2_000,
        )
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(requests):
                now_ms = time.time_ns() // 1_000_000
                bargain = BuyerBargain(max_price_units=1, deliver_within_s=60)
                _, step = asking.ask(wish, bargain, now_ms=now_ms)
                for effect in step.effects:
                    if isinstance(effect, Publish):
                        await eve.transport.ask(
                            effect.capability, effect.wire, level=effect.level, prefix="-"
                        )
                asking._live_asks.clear()
                sent += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(flood)
            await eventually(lambda: sent > requests // 20, "the flood has begun")
            assert await ask(buyer, "flooded", "one", tries=3) == "one"
        assert await ask(buyer, "flooded", "two", tries=3) == "two"
        assert counted(seller, "refused_capacity") > 0
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - 2 * PRICE_UNITS


async def test_two_thousand_offers_from_one_address_hide_no_other(
    live: Market, tmp_path: Path
) -> None:
    seller, buyer = seller_of("outbid"), Agent("buyer")
    async with node_with(live, tmp_path / "s", seller, buyer) as node, stranger(live, node) as eve:
        desk = eve.desk()
        (offering,) = seller.offerings.values()
        bargain = SellerBargain(Price.per_task("9"), node.settlement.asset, deliver_within_s=5)
        desk.seller = selling = SellerDesk(desk, agent="eve", arbiters=live.network.arbiters)
        schemas = Task.model_json_schema(), Result.model_json_schema()
        selling.sell(Ware("outbid", *schemas, strategy=bargain))
        requests: list[bytes] = []
        sent = 0

        async def flood() -> None:
            nonlocal sent
            await eventually(lambda: requests, "a request comes")
            now_ms = time.time_ns() // 1_000_000
            step = desk.hear(requests[0], now_ms=now_ms)
            (thread,) = desk.threads.values()
            (plain,) = (json.loads(r.data)["plain"] for r in step.records if r.kind == "said")
            for effect in step.effects:
                if isinstance(effect, Transmit):
                    await eve.transport.send(effect.to, effect.wire)
            for _ in range(FLOOD_OFFERS):
                wire = desk.codec.encode(
                    kind="offer",
                    message_id=secrets.token_hex(16),
                    to=buyer.address,
                    deal=thread.deal,
                    re=thread.request_id,
                    sent_ms=now_ms,
                    expires_ms=now_ms + 60_000,
                    plain=plain.encode(),
                    key=thread.their_key,
                )
                await eve.transport.send(buyer.address, wire)
                sent += 1
                await anyio.lowlevel.checkpoint()

        await eve.transport.serve(eve.identity.address, offering.capability, requests.append)
        async with anyio.create_task_group() as group:
            group.start_soon(flood)
            assert await ask(buyer, "outbid", "one", tries=3) == "one"
        assert sent == FLOOD_OFFERS
        await rest(node, seller, buyer)
        assert await node.settlement.balance(buyer.address) == FUNDS_UNITS - PRICE_UNITS
        assert await node.settlement.balance(seller.address) == FUNDS_UNITS + PRICE_UNITS
