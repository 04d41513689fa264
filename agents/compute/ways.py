"""One way to get an answer: what its seller says of itself, and what was seen of it.

Whole numbers throughout: microseconds, units of the asset, and millionths of a unit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Final

MILLION: Final = 1_000_000
COOL_FIRST_MS: Final = 5_000  # After a failure; doubled for each one in a row, to five minutes.
LOST_GUESS_US: Final = 5_000_000  # Until a failure is noticed, where none was seen.
# A stranger counts as failing once in twenty, and as giving a bad answer as often.
PRIOR_FAILURE_PPM: Final = 50_000
PRIOR_BAD_PPM: Final = 120_000
PRIOR_WEIGHT: Final = 3 * MILLION  # As much as so many answers, in millionths.
FAILURE_MAX_PPM: Final = 950_000  # The cost divides by what is left.
HALF_LIFE_MS: Final = 30 * 60 * 1_000  # A restart or a new model mends most failures by then.
LOAD_HALF_LIFE_MS: Final = 4_000  # Queues empty about that fast; older news says little.
DISTANCE_GUESS_US: Final = 20_000
FIRST_GUESS_US: Final = 300_000
READ_GUESS_US: Final = 1_000
TOKEN_GUESS_US: Final = 30_000
DOUBT_PERMILLE: Final = 1_250  # What a seller says of its own speed is taken to be so much better.
PERMILLE: Final = 1_000


class Place(IntEnum):
    """Where an answer is made, by who gets to see the prompt."""

    HERE = 0
    FIRM = 1
    MARKET = 2


@dataclass(frozen=True, slots=True)
class Size:
    """How many tokens a call reads and writes, as far as is known before it."""

    input: int
    output: int
    cached: int = 0
    """Read from an earlier call that the seller still knows."""
    output_max: int = 0
    """The most that may be written, which is what a price is agreed for; 0 if as expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What is known of a way without having tried it. Rates are units for a million tokens."""

    seller: str
    place: Place
    model: str
    quantisation: str = ""
    context_tokens: int = 0
    """What one call may take; 0 if that is not told."""
    abilities: tuple[str, ...] = ()
    """What it can do beside writing, such as ``tools``; nothing if that is not told."""
    region: str = ""
    fixed_units: int = 0
    input_units: int = 0
    cached_units: int = 0
    output_units: int = 0
    second_units: int = 0
    """For each second of work."""
    slots: int = 4
    """How many are served at once."""
    first_us: int = 0
    """Until the first token, as the seller says; 0 if it does not."""
    token_us: int = 0
    """For each token written, as the seller says; 0 if it does not."""
    read_us: int = 0

    def alike(self, other: Listing) -> bool:
        """Return whether all that wishes can exclude by is the same."""
        return (self.place, self.quantisation, self.region, self.abilities) == (
            other.place,
            other.quantisation,
            other.region,
            other.abilities,
        )


@dataclass(slots=True)
class Way:
    """A listing, and what was seen of it."""

    listing: Listing
    seen: int = 0
    first_us: int = 0
    """Until the first token, without queue and reading; 0 if none was seen."""
    token_us: int = 0
    deviation_us: int = 0
    """How far the first token is off that, on average."""
    distance_us: int = 0
    lost_us: int = LOST_GUESS_US
    good: int = 0
    """Weights in millionths, as of ``at_ms``."""
    failures: int = 0
    checks: int = 0
    """Answers that were checked: only those say how many are bad."""
    bads: int = 0
    at_ms: int = 0
    heard_ms: int = 0
    asked_permille: int = PERMILLE
    """What is asked, beside what the listing says."""
    spread_permille: int = 0
    inside: int = field(default=0, compare=False)
    _load: int = 0
    _load_ms: int = 0

    # ---- Time ------------------------------------------------------------------------------------

    def ahead(self, now_ms: int) -> int:
        """Return how many requests are expected to run or wait there."""
        age_ms = max(now_ms - self._load_ms, 0)
        halves = age_ms // LOAD_HALF_LIFE_MS
        left = (self._load >> halves) if halves < 32 else 0
        # News includes what we have there ourselves, as far as it is not older than that.
        return max(left, self.inside)

    def wait_us(self, ahead: int, service_us: int) -> int:
        """Return how long it takes until it is our turn."""
        slots = max(self.listing.slots, 1)
        behind = ahead + 1 - slots
        return behind * service_us // slots if behind > 0 else 0

    def pace(self) -> tuple[int, int, int]:
        """Return microseconds until the first token, for each token read, and each written."""
        listing = self.listing
        said = listing.place is Place.HERE
        doubt = PERMILLE if said else DOUBT_PERMILLE
        first_us = self.first_us or (listing.first_us or FIRST_GUESS_US) * doubt // PERMILLE
        token_us = self.token_us or (listing.token_us or TOKEN_GUESS_US) * doubt // PERMILLE
        return first_us, listing.read_us or READ_GUESS_US, token_us

    def expected_us(self, size: Size, *, ahead: int) -> tuple[int, int]:
        """Return when the first and the last token are expected."""
        first_us, read_us, token_us = self.pace()
        own_us = first_us + size.input * read_us
        wait_us = self.wait_us(ahead, own_us + size.output * token_us)
        first = self._distance() + self.deviation_us + wait_us + own_us
        return first, first + size.output * token_us

    def time_line(self, now_ms: int) -> tuple[int, int, int]:
        """Return the expected microseconds: at once, for each token read, for each written."""
        first_us, read_us, token_us = self.pace()
        slots = max(self.listing.slots, 1)
        behind = max(self.ahead(now_ms) + 1 - slots, 0)
        # The queue is taken to be of requests like this one, as in ``expected_us``.
        turns = PERMILLE + behind * PERMILLE // slots
        start = self._distance() + self.deviation_us
        return (
            start + first_us * turns // PERMILLE,
            read_us * turns // PERMILLE,
            token_us * turns // PERMILLE,
        )

    def _distance(self) -> int:
        if self.listing.place is Place.HERE:
            return 0
        return self.distance_us or DISTANCE_GUESS_US

    # ---- Money -----------------------------------------------------------------------------------

    def price_line(self) -> tuple[int, int, int]:
        """Return the expected price in millionths: at once, per token read, per token written."""
        listing = self.listing
        asked = self.asked_permille + self.spread_permille
        second = listing.second_units
        first_us, read_us, token_us = self.pace()
        return (
            (listing.fixed_units * MILLION + second * first_us) * asked // PERMILLE,
            (listing.input_units + second * read_us) * asked // PERMILLE,
            (listing.output_units + second * token_us) * asked // PERMILLE,
        )

    def price_millionths(self, size: Size) -> int:
        """Return the expected price of a call, what is cached at its own rate."""
        at_once, per_in, per_out = self.price_line()
        asked = self.asked_permille + self.spread_permille
        cached = self.listing.cached_units * asked // PERMILLE
        return at_once + per_in * size.input + cached * size.cached + per_out * size.output

    def most_millionths(self, size: Size) -> int:
        """Return what may have to be agreed for a call, as far as it is known."""
        longer = max(size.output_max - size.output, 0)
        return self.price_millionths(size) + self.price_line()[2] * longer

    # ---- Trust -----------------------------------------------------------------------------------

    def failure_ppm(self, now_ms: int) -> int:
        """Return how often it fails, in millionths, as far as that is known."""
        good, failures, _, _ = self._weights(now_ms)
        weight = good + failures + PRIOR_WEIGHT
        failing = failures * MILLION + PRIOR_WEIGHT * self._prior(PRIOR_FAILURE_PPM)
        return min(failing // weight, FAILURE_MAX_PPM)

    def bad_ppm(self, now_ms: int) -> int:
        """Return how often its answers are bad, in millionths, as far as that is known."""
        _, _, checks, bads = self._weights(now_ms)
        weight = checks + PRIOR_WEIGHT
        return min((bads * MILLION + PRIOR_WEIGHT * self._prior(PRIOR_BAD_PPM)) // weight, MILLION)

    def _prior(self, ppm: int) -> int:
        """Return what is believed of a stranger; those of the firm and we ourselves are none."""
        return ppm if self.listing.place is Place.MARKET else ppm // 10

    def _weights(self, now_ms: int) -> tuple[int, int, int, int]:
        weights = self.good, self.failures, self.checks, self.bads
        age_ms = max(now_ms - self.at_ms, 0)
        if not age_ms:
            return weights
        left = _left_permille(age_ms)
        good, failures, checks, bads = (weight * left // PERMILLE for weight in weights)
        return good, failures, checks, bads

    def _age(self, now_ms: int) -> None:
        self.good, self.failures, self.checks, self.bads = self._weights(now_ms)
        self.at_ms = max(now_ms, self.at_ms)

    # ---- Learning --------------------------------------------------------------------------------

    def loaded(self, ahead: int, *, now_ms: int) -> None:
        """Take note of how many requests run or wait there."""
        self._load, self._load_ms = max(ahead, 0), now_ms

    def offered(self, units: int, size: Size) -> None:
        """Take note of what was asked for a prompt of that size."""
        listing = self.listing
        listed = listing.fixed_units * MILLION
        listed += listing.input_units * size.input + listing.cached_units * size.cached
        listed += listing.output_units * size.output
        if listed <= 0 or listing.second_units:
            return
        now = min(units * MILLION * PERMILLE // listed, 100 * PERMILLE)
        off = abs(now - self.asked_permille)
        self.spread_permille = (3 * self.spread_permille + off) // 4
        self.asked_permille = (3 * self.asked_permille + now) // 4

    def delivered(self, size: Size, *, first_us: int, took_us: int, now_ms: int) -> None:
        """Take note of an answer that came; the size is what it turned out to be."""
        self._age(now_ms)
        self.good += MILLION
        read_us = self.listing.read_us or READ_GUESS_US
        own_us = max(first_us - size.input * read_us - self._distance(), 1)
        if self.seen:
            off = abs(own_us - self.first_us)
            self.deviation_us = (3 * self.deviation_us + off) // 4
        self.first_us = mixed(self.first_us, own_us)
        if size.output > 1:
            self.token_us = mixed(self.token_us, max(took_us - first_us, 0) // (size.output - 1))
        self.seen += 1

    def late(self, waited_us: int) -> None:
        """Take note that the first token takes longer than that."""
        self.first_us = max(mixed(self.first_us, waited_us), self.first_us)

    def failed(self, *, lost_us: int, now_ms: int) -> None:
        """Take note that nothing came, after so long."""
        self._age(now_ms)
        self.failures += MILLION
        self.lost_us = mixed(self.lost_us, max(lost_us, 0))

    def checked(self, *, good: bool, now_ms: int) -> None:
        """Take note that an answer was checked."""
        self._age(now_ms)
        self.checks += MILLION
        if not good:
            self.bads += MILLION

    # ---- Keeping ---------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """Return it as JSON, without what is under way."""
        found = asdict(self)
        for name in ("inside", "_load", "_load_ms"):
            del found[name]
        return found

    @classmethod
    def restored(cls, row: dict[str, Any]) -> Way | None:
        """Return what ``saved`` gave, or None if that cannot be read."""
        try:
            held = dict(row.pop("listing"))
            held["abilities"] = tuple(held["abilities"])
            listing = Listing(**{**held, "place": Place(held["place"])})
            way = cls(listing, **row)
        except (KeyError, TypeError, ValueError):
            return None
        numbers = (getattr(way, name) for name in row)
        return way if all(type(each) is int and each >= 0 for each in numbers) else None


def mixed(old: int, new: int) -> int:
    """Return the average that goes with the news; the first of it counts alone."""
    return (3 * old + new) // 4 if old else new


def _left_permille(age_ms: int) -> int:
    halves, rest_ms = divmod(age_ms, HALF_LIFE_MS)
    if halves > 10:
        return 0
    whole = PERMILLE >> halves
    return whole - whole * rest_ms // (2 * HALF_LIFE_MS)
