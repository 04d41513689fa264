"""A seeded market of sellers of tokens, good and bad, in which ways of choosing are compared.

Every policy meets the same sellers, the same calls and the same luck. Sellers come and go; some
are slow and say that they are quick, some answer with rubbish for little money, some fail or are
silent for ever. Every policy may go to another seller when one fails, four times for each call.
"""

from __future__ import annotations

import heapq
import itertools
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

from coase.agents.compute.routing import RouteBook, Wish
from coase.agents.compute.ways import Listing, Place, Size

MODEL: Final = "m"
TRIES_MAX: Final = 4
STALL_MS: Final = 4_000
"""Without a first token for so long after it should be there, a caller goes elsewhere."""
CALL_MAX_MS: Final = 60_000
NEWS_MS: Final = 2_000  # So often sellers tell how busy they are.
CHECKED: Final = 0.2  # So many answers are checked by their buyers.
KINDS: Final = (("honest", 60), ("slow", 14), ("liar", 10), ("flaky", 10), ("dead", 6))
TIME_SPREAD: Final = 0.25
STAY_MS: Final = 240_000  # How long a seller stays on average.
MICROS: Final = 1_000


@dataclass(slots=True)
class Seller:
    """One seller: what it says, and what it does."""

    name: str
    kind: str
    listing: Listing
    first_ms: float
    token_ms: float
    distance_ms: float
    bad_share: float
    fail_share: float
    leaves_ms: float
    slots: list[float]
    inside: int = 0
    told: int = 0


@dataclass(slots=True)
class Call:
    """One call and what came of it so far."""

    number: int
    buyer: int
    size: Size
    at_ms: float
    tried: list[str] = field(default_factory=list)
    paid_units: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What a policy came to."""

    name: str
    p50_ms: float
    p95_ms: float
    cost: float
    """Units for each call that was answered."""
    failed: float
    bad: float

    def beats(self, other: Figures) -> bool:
        """Return whether it is no worse in anything and better in something."""
        ours, theirs = self.row(), other.row()
        return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs

    def row(self) -> tuple[float, ...]:
        """Return what counts, less of each being better."""
        return self.p50_ms, self.p95_ms, self.cost, self.failed, self.bad


class Policy(ABC):
    """A way of choosing."""

    name: str

    def __init__(self, seed: int, *, buyers: int) -> None:
        self.chance = random.Random(seed)
        self.buyers = buyers

    @abstractmethod
    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return one of those that are here and were not tried."""

    def joined(self, seller: Seller, now_ms: float) -> None:  # noqa: B027
        """Hear of a new seller."""

    def gone(self, seller: Seller) -> None:  # noqa: B027
        """Hear that a seller took itself off the list."""

    def news(self, sellers: list[Seller], now_ms: float) -> None:  # noqa: B027
        """Hear how busy they say to be."""

    def ended(  # noqa: B027
        self,
        call: Call,
        seller: Seller,
        *,
        good: bool,
        first_ms: float,
        took_ms: float,
        checked: bool | None,
        now_ms: float,
    ) -> None:
        """Hear what came of it."""


class Random(Policy):
    """Anybody."""

    name = "random"

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return anybody."""
        return self.chance.choice(here)


class RoundRobin(Policy):
    """One after the other."""

    name = "round robin"
    _next = 0

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return the next."""
        self._next += 1
        return here[self._next % len(here)]


class LeastBusy(Policy):
    """Whoever says to be least busy, any of them."""

    name = "least busy"

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return one with the shortest queue."""
        least = min(seller.told for seller in here)
        return self.chance.choice([seller for seller in here if seller.told == least])


class Cheapest(Policy):
    """The lowest price for the call."""

    name = "cheapest"

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return the one with the lowest price."""
        return min(here, key=lambda seller: price_of(seller, call.size))


class InverseSquare(Policy):
    """By chance, weighed by one over the square of the price."""

    name = "inverse-square price"

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Draw one."""
        weights = [1 / price_of(seller, call.size) ** 2 for seller in here]
        return self.chance.choices(here, weights)[0]


class TwoChoices(Policy):
    """Two by chance, of which the less busy one; both are asked at that moment."""

    name = "power of two choices"

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return the less busy of two."""
        pair = self.chance.choice(here), self.chance.choice(here)
        return min(pair, key=busy)


class Router(Policy):
    """Our own decision, with a book for each buyer."""

    name = "coase"

    def __init__(self, seed: int, *, buyers: int, second_units: int = 200, name: str = "") -> None:
        super().__init__(seed, buyers=buyers)
        self.books = [RouteBook() for _ in range(buyers)]
        self.second_units = second_units
        self.name = name or self.name

    def pick(self, call: Call, here: list[Seller], now_ms: float) -> Seller:
        """Return what the book of the call's buyer says."""
        book, by_name = self.books[call.buyer], {seller.name: seller for seller in here}
        wish = Wish(models=(MODEL,), second_units=self.second_units)
        chance = self.chance.getrandbits(64)
        decision = book.decide(wish, call.size, now_ms=int(now_ms), chance=chance)
        for choice in decision.ranking:
            if choice.seller in by_name:
                book.began(choice.seller, MODEL, now_ms=int(now_ms))
                return by_name[choice.seller]
        return self.chance.choice(here)

    def joined(self, seller: Seller, now_ms: float) -> None:
        """Take its listing into every book."""
        for book in self.books:
            book.learn(seller.listing, now_ms=int(now_ms))

    def gone(self, seller: Seller) -> None:
        """Forget it."""
        for book in self.books:
            book.drop(seller.name)

    def news(self, sellers: list[Seller], now_ms: float) -> None:
        """Take in how busy they say to be."""
        for book in self.books:
            for seller in sellers:
                book.loaded(seller.name, seller.told, now_ms=int(now_ms))

    def ended(
        self, call: Call, seller: Seller, *, good: bool, first_ms: float, took_ms: float,
        checked: bool | None, now_ms: float,
    ) -> None:  # fmt: skip
        """Learn from it."""
        book, at_ms = self.books[call.buyer], int(now_ms)
        book.left(seller.name, MODEL, now_ms=at_ms)
        if not good:
            book.failed(seller.name, MODEL, lost_us=int(took_ms * MICROS), now_ms=at_ms)
            return
        book.delivered(
            seller.name,
            MODEL,
            call.size,
            first_us=int(first_ms * MICROS),
            took_us=int(took_ms * MICROS),
            now_ms=at_ms,
        )
        if checked is not None:
            book.checked(seller.name, MODEL, good=checked, now_ms=at_ms)


BASELINES: Final = (Random, RoundRobin, LeastBusy, Cheapest, InverseSquare, TwoChoices)


def price_of(seller: Seller, size: Size) -> int:
    """Return what a call costs there, in units."""
    listing = seller.listing
    millionths = listing.input_units * size.input + listing.output_units * size.output
    return max(-(-millionths // 1_000_000), 1)


def busy(seller: Seller) -> int:
    """Return how busy a seller says to be; some always say that they are not."""
    return 0 if seller.kind in ("liar", "dead") else seller.inside


class World:
    """The market, and the calls that are made in it."""

    def __init__(
        self, seed: int, *, sellers: int, calls: int, rate_per_s: float, buyers: int
    ) -> None:
        self.seed, self.count, self.calls = seed, sellers, calls
        self.rate_per_s, self.buyers = rate_per_s, buyers

    def play(self, policy: Policy) -> Figures:
        """Return what ``policy`` comes to in this world."""
        return _Play(self, policy).run()


class _Play:
    """One policy in one world."""

    def __init__(self, world: World, policy: Policy) -> None:
        self.world, self.policy = world, policy
        # One source for each kind of luck, so that what a policy does changes no other draw.
        self.births = random.Random(world.seed * 3 + 1)
        self.names = itertools.count()
        self.here: dict[str, Seller] = {}
        self.events: list[tuple[float, int, str, object]] = []
        self.order = itertools.count()
        self.times: list[float] = []
        self.cost = self.failed = self.bad = self.open = 0

    def run(self) -> Figures:
        """Play it to the end."""
        for _ in range(self.world.count):
            self._birth(0.0, age=self.births.random())
        demand = random.Random(self.world.seed * 3)
        at_ms = 0.0
        for number in range(self.world.calls):
            at_ms += demand.expovariate(self.world.rate_per_s) * 1_000
            size = Size(
                int(min(demand.lognormvariate(5.5, 0.8), 4_000)) + 1,
                int(min(demand.lognormvariate(4.8, 0.6), 800)) + 1,
            )
            buyer = demand.randrange(self.world.buyers)
            self._at(at_ms, "call", Call(number, buyer, size, at_ms))
        self.open = self.world.calls
        self._at(0.0, "news", None)
        while self.open:
            now_ms, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(now_ms, what)
        ranked = sorted(self.times)
        answered = max(len(ranked), 1)
        return Figures(
            self.policy.name,
            p50_ms=ranked[len(ranked) // 2],
            p95_ms=ranked[len(ranked) * 95 // 100],
            cost=self.cost / answered,
            failed=self.failed / self.world.calls,
            bad=self.bad / answered,
        )

    def _at(self, at_ms: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (at_ms, next(self.order), kind, what))

    def _birth(self, now_ms: float, *, age: float = 0.0) -> None:
        draw, name = self.births, f"s{next(self.names)}"
        kind = draw.choices([kind for kind, _ in KINDS], [share for _, share in KINDS])[0]
        token_ms, first_ms = draw.uniform(6, 30), draw.uniform(80, 500)
        # Quick ones ask more, with much spread; rubbish is cheap.
        level = 240 / token_ms**0.8 * draw.lognormvariate(0, 0.35)
        level *= {"liar": 0.5, "slow": 0.8, "flaky": 0.8}.get(kind, 1.0)
        slots = draw.choice((1, 2, 2, 4))
        listing = Listing(
            seller=name,
            place=Place.MARKET,
            model=MODEL,
            input_units=int(level * 40_000),
            output_units=int(level * 200_000),
            slots=slots,
            first_us=int(first_ms * MICROS),
            token_us=int(token_ms * MICROS),
        )
        worse = 5 if kind == "slow" else 1
        seller = Seller(
            name=name,
            kind=kind,
            listing=listing,
            first_ms=first_ms * worse,
            token_ms=token_ms * worse,
            distance_ms=draw.uniform(2, 120),
            bad_share=0.6 if kind == "liar" else 0.002,
            fail_share={"flaky": 0.3, "dead": 1.0}.get(kind, 0.005),
            leaves_ms=now_ms + draw.expovariate(1 / STAY_MS) * (1 - age / 2),
            slots=[0.0] * slots,
        )
        self.here[name] = seller
        self.policy.joined(seller, now_ms)
        self._at(seller.leaves_ms, "leaves", seller)

    def _leaves(self, now_ms: float, seller: Seller) -> None:
        del self.here[seller.name]
        self.policy.gone(seller)
        self._birth(now_ms)

    def _news(self, now_ms: float, _: None) -> None:
        sellers = list(self.here.values())
        for seller in sellers:
            seller.told = busy(seller)
        self.policy.news(sellers, now_ms)
        self._at(now_ms + NEWS_MS, "news", None)

    def _call(self, now_ms: float, call: Call) -> None:
        here = [seller for seller in self.here.values() if seller.name not in call.tried]
        seller = self.policy.pick(call, here, now_ms)
        call.tried.append(seller.name)
        seller.inside += 1
        # The same call meets the same luck at the same seller, whoever sent it there.
        luck = random.Random(f"{self.world.seed} {call.number} {seller.name}")
        begins_ms = max(now_ms + seller.distance_ms / 2, seller.slots[0])
        slow = luck.lognormvariate(0, TIME_SPREAD)
        reading_ms = call.size.input * 1.0 + seller.first_ms
        first_ms = begins_ms + reading_ms * slow + seller.distance_ms / 2
        done_ms = first_ms + call.size.output * seller.token_ms * slow
        fails = luck.random() < seller.fail_share
        bad, checked = luck.random() < seller.bad_share, luck.random() < CHECKED
        if fails:
            end_ms = now_ms + STALL_MS
            busy_ms = begins_ms + reading_ms
        elif done_ms > seller.leaves_ms:
            end_ms = max(seller.leaves_ms, now_ms) + STALL_MS
            busy_ms = done_ms
        else:
            end_ms = busy_ms = done_ms
        heapq.heapreplace(seller.slots, max(busy_ms, seller.slots[0]))
        good = not fails and done_ms <= seller.leaves_ms
        self._at(end_ms, "end", (call, seller, good, first_ms, now_ms, bad, checked))

    def _end(
        self, now_ms: float, what: tuple[Call, Seller, bool, float, float, bool, bool]
    ) -> None:
        call, seller, good, first_ms, sent_ms, bad, checked = what
        seller.inside -= 1
        self.policy.ended(
            call,
            seller,
            good=good,
            first_ms=first_ms - sent_ms,
            took_ms=now_ms - sent_ms,
            checked=not bad if checked else None,
            now_ms=now_ms,
        )
        if good:
            self.cost += price_of(seller, call.size)
        late = now_ms - call.at_ms > CALL_MAX_MS
        if good and not late:
            self.times.append(now_ms - call.at_ms)
            self.bad += bad
        elif late or len(call.tried) >= TRIES_MAX:
            self.failed += 1
        else:
            self._call(now_ms, call)
            return
        self.open -= 1


SETTINGS: Final = (100, 200, 400, 700, 1_200)
"""What a second is worth to the callers of one run of the router, in units."""


def contest(
    seed: int, *, sellers: int = 200, calls: int, rate_per_s: float = 20.0, buyers: int = 4
) -> list[Figures]:
    """Return what the six others and the router, by what time is worth, come to in one world."""
    world = World(seed, sellers=sellers, calls=calls, rate_per_s=rate_per_s, buyers=buyers)
    policies: list[Policy] = [kind(seed, buyers=buyers) for kind in BASELINES]
    policies += [
        Router(seed, buyers=buyers, second_units=units, name=f"coase {units}") for units in SETTINGS
    ]
    return [world.play(policy) for policy in policies]


def averaged(runs: list[list[Figures]]) -> list[Figures]:
    """Return the mean of several contests, policy by policy."""
    found = []
    for of_one in zip(*runs, strict=True):
        rows = [figures.row() for figures in of_one]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        found.append(Figures(of_one[0].name, *means))
    return found
