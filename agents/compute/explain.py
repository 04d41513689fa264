"""Why an answer came from where it came: kept with the answer, and readable afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.types import units_to_text

from .ways import Place

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .routing import Choice, Wish

OTHERS_MAX: Final = 8  # Ways beside the chosen one that are kept with each answer.


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way that was gone, and how far it led."""

    seller: str
    place: Place
    model: str
    outcome: str
    """``answered`` or ``failed``; ``too late`` where another was quicker."""
    why: str = ""
    deal: str = ""
    first_ms: int | None = None
    took_ms: int = 0
    price_units: int = 0
    """What was agreed at most."""
    paid_units: int | None = 0
    """What it cost in the end; None while that is open."""

    def shown(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "seller": self.seller,
            "place": self.place.name.lower(),
            "model": self.model,
            "outcome": self.outcome,
            "why": self.why,
            "deal": self.deal,
            "first_ms": self.first_ms,
            "took_ms": self.took_ms,
            "price_units": str(self.price_units),
            "paid_units": None if self.paid_units is None else str(self.paid_units),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What was weighed for one call, what was done, and what it cost."""

    call: str
    at_ms: int
    models: tuple[str, ...] = ()
    """What was asked for, in that order; nothing where any would do."""
    input_tokens: int = 0
    output_tokens: int = 0
    """As expected before the call."""
    wish: Mapping[str, Any] = field(default_factory=dict)
    ranking: tuple[Choice, ...] = ()
    """What was on offer, the one to take first at the head."""
    more: int = 0
    """How many more were on offer that are not listed."""
    refused: Mapping[str, int] = field(default_factory=dict)
    known: int = 0
    attempts: tuple[Attempt, ...] = ()
    outcome: str = "under way"
    first_ms: int | None = None
    took_ms: int = 0
    symbol: str = ""
    decimals: int = 0

    @property
    def paid_units(self) -> int:
        """What it cost as far as that is known."""
        return sum(attempt.paid_units or 0 for attempt in self.attempts)

    @property
    def open_units(self) -> int:
        """What it may cost on top, by deals that are not over."""
        return sum(a.price_units for a in self.attempts if a.paid_units is None)

    def amount(self, units: int) -> str:
        """Return an amount for people."""
        return f"{units_to_text(units, self.decimals)} {self.symbol}" if self.symbol else "nothing"

    def shown(self) -> dict[str, Any]:
        """Return it as JSON; amounts are decimal text, since JSON's numbers lose units."""
        return {
            "call": self.call,
            "at_ms": self.at_ms,
            "models": list(self.models),
            "expected": {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens},
            "wish": dict(self.wish),
            "ranking": [self._choice(choice) for choice in self.ranking],
            "more": self.more,
            "refused": dict(self.refused),
            "known": self.known,
            "attempts": [attempt.shown() for attempt in self.attempts],
            "outcome": self.outcome,
            "first_ms": self.first_ms,
            "took_ms": self.took_ms,
            "paid": self.amount(self.paid_units),
            "paid_units": str(self.paid_units),
            "open": self.amount(self.open_units) if self.open_units else "",
            "open_units": str(self.open_units),
        }

    def brief(self) -> dict[str, Any]:
        """Return what goes with an answer: why this one, what else there was, what it cost."""
        found: dict[str, Any] = {
            "call": self.call,
            "why": self.ranking[0].why if self.ranking else "",
            "others": [self._choice(choice) for choice in self.ranking[1:4]],
            "refused": dict(self.refused),
            "outcome": self.outcome,
        }
        if self.outcome != "under way":
            found["attempts"] = [attempt.shown() for attempt in self.attempts]
            found["took_ms"] = self.took_ms
            found["paid"] = self.amount(self.paid_units)
        return found

    def _choice(self, choice: Choice) -> dict[str, Any]:
        shown = choice.shown()
        for name in ("price_units", "total_units"):
            shown[name] = str(shown[name])
        return shown


def wish_shown(wish: Wish) -> dict[str, Any]:
    """Return what of a wish was said, as JSON."""
    found: dict[str, Any] = {"reach": wish.reach.name.lower()}
    for name in ("quantisations", "regions", "sellers", "banned"):
        held: frozenset[str] = getattr(wish, name)
        if held:
            found[name] = sorted(held)
    if wish.most_units is not None:
        found["most_units"] = str(wish.most_units)
    if wish.deadline_ms:
        found["deadline_ms"] = wish.deadline_ms
    if wish.second_units:
        found["second_units"] = str(wish.second_units)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """A deal of a call as it stands in the books."""

    seller: str
    model: str
    price_units: int
    units: int | None
    """What it cost; None while it is open."""
    symbol: str
    decimals: int


def settled(document: Mapping[str, Any], deals: Mapping[str, Paid]) -> dict[str, Any]:
    """Return what ``shown`` gave, with what the deals of that call cost by now.

    A deal that goes its way after its reader left is told, too.
    """
    found = dict(document)
    if not deals:
        return found
    attempts = [dict(attempt) for attempt in document["attempts"]]
    for attempt in attempts:
        deal = deals.get(attempt["deal"])
        if deal is not None and deal.units is not None:
            attempt["paid_units"] = str(deal.units)
    known = {attempt["deal"] for attempt in attempts}
    attempts += [_left_behind(name, deals[name]) for name in sorted(deals.keys() - known)]
    units = sum(int(attempt["paid_units"] or 0) for attempt in attempts)
    open_units = sum(int(a["price_units"]) for a in attempts if a["paid_units"] is None)
    asset = next(iter(deals.values()))

    def amount(units: int) -> str:
        return f"{units_to_text(units, asset.decimals)} {asset.symbol}"

    return found | {
        "attempts": attempts,
        "paid": amount(units),
        "paid_units": str(units),
        "open": amount(open_units) if open_units else "",
        "open_units": str(open_units),
    }


def _left_behind(name: str, deal: Paid) -> dict[str, Any]:
    """Return a deal of which nothing was known yet when its call was over."""
    return Attempt(
        seller=deal.seller,
        place=Place.MARKET,
        model=deal.model,
        outcome="broken off",
        deal=name,
        price_units=deal.price_units,
        paid_units=deal.units,
    ).shown()


def told(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines by which a person reads what ``shown`` gave."""
    expected = document["expected"]
    models = ", else ".join(document["models"]) or "any model"
    yield (
        f"call {document['call']}: {models}, about {expected['input_tokens']} tokens in and"
        f" {expected['output_tokens']} out"
    )
    first, open_ = document["first_ms"], document.get("open", "")
    yield (
        f"  {document['outcome']} after {_seconds(document['took_ms'])}"
        + (f", the first token after {_seconds(first)}" if first is not None else "")
        + f"; it cost {document['paid']}"
        + (f", and at most {open_} more, which is not settled" if open_ else "")
    )
    for at, attempt in enumerate(document["attempts"], 1):
        why = f" ({attempt['why']})" if attempt["why"] else ""
        yield f"  {at}. {_who(attempt)}: {attempt['outcome']}{why}"
    ranking = document["ranking"]
    if ranking:
        yield f"  taken first: {_who(ranking[0])}, {ranking[0]['why']}: {_figures(ranking[0])}"
    for choice in ranking[1:]:
        yield f"    beside it: {_who(choice)}, {choice['why']}: {_figures(choice)}"
    if document["more"]:
        yield f"    and {document['more']} more"
    for why, count in sorted(document["refused"].items()):
        yield f"    not taken: {count} {why}"


def _who(row: Mapping[str, Any]) -> str:
    who = "the engine here" if row["place"] == "here" else row["seller"]
    return f"{who} with {row['model']}" if row["model"] else str(who)


def _figures(choice: Mapping[str, Any]) -> str:
    rests = f"{choice['seen']} answers seen" if choice["seen"] else "by what it says of itself"
    return (
        f"expected {_seconds(choice['expected_ms'])} and {choice['price_units']} units,"
        f" {choice['total_units']} with time and failures; {rests}"
    )


def _seconds(ms: int) -> str:
    return f"{ms} ms" if ms < 1_000 else f"{ms / 1_000:.1f} s"
