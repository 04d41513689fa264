"""A small market by hand: desks over a chain in memory, and a queue of envelopes between them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.agents.asks import Ask, BuyerStrategy, Decision, Verdict, Wish
from coase.agents.buyer import BuyerDesk
from coase.agents.desk import Desk
from coase.agents.ports import Codec, Record, SeededChance
from coase.agents.seller import Quote, SellerDesk, Ware
from coase.agents.steps import (
    DoCheck,
    DoWork,
    Effect,
    Notice,
    OnChain,
    OnChannel,
    Publish,
    Step,
    Transmit,
)
from coase.escrow.backends.memory import MemoryChain
from coase.escrow.backends.memory_channels import MemoryLedger
from coase.protocol.errors import CallReverted
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import capability_id, schemas_hash
from coase.protocol.types import Asset

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.agents.purse import OpenPurse
    from coase.protocol.messages import Request
    from coase.protocol.session import Thread

START_MS: Final = 1_700_000_000_000
ASSET: Final = Asset(1, "0x" + "33" * 20)
SCHEMA: Final = {"type": "object"}
SCHEMAS: Final = schemas_hash(SCHEMA, SCHEMA)
CAPABILITY: Final = capability_id("echo", SCHEMAS)


class Fixed:
    """Asks one price, and takes any counter-offer."""

    def __init__(self, price_units: int) -> None:
        self.price_units = price_units

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        return Quote(self.price_units, 30)

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        return Quote(thread.agreed_terms.price_units, 30)


class Cheapest(BuyerStrategy):
    """Counters the cheapest as often as it is told, then takes it."""

    def __init__(self, counters: int = 0) -> None:
        self.counters = counters

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        if not closing:
            return []
        best = min(offers, key=lambda t: (t.agreed_terms.price_units, t.deal))
        if self.counters:
            self.counters -= 1
            return [Decision(best.deal, Verdict.COUNTER, best.agreed_terms.price_units - 100)]
        return [Decision(best.deal, Verdict.ACCEPT)]


@dataclass
class Seat:
    """One agent: its desk, its journal, and what came of its steps."""

    name: str
    desk: Desk
    records: list[Record] = field(default_factory=list)
    closed: list[tuple[str, bytes]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


class Market:
    """Some sellers and one buyer. Nothing happens unless it is told to."""

    def __init__(self, *, prices: tuple[int, ...] = (1_000,)) -> None:
        self.now_ms = START_MS
        self.chain = MemoryChain(ASSET, escrow="0x" + "44" * 20, time_s=START_MS // 1_000)
        self.ledger = MemoryLedger(ASSET, time_s=START_MS // 1_000)
        self.funded: dict[str, str] = {}
        """What became of each deposit that was sent, by its id."""
        self.queue: list[tuple[str, bytes]] = []
        self.sent: list[tuple[str, str, bytes]] = []
        """Everything that was ever sent: (kind, addressee, envelope)."""
        self.lost: Callable[[str, bytes], bool] = lambda to, wire: False
        self.works = True
        self.result = '{"x":"done"}'
        self.seats: dict[str, Seat] = {}
        self.sellers = [self._sit(f"seller{n}") for n in range(len(prices))]
        for seat, price in zip(self.sellers, prices, strict=True):
            seller = SellerDesk(seat.desk, agent=seat.name)
            seller.sell(Ware("echo", SCHEMA, SCHEMA, Fixed(price)))
            seat.desk.seller = seller
        self.buyer = self._sit("buyer")
        self.buying = self.buyer.desk.buyer = BuyerDesk(self.buyer.desk)

    def _sit(self, name: str, life: int = 0) -> Seat:
        identity = Identity(keccak256(name.encode()))
        chance = SeededChance(f"{name}/{life}".encode())
        desk = Desk(Codec(identity, net="t"), chance, domain=self.chain.domain, asset=ASSET)
        desk.streams.open(self.ledger.domain, is_local=True)
        if not life:
            self.chain.mint(identity.address, 10**9, approve=True)
            self.ledger.mint(identity.address, 10**9)
        seat = self.seats[identity.address] = Seat(name, desk)
        return seat

    def restart(
        self, seat: Seat, *, records: list[Record] | None = None, purse: OpenPurse | None = None
    ) -> Seat:
        """Return the same agent, born again from its journal."""
        kept = seat.records if records is None else records
        again = self._sit(seat.name, life=len(kept) + 1)
        again.records = list(kept)
        again.desk.replay(kept, now_ms=self.now_ms)
        if seat is self.buyer:
            self.buyer, self.buying = again, BuyerDesk(again.desk)
            again.desk.buyer = self.buying
            self.buying.reserve = purse or self.buying.reserve
            for record in kept:
                if record.kind == "asked":
                    self.buying.replay(record, Cheapest())
            self.buying.replayed()
        else:
            wares = seat.desk.seller
            assert isinstance(wares, SellerDesk)
            again.desk.seller = seller = SellerDesk(again.desk, agent=seat.name)
            for ware in wares.wares.values():
                seller.sell(ware)
            self.sellers[self.sellers.index(seat)] = again
        return again

    def ask(self, task: str = "hello", *, counters: int = 0, **wish: int) -> Ask:
        """Let the buyer ask for something."""
        wanted = Wish(CAPABILITY, SCHEMAS, task, **{"bids_max": len(self.sellers), **wish})  # type: ignore[arg-type]
        ask, step = self.buying.ask(wanted, Cheapest(counters), now_ms=self.now_ms)
        self.perform(self.buyer, step)
        return ask

    def perform(self, seat: Seat, step: Step) -> Step:
        """Journal a step and perform it."""
        seat.records += step.records
        seat.closed += step.closed
        for effect in step.effects:
            self._perform(seat, effect)
        return step

    def _perform(self, seat: Seat, effect: Effect) -> None:
        desk = seat.desk
        match effect:
            case Transmit():
                self.send(effect.to, effect.wire)
            case Publish():
                for seller in self.sellers:
                    self.send(seller.desk.me, effect.wire)
            case OnChain():
                self.chain.send(effect.effect_id, effect.call, desk.me)
            case OnChannel():
                self._fund(seat, effect)
            case DoWork() if self.works:
                done = desk.work_done(
                    effect.deal,
                    result=self.result,
                    to_seller_units=desk.threads[effect.deal].agreed_terms.price_units,
                    usage={},
                    salt=b"\1" * 32,
                    now_ms=self.now_ms,
                )
                self.perform(seat, done)
            case DoCheck():
                self.perform(seat, desk.checked(effect.deal, "good", now_ms=self.now_ms))
            case Notice():
                seat.notices.append(effect)

    def _fund(self, seat: Seat, effect: OnChannel) -> None:
        if effect.effect_id not in self.funded:
            try:
                self.ledger.execute(effect.call, seat.desk.me)
                self.funded[effect.effect_id] = ""
            except CallReverted as refused:
                self.funded[effect.effect_id] = str(refused)
        error = self.funded[effect.effect_id]
        step = seat.desk.deposit_ended(effect.effect_id, error, now_ms=self.now_ms)
        self.perform(seat, step)

    def send(self, to: str, wire: bytes) -> None:
        """Put an envelope on its way, unless it gets lost."""
        self.sent.append((kind_of(wire), to, wire))
        if to in self.seats and not self.lost(to, wire):
            self.queue.append((to, wire))

    def deliver(self) -> None:
        """Let all envelopes arrive, and those that they lead to."""
        while self.queue:
            to, wire = self.queue.pop(0)
            seat = self.seats[to]
            self.perform(seat, seat.desk.hear(wire, now_ms=self.now_ms))

    def pass_ms(self, duration_ms: int, *, pause_ms: int = 250) -> None:
        """Let time pass, with ticks, blocks and deliveries."""
        for _ in range(duration_ms // pause_ms):
            self.now_ms += pause_ms
            if self.now_ms % 1_000 < pause_ms:
                self.block()
            for seat in list(self.seats.values()):
                self.perform(seat, seat.desk.tick(now_ms=self.now_ms))
            self.deliver()

    def block(self) -> None:
        """Seal a block and let everybody look."""
        self.chain.seal(self.now_ms // 1_000)
        self.ledger.time_s = self.now_ms // 1_000
        for seat in list(self.seats.values()):
            views = {job: self.chain.view(job) for job in seat.desk.watched()}
            head = self.chain.head()
            look = seat.desk.look(views, head=head, depth_s=head.time_s, now_ms=self.now_ms)
            self.perform(seat, look)
            wanted = seat.desk.streams.wanted()
            seen = {channel_id: self.ledger.view(channel_id) for channel_id in wanted}
            self.perform(seat, seat.desk.look_at_channels(seen, now_ms=self.now_ms))

    def until(self, done: Callable[[], object], *, within_ms: int = 200_000) -> None:
        """Let time pass until something is so."""
        self.deliver()
        for _ in range(within_ms // 250):
            if done():
                return
            self.pass_ms(250)
        raise AssertionError("it did not happen in time")

    def kinds(self, to: Seat | None = None) -> list[str]:
        """Return the kinds of all that was sent, or sent to one."""
        return [kind for kind, who, _ in self.sent if to is None or who == to.desk.me]


def head_of(wire: bytes) -> dict[str, str]:
    """Return the header of an envelope."""
    head: dict[str, str] = json.loads(wire[65:])
    return head


def kind_of(wire: bytes) -> str:
    """Return the kind of an envelope."""
    return head_of(wire)["kind"]
