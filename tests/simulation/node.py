"""One agent of a simulated world: a desk, its journal, its vices, and the crashes it survives."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from coase.agents.asks import BuyerStrategy, Decision, Verdict, Wish
from coase.agents.bargain import STYLES, BuyerBargain
from coase.agents.buyer import BuyerDesk
from coase.agents.desk import Desk
from coase.agents.firm import Firm
from coase.agents.ports import Codec, Record, SeededChance
from coase.agents.purse import Budget
from coase.agents.purse import Purse as RealPurse
from coase.agents.seller import Quote, SellerDesk, Ware, Windows
from coase.agents.steps import (
    DoCheck,
    DoWork,
    Notice,
    OnChain,
    OnChannel,
    Publish,
    Step,
    Transmit,
)
from coase.protocol.effects import Answer, Dispute, Open
from coase.protocol.errors import BudgetExhausted, CallReverted, ChainUnavailable
from coase.protocol.identity import Identity, keccak256
from coase.protocol.joincode import SECRET_BYTES, JoinCode
from coase.protocol.messages import AWAITED
from coase.protocol.session import Margins
from coase.protocol.states import Role
from coase.protocol.types import units_to_text
from tests.simulation.cheap import (
    CheapCodec,
    CheapIdentity,
    LyingCodec,
    TwistingCodec,
    require_cheap_signer,
)
from tests.simulation.rates import Caller
from tests.simulation.till import CHUNK_MAX_UNITS, INPUT_MAX, OUTPUT_MAX, RATE, TWISTS, Till

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coase.agents.steps import Effect
    from coase.protocol.messages import Request
    from coase.protocol.session import Thread
    from tests.simulation.world import World

INPUT_SCHEMA: Final = {"type": "object"}
OUTPUT_SCHEMA: Final = {"type": "object"}
WINDOWS: Final = Windows(dispute_s=90, answer_s=60, rule_s=60)
# Blocks to confirm, a halt, a call lost and sent again, a restart, and the clocks.
MARGINS: Final = Margins(chain_s=20, settle_patience_ms=4_000, halt_s=0)
DELIVER_WITHIN_S: Final = 60
RECEIPT_WAIT_BLOCKS: Final = 3
LARGE_BYTES: Final = 100_000
FIRM: Final = Firm("firm", JoinCode.of(b"\1" * SECRET_BYTES))


class Crash(Exception):
    """The power is gone: nothing after this point happens in this life of the node."""


class Store:
    """A journal in memory: what is committed outlives a crash, what is queued does not."""

    def __init__(self) -> None:
        self.count = 0
        self.open: dict[str, list[tuple[int, Record]]] = {}
        self.queue: list[tuple[list[Record], list[tuple[str, bytes]]]] = []
        self.said: set[str] = set()
        self.summaries: dict[str, dict[str, object]] = {}

    def commit(self) -> list[Record]:
        """Make all that is queued durable, and return its records."""
        new: list[Record] = []
        for records, closed in self.queue:
            for record in records:
                self.count += 1
                self.open.setdefault(record.deal, []).append((self.count, record))
                if record.kind == "said":
                    self.said.add(json.loads(record.data)["id"])
            new += records
            for deal, summary in closed:
                self.open.pop(deal, None)
                if summary:
                    self.summaries[deal] = json.loads(summary)
        self.queue = []
        return new

    def records(self) -> list[Record]:
        """Return, in order, what a restart replays."""
        rows = sorted((row for rows in self.open.values() for row in rows), key=lambda r: r[0])
        return [record for _, record in rows]


class Purse(RealPurse):
    """The purse that agents have, with what the world's own checks want to see of it."""

    @property
    def reserved(self) -> dict[str, int]:
        """What is set aside, deal by deal."""
        return self.held()


class Haggler(BuyerStrategy):
    """Bargains a round or two with the cheapest, then takes it; sometimes it just takes one."""

    def __init__(self, node: Node) -> None:
        self.rounds, self.hasty = node.rng.randint(0, 2), node.rng.random() < 0.2

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return a decision on the cheapest offer once it is time."""
        if not closing and not self.hasty:
            return []
        best = min(offers, key=lambda t: (t.agreed_terms.price_units, t.deal))
        if self.rounds > 0:
            self.rounds -= 1
            price = best.agreed_terms.price_units * 9 // 10
            return [Decision(best.deal, Verdict.COUNTER, price)]
        others = [
            Decision(thread.deal, Verdict.REJECT)
            for thread in offers
            if thread is not best and thread.agreed_terms.price_units > 1_200
        ]
        return [*others, Decision(best.deal, Verdict.ACCEPT)]


class Trader:
    """Asks a price, meets a counter-offer half way, and walks away from a low one."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def quote(self, request: Request, buyer: str, *, load: int, now_ms: int) -> Quote | None:
        """Return a quote, or none in one of twenty cases."""
        if self.node.rng.random() < 0.05:
            return None
        if request.output_max:
            return self._by_token((request.input_max + request.output_max) * RATE // 1_000_000)
        price = self.node.rng.choice((900, 1_000, 1_100, 1_300))
        if request.settlements[0] == "channel":
            price = self.node.rng.choice((CHUNK_MAX_UNITS - 20, CHUNK_MAX_UNITS + 20))
        metered = self.node.rng.randrange(100) < self.node.world.plan.metered_percent
        pricing, prices = ("tokens", {"output": 5}) if metered else ("fixed", {})
        return Quote(price, DELIVER_WITHIN_S, pricing=pricing, metered=prices)

    @staticmethod
    def _by_token(price_units: int) -> Quote:
        rates = {"input": RATE, "output": RATE}
        return Quote(price_units, DELIVER_WITHIN_S, pricing="tokens", metered=rates)

    def answer(self, thread: Thread, *, now_ms: int) -> Quote | None:
        """Return the answer to a counter-offer."""
        theirs = thread.agreed_terms
        if theirs.work.output_price_units == RATE:
            return None if self.node.rng.random() < 0.1 else self._by_token(theirs.price_units)
        if theirs.price_units < 700 or self.node.rng.random() < 0.1:
            return None
        work = theirs.work
        metered = {"output": 5} if work.pricing == "tokens" else {}
        price = theirs.price_units + self.node.rng.choice((0, 0, 20))
        return Quote(price, DELIVER_WITHIN_S, pricing=work.pricing, metered=metered)


def label(wire: bytes) -> tuple[str, str, str]:
    """Return kind, id and deal of an envelope that a desk made, without parsing all of it."""

    def value(name: bytes) -> str:
        start = wire.index(b'"' + name + b'":"', 65) + len(name) + 4
        return wire[start : wire.index(b'"', start)].decode()

    return value(b"kind"), value(b"id"), value(b"deal")


class Node:
    """An agent, its journal and its keys, over all its lives."""

    def __init__(self, world: World, name: str, *, sells: bool, buys: bool) -> None:
        self.world, self.name, self.sells, self.buys = world, name, sells, buys
        self.rng = world.rng
        plan = world.plan
        self.identity: Identity = CheapIdentity(name)
        if plan.real_keys:
            self.identity = Identity(keccak256(name.encode()))
        self.me = self.identity.address
        self.skew_ms = self.rng.randint(-plan.skew_ms, plan.skew_ms)
        self.limit_units = plan.limit_units
        self.vices: dict[Role, str] = {}
        self._shown: dict[str, str] = {}
        self._sides: dict[str, Role] = {}
        self.store = Store()
        self.life, self.up, self.vanished = 0, False, False
        self.asked: dict[str, str] = {}
        """Requests by id, and whether they ended: empty while not."""
        self.points, self.crash_at, self.crashes = 0, 0, 0
        self.vanish_at = 0
        self.commits, self.fail_commit_at = 0, 0
        self.last_crash_ms = -(10**9)

    # ---- lives -----------------------------------------------------------------------------

    def boot(self) -> None:
        """Start a life from what the journal holds."""
        world = self.world
        self.life += 1
        self.up = True
        self.waiting: list[list[Effect]] = []
        self.calls: dict[str, tuple[OnChain, int]] = {}
        self.commit_due = False
        self._wake_at = 0
        total = units_to_text(self.limit_units, world.asset.decimals)
        self.purse = Purse(Budget(total=total), world.asset, name="all")
        seed = f"{world.seed}/{self.name}/{self.life}".encode()
        verify = {} if world.plan.real_keys else {"verify": require_cheap_signer}
        self.desk = desk = Desk(
            self._codec(),
            SeededChance(seed),
            domain=world.chain.domain,
            asset=world.asset,
            margins=MARGINS,
            **verify,
        )
        self.till = Till(self, desk)
        self.caller = Caller(self, desk)
        arbiters = () if world.plan.arbiter == "none" else (world.arbiter,)
        if self.sells:
            seller = SellerDesk(desk, agent=self.name, arbiters=arbiters)
            ware = Ware(
                "echo",
                INPUT_SCHEMA,
                OUTPUT_SCHEMA,
                Trader(self),
                capacity=8 if world.plan.rates_percent else 4,
                windows=WINDOWS,
                shown=True,
            )
            seller.sell(ware)
            seller.firm = self._firm
            desk.seller = seller
        if self.buys:
            desk.buyer = self.buyer = BuyerDesk(desk, arbiters=arbiters)
            self.buyer.reserve, self.buyer.firm = self.purse, self._firm
        records = self.store.records()
        desk.replay(records, now_ms=self.clock())
        if self.buys:
            for record in records:
                if record.kind == "asked":
                    self.buyer.replay(record, Haggler(self))
            self.buyer.replayed(self.store.summaries.values())
            for request_id, ended in self.asked.items():
                if not ended and request_id not in self.buyer.asks:
                    self.asked[request_id] = "forgotten"  # Or its end, of which nobody was told.
        desk.abandoned = self.caller.abandoned()
        if self.life > 1:
            self.guard(self._look)()
            if world.plan.rates_percent:  # It hears already, and has withdrawn from nothing yet.
                world.later(self.rng.randint(0, 20), self.guard(self._tick))
            else:
                self.guard(self._tick)()

    def _codec(self) -> Codec:
        if self.world.plan.real_keys:
            return Codec(self.identity, net="sim")
        if "lies" in self.vices.values():
            rng, chance = self.rng, 0.15
            return LyingCodec(self.identity, net="sim", rng=rng, chance=chance)
        if self.vices.get(Role.BUYER, "") in TWISTS:
            return TwistingCodec(
                self.identity, net="sim", twist=lambda deal, plain: self.till.twist(deal, plain)
            )
        return CheapCodec(self.identity, net="sim")

    def _firm(self) -> Firm | None:
        """Return the firm, to which one agent of each kind belongs."""
        return FIRM if self.name.endswith("0") else None

    def crash(self, why: str) -> None:
        """End this life; the next one begins after a short while, or never."""
        self.up = False
        self.crashes += 1
        self.store.queue = []
        self.last_crash_ms = self.world.now
        self.world.note(self, f"crash {why}")
        if not self.vanished:
            self.world.later(self.rng.randint(20, 2_000), self.boot)

    def vanish(self) -> None:
        """Go away for good."""
        self.vanished = True
        raise Crash("vanishes")

    def point(self, where: str) -> None:
        """A point at which the power may go."""
        if self.world.closing:
            return
        self.points += 1
        if self.points == self.vanish_at:
            self.vanish()
        if self.points == self.crash_at:
            raise Crash(where)
        plan = self.world.plan
        if plan.crash_permille and self.world.now - self.last_crash_ms > 20_000:
            if self.rng.randrange(1_000) < plan.crash_permille:
                raise Crash(where)

    def guard(self, act: Callable[..., None]) -> Callable[..., None]:
        """Return ``act`` for this life only; a crash inside of it ends this life."""
        life = self.life

        def run(*args: object) -> None:
            if not self.up or life != self.life:
                return
            try:
                act(*args)
            except Crash as crash:
                self.crash(str(crash))

        return run

    def clock(self) -> int:
        """Return this node's own time."""
        return self.world.now + self.skew_ms

    # ---- honesty -----------------------------------------------------------------------------

    def vice(self, deal: str, side: Role) -> str:
        """Return the vice that the node shows in a deal, or nothing."""
        vice = self.vices.get(side, "")
        if not vice or vice == "lies":
            return vice
        if deal not in self._shown:
            self._shown[deal] = vice if self.rng.random() < 0.5 else ""
        return self._shown[deal]

    def vice_here(self, deal: str) -> str:
        """Return the vice that the node shows in a deal of its own, whichever side it is on."""
        thread = self.desk.threads.get(deal)
        if thread is not None:
            self._sides[deal] = thread.side
        side = self._sides.get(deal)
        return self.vice(deal, side) if side is not None else ""

    def honest(self, deal: str, side: Role) -> bool:
        """Return whether the node kept to the rules in a deal."""
        lies = "lies" in self.vices.values()
        return not (self.vanished or lies or self.vice(deal, side))

    # ---- steps ---------------------------------------------------------------------------------

    def hear(self, wire: bytes) -> None:
        """Take an envelope off the network."""
        self.guard(self._hear)(wire)

    def _hear(self, wire: bytes) -> None:
        self.take(self.desk.hear(wire, now_ms=self.clock()))
        self.caller.heard(wire)

    def ask(self, task: str) -> None:
        """Ask the market for something."""
        self.guard(self._ask)(task)

    def _ask(self, task: str) -> None:
        percent = self.world.plan.rates_percent
        if not percent or self.rng.randrange(100) >= percent or not self.caller.plan(task):
            self.ask_market(task)

    def ask_market(self, task: str) -> None:
        """Ask everybody, as for a deal of its own."""
        world = self.world
        wish = Wish(
            world.capability,
            world.schemas,
            task,
            deliver_within_s=DELIVER_WITHIN_S,
            reply_within_ms=self.rng.choice((500, 1_500)),
            bids_max=self.rng.choice((1, 2, 16)),
            **self._payment(),
        )
        try:
            ask, step = self.buyer.ask(wish, self.strategy(), now_ms=self.clock())
        except BudgetExhausted:
            return  # Whoever has spent all does not even ask.
        self.asked[ask.request_id] = ""
        self.take(step)

    def _payment(self) -> dict[str, Any]:
        """Return how a request may be paid."""
        plan, draw, methods = self.world.plan, self.rng.randrange, ["escrow"]
        if plan.channel_percent and draw(100) < plan.channel_percent:
            methods.insert(0, "channel")
        if plan.firm_percent and draw(100) < plan.firm_percent:
            methods.insert(0, "none")
        counted = methods[0] == "channel" and self.rng.random() < 0.85
        tokens = {"input_max": INPUT_MAX, "output_max": OUTPUT_MAX} if counted else {}
        return {"settlements": tuple(methods), **tokens}

    def strategy(self) -> BuyerStrategy:
        """Return a strategy of this file, or the one that agents have."""
        percent = self.world.plan.rounds_percent
        if not percent or self.rng.randrange(100) >= percent:
            return Haggler(self)
        return BuyerBargain(
            max_price_units=self.rng.choice((1_000, 1_500)),
            hope_permille=self.rng.choice((700, 1_000)),
            deliver_within_s=DELIVER_WITHIN_S,
            style=self.rng.choice(STYLES),
            arbiters=self.buyer.arbiters,
            by_rounds=self.rng.random() < 0.5,
            purse=self.purse,
            experience=self.buyer.experience,
        )

    def take(self, step: Step) -> None:
        """Journal a step, and perform it at once or after the commit."""
        self.point("stepped")
        self.world.payments.stepped(self, step)
        if step.records or step.closed:
            self.store.queue.append((step.records, step.closed))
            if not self.commit_due:
                self.commit_due = True
                self.world.later(self.rng.randint(1, 8), self.guard(self._commit))
            self.point("appended")
        if step.wait and self.store.queue:
            self.waiting.append(step.effects)
        else:
            self.perform(step.effects)
        self.wake()

    def _commit(self) -> None:
        plan = self.world.plan
        self.commit_due = False
        self.commits += 1
        if self.commits == self.fail_commit_at:
            raise Crash("the commit failed")
        if plan.commit_fail_permille and self.world.now - self.last_crash_ms > 20_000:
            if self.rng.randrange(1_000) < plan.commit_fail_permille:
                raise Crash("the commit failed")
        for record in self.store.commit():
            self.world.recorded(self, record)
        self.point("committed")
        waiting, self.waiting = self.waiting, []
        for effects in waiting:
            self.perform(effects)
        self.wake()

    def wake(self) -> None:
        """Arrange for the next tick."""
        due = self.desk.next_ms()
        if due is None:
            return
        at = max(due - self.skew_ms, self.world.now + 1)
        if not self.world.now < self._wake_at <= at:
            self._wake_at = at
            self.world.at(at, self.guard(self._tick_if_due), at)

    def _tick_if_due(self, at: int) -> None:
        if at == self._wake_at:
            self._tick()

    def _tick(self) -> None:
        now_ms = self.clock()
        step = self.desk.tick(now_ms=now_ms)
        due = self.desk.next_ms()
        self.world.require(due is None or due > now_ms, self, "would tick for ever", due)
        self.take(step)

    def on_block(self) -> None:
        """Look at the chain a little later, as everybody does in its own time."""
        if not self.up:
            return
        self.guard(self._receipts)()
        if self.world.plan.streams:
            self.guard(self.till.on_block)()
        if self.up and self.desk.watched():
            self.world.later(self.rng.randint(0, 800), self.guard(self._look))
        elif self.up:
            self.guard(self._look)()

    def _look(self) -> None:
        chain, depth = self.world.chain, self.world.plan.confirmations
        views = {job_id: chain.view(job_id, depth) for job_id in self.desk.watched()}
        depth_s = chain.head(depth).time_s
        step = self.desk.look(views, head=chain.head(), depth_s=depth_s, now_ms=self.clock())
        self.take(step)
        if self.world.plan.streams:
            self.till.look()

    # ---- effects -------------------------------------------------------------------------------

    def perform(self, effects: Iterable[Effect]) -> None:
        """Perform effects one by one; the power may go between any two of them."""
        for effect in effects:
            self.point("before an effect")
            self._perform(effect)
            self.point("after an effect")

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Transmit():
                self._transmit(effect)
            case Publish():
                self.world.publish(self, effect.wire)
            case OnChain():
                self._call(effect)
            case OnChannel():
                self.till.fund(effect)
            case DoWork():
                self._start_work(effect.deal)
            case DoCheck():
                if self.vice(effect.deal, Role.BUYER) == "no_check":
                    return
                self.world.later(self.rng.randint(1, 50), self.guard(self._check), effect.deal)
            case Notice():
                if effect.kind == "request_ended":
                    self.asked[effect.deal] = effect.detail or "ended"
                self.caller.noticed(effect)
                if effect.kind == "ended" or effect.kind.startswith("chain"):
                    state = effect.thread.state if effect.thread is not None else effect.detail
                    self.world.note(self, f"{effect.kind} {effect.deal[:6]} {state}")

    def _transmit(self, effect: Transmit) -> None:
        kind, message_id, deal = label(effect.wire)
        said = kind not in AWAITED or message_id in self.store.said
        self.world.require(said, self, f"said {kind} before it was durable", message_id)
        kept_back = {
            "hash_only": ("result", "piece"),
            "no_task": ("task", "piece"),
            "no_settle": ("settle",),
            "false_dispute": ("settle",),
            "no_voucher": ("voucher",),
        }
        if kind in kept_back.get(self.vice_here(deal), ()):
            return
        self.world.note(self, f"says {kind} {deal[:6]}")
        self.world.send(self, effect.to, effect.wire)

    def _call(self, effect: OnChain) -> None:
        chain, call = self.world.chain, effect.call
        if isinstance(call, Open) and self.vice(effect.deal, Role.BUYER) == "no_lock":
            return
        if isinstance(call, Answer) and self.vice(effect.deal, Role.SELLER) == "no_answer":
            return
        if isinstance(call, Dispute):
            self.world.disputed.setdefault(effect.deal, self.world.now)
        retry = self.guard(self._call_ended)
        try:
            if not chain.is_known(effect.effect_id, self.me):
                chain.try_call(call, self.me, now_s=self.world.now // 1_000)
        except CallReverted as error:
            self.world.later(1, retry, effect.effect_id, error.error, 1_500)
            return
        chain.send(effect.effect_id, call, self.me)
        self.calls[effect.effect_id] = (effect, chain.head().number)
        self.world.note(self, f"calls {type(call).__name__} {effect.deal[:6]}")
        if isinstance(call, Open) and self.vice(effect.deal, Role.BUYER) == "vanishes":
            self.vanish()

    def _receipts(self) -> None:
        chain = self.world.chain
        for effect_id, (_effect, sent) in list(self.calls.items()):
            try:
                receipt = chain.receipt(effect_id, self.me)
            except ChainUnavailable:
                continue
            except CallReverted as error:
                del self.calls[effect_id]
                self._call_ended(effect_id, error.error, 1_500)
                continue
            if receipt is not None:
                del self.calls[effect_id]
                self._call_ended(effect_id, "", 5_000)
            elif chain.head().number - sent >= RECEIPT_WAIT_BLOCKS:
                del self.calls[effect_id]
                self._call_ended(effect_id, "lost", 500)

    def _call_ended(self, effect_id: str, error: str, retry_ms: int) -> None:
        ended = self.desk.call_ended(effect_id, error, retry_ms=retry_ms, now_ms=self.clock())
        self.take(ended)

    def _start_work(self, deal: str) -> None:
        vice = self.vice(deal, Role.SELLER)
        thread = self.desk.threads.get(deal)
        streamed = thread is not None and thread.streamed
        if vice == "vanishes" and not streamed:
            self.vanish()
        if vice == "no_delivery":
            return
        delay = self.rng.randint(50, 1_500)
        if vice == "late":
            delay += 1_000 * (DELIVER_WITHIN_S + 40)
        work = self.till.begin if streamed else self._work
        self.world.later(delay, self.guard(work), deal)

    def _work(self, deal: str) -> None:
        thread = self.desk.threads.get(deal)
        if thread is None or thread.task is None:
            return
        vice = self.vice(deal, Role.SELLER)
        if vice == "declines":
            self.take(self.desk.work_failed(deal, "no", now_ms=self.clock()))
            return
        price = thread.agreed_terms.price_units
        units = price * 6 // 10 if thread.agreed_terms.work.pricing == "tokens" else price
        bad = vice in ("garbage", "no_answer")
        result = '{"y":"rubbish"}' if bad else self.world.answer(thread.task.task)
        step = self.desk.work_done(
            deal,
            result=result,
            to_seller_units=units,
            usage={},
            salt=self.rng.randbytes(32),
            now_ms=self.clock(),
        )
        self.take(step)

    def _check(self, deal: str) -> None:
        thread = self.desk.threads.get(deal)
        if thread is None or thread.result is None or thread.task is None:
            return
        made, task = thread.result.result, thread.task.task
        text = json.dumps({"text": self.world.text(task)})
        good = made == (text if thread.streamed else self.world.answer(task))
        if self.vice(deal, Role.BUYER) == "false_dispute":
            good = False
        verdict = "good" if good else "not what was asked for"
        self.take(self.desk.checked(deal, verdict, now_ms=self.clock()))
