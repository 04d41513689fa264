"""Make or buy, and from whom: the decision itself, without clock, chance or network.

A ``RouteBook`` holds what is known of every way to get an answer: the engine here, the sellers of
one's own firm, the sellers of the market; and what was seen of each. ``decide`` ranks them for one
call by a single figure, the expected cost in money: price, plus time at what a second is worth to
the caller, plus what failures and bad answers cost on average::

    book = RouteBook()
    book.learn(Listing(seller="0x..", place=Place.MARKET, model="m", output_units=8), now_ms=0)
    decision = book.decide(Wish(models=("m",)), Size(input=200, output=100), now_ms=0, chance=7)

All amounts are whole: units of the asset, and inside *millionths* of a unit, because units for a
million tokens times tokens, and units for a second times microseconds, both come out in those.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from heapq import nsmallest
from typing import TYPE_CHECKING, Any, Final

from .ways import COOL_FIRST_MS, Listing, Place, Size, Way, mixed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

HERE: Final = "here"
"""The name of the engine of this machine among the sellers."""
MILLION: Final = 1_000_000
GROUPS_MAX: Final = 32  # Kinds of wishes that are kept sorted out; a new one costs a few ms.
REFRESHED: Final = 8  # Ways brought up to date with each decision, so that all are in turn.
SHORTLIST: Final = 16  # Ways weighed exactly and kept for the explanation.
WAYS_MAX: Final = 20_000  # About 20 MB; who was not heard of for longest goes first.
NEAR_PERMILLE: Final = 1_120
"""Ways within so much of the best are as good: which of them is taken is left to chance."""
EXPLORE_PERMILLE: Final = 30
"""So many calls in a thousand try somebody new who may be better than the best known."""
HEARD_MAX_MS: Final = 180_000  # Sellers are asked every half minute; who is silent so long, left.
TOO_SMALL: Final = "of too small a context"
COOLING: Final = "cooling down after a failure"
HEDGE_MIN_MS: Final = 250  # Before that a second request costs more than it saves.
HEDGE_DEVIATIONS: Final = 3
BAD_FACTOR: Final = 10
"""A bad answer costs so many times what a good one does, where the caller says nothing else."""
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a caller wants of the router, beyond the prompt itself."""

    models: tuple[str, ...] = ()
    """Tried in this order; with none, any model will do."""
    quantisations: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    """What a model must be able to do beside writing."""
    sellers: frozenset[str] = frozenset()
    """With any, nobody else; the engine here is called ``here``."""
    banned: frozenset[str] = frozenset()
    reach: Place = Place.MARKET
    """Who may see the prompt at all: this machine, the firm, or whoever sells."""
    most_units: int | None = None
    """The highest price of the call; with 0 nothing is bought."""
    deadline_ms: int = 0
    """From the call to the last token; 0 if there is none."""
    second_units: int = 0
    """What a second is worth."""
    bad_units: int = 0
    """What a bad answer costs; 0 takes ten times what a good one does."""

    def __post_init__(self) -> None:
        """Take any collection of names."""
        for name in ("quantisations", "regions", "needs", "sellers", "banned"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))

    def refusal(self, listing: Listing) -> str:
        """Return why a way must not be taken whatever it costs, or nothing if it may.

        These do not change with time, load or the size of a prompt.
        """
        if listing.place > self.reach:
            return "outside of the data policy"
        if listing.seller in self.banned:
            return "banned"
        if self.sellers and listing.seller not in self.sellers:
            return "not among the sellers allowed"
        if self.quantisations and listing.quantisation not in self.quantisations:
            return "another quantisation"
        if listing.abilities and not self.needs <= set(listing.abilities):
            return "not able to do what the prompt needs"
        if self.regions and listing.region not in self.regions and listing.place is not Place.HERE:
            return "another region"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way as it was weighed for one call."""

    seller: str
    place: Place
    model: str
    expected_ms: int
    first_ms: int
    price_units: int
    total_units: int
    """Price, time and failures together: what the ranking goes by."""
    failure_permille: int
    bad_permille: int
    ahead: int
    """Requests that are expected to run or wait there before this one."""
    seen: int
    """Answers on which the figures rest; with 0 they are what the seller says of itself."""
    why: str = ""

    def shown(self) -> dict[str, Any]:
        """Return it as JSON."""
        found = asdict(self)
        found["place"] = self.place.name.lower()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """In which order to try, and why."""

    ranking: tuple[Choice, ...]
    """The one to take first, then where to go if that fails; empty if there is no way."""
    asked: tuple[str, ...] = ()
    """Sellers that are as good as the first: whoever can ask for offers asks these."""
    hedge_after_ms: int = 0
    """When the first token is late enough for a second request; 0 if there is nobody else."""
    refused: Mapping[str, int] = field(default_factory=dict)
    """How many ways were passed over, by reason."""
    known: int = 0

    def why_none(self) -> str:
        """Return why there is no way, for people."""
        if not self.known:
            return "no engine here and no seller is known"
        reasons = [f"{count} {why}" for why, count in sorted(self.refused.items())]
        return f"of {self.known} known none can be taken: " + ", ".join(reasons)


class RouteBook:
    """Everything that is known of the ways to get an answer."""

    def __init__(self) -> None:
        self._ways: dict[tuple[str, str], Way] = {}
        self._by_seller: dict[str, dict[str, Way]] = {}
        self._cool: dict[str, int] = {}
        self._strikes: dict[str, int] = {}
        self._groups: dict[tuple[Any, ...], _Group] = {}
        self._turn: list[Way] = []
        self._version = 0

    def __len__(self) -> int:
        return len(self._ways)

    def __iter__(self) -> Iterator[Way]:
        return iter(self._ways.values())

    @property
    def version(self) -> int:
        """A number that is another one whenever ways came or went."""
        return self._version

    def models(self, seller: str) -> set[str]:
        """Return the names of the models that a seller is known to have."""
        return set(self._by_seller.get(seller, ()))

    def way(self, seller: str, model: str) -> Way | None:
        """Return what is known of one seller's model."""
        return self._ways.get((seller, model))

    # ---- Learning --------------------------------------------------------------------------------

    def learn(self, listing: Listing, *, now_ms: int) -> Way:
        """Take note of what a seller says of itself; what was seen of it stays."""
        key = (listing.seller, listing.model)
        way = self._ways.get(key)
        if way is None:
            if len(self._ways) >= WAYS_MAX:
                self._forget(min(self._ways.values(), key=lambda each: each.heard_ms))
            way = Way(listing)
            self._take(way)
        elif way.listing != listing:
            if not way.listing.alike(listing):
                self._groups.clear()
            way.listing = listing
        way.heard_ms = now_ms
        self._changed(way, now_ms)
        return way

    def drop(self, seller: str, model: str | None = None) -> None:
        """Forget a seller that is gone, or one model that it no longer has."""
        for way in self._of(seller):
            if model in (None, way.listing.model):
                self._forget(way)

    def loaded(self, seller: str, ahead: int, *, now_ms: int) -> None:
        """Take note of how many requests run or wait at a seller."""
        for way in self._of(seller):
            way.loaded(ahead, now_ms=now_ms)
            self._changed(way, now_ms)

    def measured(self, seller: str, distance_us: int, *, now_ms: int) -> None:
        """Take note of a round trip to a seller."""
        for way in self._of(seller):
            way.distance_us = mixed(way.distance_us, distance_us)
            self._changed(way, now_ms)

    def offered(self, seller: str, model: str, units: int, size: Size, *, now_ms: int) -> None:
        """Take note of what a seller asked for a prompt of that size."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.offered(units, size)
            way.heard_ms = now_ms
            self._changed(way, now_ms)

    def began(self, seller: str, model: str, *, now_ms: int) -> None:
        """Take note that a call of ours goes there now."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.inside += 1
            self._changed(way, now_ms)

    def left(self, seller: str, model: str, *, now_ms: int) -> None:
        """Take note that a call of ours is no longer there, whatever came of it."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.inside = max(way.inside - 1, 0)
            self._changed(way, now_ms)

    def delivered(
        self, seller: str, model: str, size: Size, *, first_us: int, took_us: int, now_ms: int
    ) -> None:
        """Take note of an answer: when its first token came, and its last."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.delivered(size, first_us=first_us, took_us=took_us, now_ms=now_ms)
            self._strikes.pop(seller, None)
            self._cool.pop(seller, None)
            self._changed(way, now_ms)

    def failed(self, seller: str, model: str, *, lost_us: int, now_ms: int) -> None:
        """Take note that nothing came, after so long; the seller is left alone for a while.

        Each time in a row that lasts twice as long.
        """
        self.silent(seller, now_ms=now_ms)
        way = self._ways.get((seller, model))
        if way is not None:
            way.failed(lost_us=lost_us, now_ms=now_ms)
            self._changed(way, now_ms)

    def silent(self, seller: str, *, now_ms: int) -> None:
        """Take note that a seller did not answer when it was asked for an offer.

        It is left alone for a while, but no call of ours failed by it.
        """
        strikes = self._strikes.get(seller, 0)
        self._strikes[seller] = strikes + 1
        self._cool[seller] = now_ms + (COOL_FIRST_MS << min(strikes, 6))

    def late(self, seller: str, model: str, waited_us: int, *, now_ms: int) -> None:
        """Take note that the first token did not come for so long; another one was quicker."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.late(waited_us)
            self._changed(way, now_ms)

    def checked(self, seller: str, model: str, *, good: bool, now_ms: int) -> None:
        """Take note that an answer was checked; bad is one that counts too much, too."""
        way = self._ways.get((seller, model))
        if way is not None:
            way.checked(good=good, now_ms=now_ms)
            self._changed(way, now_ms)

    def cools_until_ms(self, seller: str) -> int:
        """Return until when a seller is left alone; 0 if it is not."""
        return self._cool.get(seller, 0)

    # ---- Deciding --------------------------------------------------------------------------------

    def decide(self, wish: Wish, size: Size, *, now_ms: int, chance: int) -> Decision:
        """Return in which order to try for one call; ``chance`` is any number up to 2**64.

        The same book, wish, size, time and chance give the same decision.
        """
        self._refresh(now_ms)
        ranking: list[Choice] = []
        cooling: list[_Found] = []
        refused: dict[str, int] = {}
        for model in wish.models or ("",):
            group = self._group(wish, model, now_ms)
            for why, count in group.refused.items():
                refused[why] = refused.get(why, 0) + count
            good, cool = self._rank(group, wish, size, refused, now_ms)
            cooling += cool
            if good:
                first = "the next model of the wish" if ranking else ""
                ranking += _drawn(good, chance, first)
        if not ranking and cooling:  # Better somebody who failed just now than nobody.
            ranking = _drawn(cooling[:1], 0, f"{COOLING}, and there is nobody else")
        asked, hedge_after_ms = _company(ranking)
        return Decision(
            ranking=tuple(ranking),
            asked=asked,
            hedge_after_ms=hedge_after_ms,
            refused=refused,
            known=len(self._ways),
        )

    def _rank(
        self, group: _Group, wish: Wish, size: Size, refused: dict[str, int], now_ms: int
    ) -> tuple[list[_Found], list[_Found]]:
        """Return the best ways of one group in their order, and those that cool down."""
        i, o = size.input + size.cached, size.output
        scores = [a + b * i + c * o for a, b, c in group.lines]
        ways = group.ways
        found: list[_Found] = []
        cooling: list[_Found] = []
        taken, width = 0, SHORTLIST
        while taken < len(scores) and len(found) < SHORTLIST // 2:
            # Nearly always the first few will do; where all are refused, all were looked at.
            width = width if taken == 0 else len(scores)
            for _, at in nsmallest(width, zip(scores, range(len(scores)), strict=True))[taken:]:
                choice, score, why = self._weigh(ways[at], wish, size, now_ms)
                if choice is None or why:
                    refused[why] = refused.get(why, 0) + 1
                if choice is not None:
                    (cooling if why else found).append((score, choice))
            taken = width
        for rows in (found, cooling):
            rows.sort(key=lambda each: (each[0], each[1].expected_ms, each[1].seller))
            del rows[SHORTLIST:]
        return found, cooling

    def _weigh(
        self, way: Way, wish: Wish, size: Size, now_ms: int
    ) -> tuple[Choice | None, int, str]:
        """Return a way as it stands now, and why it should not be taken; None if it must not."""
        listing = way.listing
        if listing.place is not Place.HERE and way.heard_ms < now_ms - HEARD_MAX_MS:
            return None, 0, "not heard of lately"
        if 0 < listing.context_tokens < size.input:
            return None, 0, TOO_SMALL
        ahead = way.ahead(now_ms)
        first_us, took_us = way.expected_us(size, ahead=ahead)
        if wish.deadline_ms and took_us > wish.deadline_ms * 1_000:
            return None, 0, "expected too late"
        price = way.price_millionths(size)
        units = -(-price // MILLION)
        if wish.most_units is not None and way.most_millionths(size) > wish.most_units * MILLION:
            return None, 0, "too dear"
        factor, beside = _risk(way, wish, now_ms)
        score = (price + wish.second_units * took_us) * factor // MILLION + beside
        choice = Choice(
            seller=listing.seller,
            place=listing.place,
            model=listing.model,
            expected_ms=took_us // 1_000,
            first_ms=first_us // 1_000,
            price_units=units,
            total_units=-(-score // MILLION),
            failure_permille=way.failure_ppm(now_ms) // 1_000,
            bad_permille=way.bad_ppm(now_ms) // 1_000,
            ahead=ahead,
            seen=way.seen,
        )
        return choice, score, COOLING if self._cool.get(listing.seller, 0) > now_ms else ""

    # ---- Keeping what is sorted out up to date ------------------------------------------------

    def _group(self, wish: Wish, model: str, now_ms: int) -> _Group:
        places = wish.sellers, wish.banned, wish.reach
        shape = (wish.quantisations, wish.regions, wish.needs, *places)
        key = (model, shape, wish.second_units, wish.bad_units)
        group = self._groups.pop(key, None)
        if group is None:
            group = _Group(wish, model, self._ways.values(), now_ms)
            if len(self._groups) >= GROUPS_MAX:
                del self._groups[next(iter(self._groups))]
        self._groups[key] = group
        return group

    def _changed(self, way: Way, now_ms: int) -> None:
        for group in self._groups.values():
            group.update(way, now_ms)

    def _refresh(self, now_ms: int) -> None:
        """Bring the next few ways up to date: queues empty and failures fade without news."""
        if not self._turn:
            self._turn = list(self._ways.values())
        for way in self._turn[-REFRESHED:]:
            self._changed(way, now_ms)
        del self._turn[-REFRESHED:]

    def _take(self, way: Way) -> None:
        seller, model = way.listing.seller, way.listing.model
        self._ways[(seller, model)] = way
        self._by_seller.setdefault(seller, {})[model] = way
        self._groups.clear()
        self._version += 1

    def _forget(self, way: Way) -> None:
        seller, model = way.listing.seller, way.listing.model
        self._ways.pop((seller, model), None)
        held = self._by_seller.get(seller, {})
        held.pop(model, None)
        if not held:
            self._by_seller.pop(seller, None)
        self._version += 1
        self._groups.clear()
        self._turn.clear()

    def _of(self, seller: str) -> list[Way]:
        return list(self._by_seller.get(seller, {}).values())

    # ---- Keeping over a restart ---------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Return all that is worth keeping, as JSON."""
        return {
            "ways": [way.saved() for way in self._ways.values()],
            "cool": dict(self._cool),
            "strikes": dict(self._strikes),
        }

    def restore(self, document: Mapping[str, Any], *, now_ms: int) -> int:
        """Take in what was saved and return how many ways that were; what cannot be read is left.

        Nothing is inside and nothing is queued: that was another life of this process.
        """
        count = 0
        for row in _rows(document.get("ways")):
            way = Way.restored(row)
            if way is not None and way.heard_ms <= now_ms:
                self._take(way)
                count += 1
        for name, target in (("cool", self._cool), ("strikes", self._strikes)):
            held = document.get(name)
            for seller, number in held.items() if isinstance(held, dict) else ():
                if isinstance(seller, str) and isinstance(number, int) and number >= 0:
                    target[seller] = number
        return count


class _Group:
    """The ways that one kind of wish allows, each as a line: its cost by tokens in and out."""

    __slots__ = ("_at", "_wish", "lines", "refused", "ways")

    def __init__(self, wish: Wish, model: str, ways: Iterable[Way], now_ms: int) -> None:
        self._wish = wish
        self.ways: list[Way] = []
        self.refused: dict[str, int] = {}
        for way in ways:
            why = wish.refusal(way.listing)
            if not why and model and way.listing.model != model:
                why = "another model"
            if why:
                self.refused[why] = self.refused.get(why, 0) + 1
            else:
                self.ways.append(way)
        self.lines = [self._line(way, now_ms) for way in self.ways]
        self._at = {id(way): at for at, way in enumerate(self.ways)}

    def update(self, way: Way, now_ms: int) -> None:
        """Take in what changed of a way."""
        at = self._at.get(id(way))
        if at is not None:
            self.lines[at] = self._line(way, now_ms)

    def _line(self, way: Way, now_ms: int) -> tuple[int, int, int]:
        """Return the cost in millionths: at once, for each token read, for each written.

        Linear in both, so that the whole list is weighed by two multiplications each.
        """
        wish = self._wish
        factor, beside = _risk(way, wish, now_ms)
        (p0, pi, po), (t0, ti, to) = way.price_line(), way.time_line(now_ms)
        second = wish.second_units
        return (
            (p0 + second * t0) * factor // MILLION + beside,
            (pi + second * ti) * factor // MILLION,
            (po + second * to) * factor // MILLION,
        )


def _risk(way: Way, wish: Wish, now_ms: int) -> tuple[int, int]:
    """Return by what the cost of an answer is multiplied, in millionths, and what is added.

    Who fails with chance p has to be replaced p / (1 - p) times on average: the time until it was
    noticed is lost, and the answer is made again. A bad answer costs what the caller says.
    """
    fails, bads = way.failure_ppm(now_ms), way.bad_ppm(now_ms)
    odds = fails * MILLION // (MILLION - fails)
    beside = wish.second_units * way.lost_us * odds // MILLION
    if wish.bad_units:
        return MILLION + odds, beside + wish.bad_units * bads
    return MILLION + odds + BAD_FACTOR * bads, beside


_Found = tuple[int, Choice]


def _drawn(found: list[_Found], chance: int, why: str = "") -> list[Choice]:
    """Return the choices in the order in which to try them.

    Two are drawn among those as good as the best, and the better one goes first: buyers that all
    know the same would otherwise all go to the same one. Now and then somebody new goes first.
    """
    best, first = found[0]
    near = [at for at, (score, _) in enumerate(found) if score * 1_000 <= best * NEAR_PERMILLE]
    at, why = 0, why or "the least expected cost"
    draws = _draws(chance)
    if first.place is not Place.HERE and len(near) > 1:
        # The engine here has no herds: nobody else sends there.
        pair = near[next(draws) % len(near)], near[next(draws) % len(near)]
        at = min(pair)
        if at:
            why = f"drawn among {len(near)} within {NEAR_PERMILLE - 1_000} permille of the best"
    new = [n for n, (_, choice) in enumerate(found) if not choice.seen and n != at]
    if new and found[at][1].seen and next(draws) % 1_000 < EXPLORE_PERMILLE:
        at, why = new[next(draws) % len(new)], "tried out: nobody knows it yet"
    order = [at, *(n for n in range(len(found)) if n != at)]
    chosen = found[at][1]
    return [
        replace(found[n][1], why=why if n == at else _beside(found[n][1], chosen)) for n in order
    ]


def _draws(chance: int) -> Iterator[int]:
    """Yield numbers out of one, each as good as drawn for itself (splitmix64)."""
    state = chance & _MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        yield z ^ (z >> 31)


def _beside(choice: Choice, chosen: Choice) -> str:
    """Return why a way is not the first."""
    words = []
    if choice.price_units > chosen.price_units:
        words.append("dearer")
    if choice.expected_ms > chosen.expected_ms:
        words.append("slower")
    if choice.failure_permille > chosen.failure_permille:
        words.append("fails more often")
    if choice.bad_permille > chosen.bad_permille:
        words.append("worse answers")
    if choice.total_units < chosen.total_units:
        return "as good"
    return ", ".join(words) or "as good"


def _company(ranking: list[Choice]) -> tuple[tuple[str, ...], int]:
    """Return whom else to ask with the first, and when its first token is late."""
    if not ranking:
        return (), 0
    first = ranking[0]
    limit = first.total_units * NEAR_PERMILLE
    asked = [first.seller]
    if first.place is not Place.HERE:
        asked += [
            each.seller
            for each in ranking[1:]
            if each.place is first.place
            and each.model == first.model
            and each.total_units * 1_000 <= limit
        ]
    late_ms = 0
    if len(ranking) > 1:
        late_ms = max(HEDGE_MIN_MS, HEDGE_DEVIATIONS * first.first_ms)
    return tuple(asked), late_ms


def _rows(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
