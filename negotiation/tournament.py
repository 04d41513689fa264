"""Strategies against each other: who gets what, how often they agree, and what they leave lying.

For choosing a strategy and for the documentation, which prints ``table(tournament())``. All
numbers are integers: utilities in millionths, 0 at one's own reservation, so a utility is also
the *advantage* (u - reservation) / (best - reservation) that negotiation contests score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isqrt
from typing import Final

from coase.protocol.states import Role

from .issues import BEYOND, FULL, Preferences, Proposal, Weights
from .strategy import (
    Accept,
    Counter,
    FixedPrice,
    Move,
    Reciprocating,
    Strategy,
    TimeDependent,
    Turn,
    View,
)

STEP_MS: Final = 20  # A message on a local network, handled.
SPAN_MS: Final = 60_000
GRID: Final = 12  # Values of each numeric issue in the search for the best deals.


@dataclass(frozen=True, slots=True)
class Played:
    """How one thread ended. Both utilities are 0 without an agreement."""

    agreed: Proposal | None
    proposals: int
    buyer_utility: int
    seller_utility: int
    history: tuple[Turn, ...]


def play(
    buyer: Strategy,
    seller: Strategy,
    *,
    step_ms: int = STEP_MS,
    span_ms: int = SPAN_MS,
    seed: int = 0,
) -> Played:
    """Let two strategies negotiate one thread, the seller first, as the protocol has it.

    A seller's yes is an offer that repeats the counter-offer, and the buyer accepts it or not.
    """
    history: list[Turn] = []
    now_ms = 0

    def view(role: Role) -> View:
        return View.of_thread(
            role, tuple(history), started_ms=0, deadline_ms=span_ms, now_ms=now_ms, seed=seed
        )

    history.append(Turn(Role.SELLER, seller.opening(view(Role.SELLER)), now_ms))
    role = Role.BUYER
    while True:
        now_ms += step_ms
        move: Move = (buyer if role is Role.BUYER else seller).reply(view(role))
        if isinstance(move, Accept) and role is Role.BUYER:
            return Played(
                move.proposal,
                len(history),
                buyer.utility(move.proposal),
                seller.utility(move.proposal),
                tuple(history),
            )
        if not isinstance(move, (Accept, Counter)):
            return Played(None, len(history), 0, 0, tuple(history))
        history.append(Turn(role, move.proposal, now_ms))
        role = Role.SELLER if role is Role.BUYER else Role.BUYER


@dataclass(frozen=True, slots=True)
class Scenario:
    """Two sides, and the values over which their best deals are searched."""

    name: str
    buyer: Preferences
    seller: Preferences
    prices: range
    seconds: range
    qualities: range
    verifications: tuple[str, ...] = ("schema",)

    def frontier(self) -> list[tuple[int, int]]:
        """Return the utilities (buyer, seller) of the deals that neither side can better alone.

        Searched on a grid, so that it is a little inside the true one. Empty if nothing suits
        both.
        """
        space = product(self.prices, self.seconds, self.qualities, self.verifications)
        pairs = set()
        for price, seconds, quality, verification in space:
            proposal = Proposal(
                price_units=price,
                deliver_within_s=seconds,
                quality=quality,
                verification=verification,
            )
            pair = self.buyer.utility(proposal), self.seller.utility(proposal)
            if BEYOND not in pair:
                pairs.add(pair)
        best: list[tuple[int, int]] = []
        for pair in sorted(pairs, reverse=True):  # Falling for the buyer: rising for the seller.
            if not best or pair[1] > best[-1][1]:
                best.append(pair)
        return best


def pareto_distance(pair: tuple[int, int], frontier: Sequence[tuple[int, int]]) -> int:
    """Return how far below the frontier a deal lies, in millionths; 0 on or beyond it."""
    if not any(b >= pair[0] and s >= pair[1] for b, s in frontier):
        return 0
    return min(isqrt((b - pair[0]) ** 2 + (s - pair[1]) ** 2) for b, s in frontier)


def nash_permille(pair: tuple[int, int], frontier: Sequence[tuple[int, int]]) -> int:
    """Return the product of both utilities, in permille of the best product on the frontier."""
    best = max((b * s for b, s in frontier), default=0)
    return pair[0] * pair[1] * 1_000 // best if best else 0


def _side(role: Role, **ranges: tuple[int, int]) -> Callable[[Weights], Preferences]:
    best_first = ("hash", "schema") if role is Role.BUYER else ("schema", "hash")

    def made(weights: Weights) -> Preferences:
        return Preferences(
            role,
            price_units=ranges["price"],
            deliver_within_s=ranges["seconds"],
            quality=ranges["quality"],
            verifications=best_first,
            weights=weights,
        )

    return made


def scenarios() -> list[Scenario]:
    """Return the standard scenarios: alike, complementary, narrow, and nothing in common."""
    wide = _side(Role.BUYER, price=(10_000, 40_000), seconds=(10, 90), quality=(95, 40))
    poor = _side(Role.BUYER, price=(10_000, 21_500), seconds=(10, 90), quality=(95, 40))
    broke = _side(Role.BUYER, price=(5_000, 15_000), seconds=(10, 90), quality=(95, 40))
    seller = _side(Role.SELLER, price=(50_000, 20_000), seconds=(120, 20), quality=(30, 90))
    price_first, quick = Weights(price=60, deliver=20), Weights(price=25, deliver=60, quality=10)
    sides = [
        ("alike", wide(price_first), seller(price_first)),
        ("complementary", wide(quick), seller(price_first)),
        ("narrow", poor(price_first), seller(price_first)),
        ("disjoint", broke(price_first), seller(price_first)),
    ]
    return [
        Scenario(
            name,
            buyer_side,
            seller_side,
            range(15_000, 40_001, 500),
            range(20, 91, 70 // GRID + 1),
            range(40, 91, 50 // GRID + 1),
            ("schema", "hash"),
        )
        for name, buyer_side, seller_side in sides
    ]


Maker = Callable[[Preferences], Strategy]


def strategies() -> dict[str, Maker]:
    """Return the strategies that the standard tournament plays, by name."""
    return {
        "fixed price": lambda own: FixedPrice(own, price_value=300_000),
        "Boulware e=0.2": lambda own: TimeDependent(own, e_permille=200),
        "linear e=1": lambda own: TimeDependent(own, e_permille=1_000),
        "conceder e=3": lambda own: TimeDependent(own, e_permille=3_000),
        "reciprocating": Reciprocating,
    }


@dataclass(frozen=True, slots=True)
class Row:
    """One buyer's strategy against one seller's over some scenarios; means over agreements."""

    buyer: str
    seller: str
    scenarios: int
    agreements: int
    buyer_utility: int
    seller_utility: int
    nash_permille: int
    pareto_distance: int
    proposals: int


def tournament(
    makers: Mapping[str, Maker] | None = None, played: Sequence[Scenario] | None = None
) -> list[Row]:
    """Play every strategy against every other and itself over the scenarios."""
    makers = strategies() if makers is None else makers
    played = scenarios() if played is None else played
    fronts = [scenario.frontier() for scenario in played]
    return [
        _row(buyer, seller, makers, played, fronts) for buyer, seller in product(makers, makers)
    ]


def _row(
    buyer: str,
    seller: str,
    makers: Mapping[str, Maker],
    played: Sequence[Scenario],
    fronts: Sequence[Sequence[tuple[int, int]]],
) -> Row:
    results = [play(makers[buyer](s.buyer), makers[seller](s.seller)) for s in played]
    ended = [(r, front) for r, front in zip(results, fronts, strict=True) if r.agreed is not None]
    pairs = [((r.buyer_utility, r.seller_utility), front) for r, front in ended]

    def mean(values: Sequence[int]) -> int:
        return sum(values) // len(values) if values else 0

    return Row(
        buyer,
        seller,
        len(results),
        len(ended),
        mean([pair[0] for pair, _ in pairs]),
        mean([pair[1] for pair, _ in pairs]),
        mean([nash_permille(pair, front) for pair, front in pairs]),
        mean([pareto_distance(pair, front) for pair, front in pairs]),
        mean([r.proposals for r, _ in ended]),
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table; utilities and distances in percent."""

    def percent(millionths: int) -> str:
        return f"{millionths * 100 // FULL} %"

    lines = [
        "| buyer | seller | agreed | buyer's utility | seller's utility | Nash product "
        "| from Pareto | proposals |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.buyer} | {row.seller} | {row.agreements}/{row.scenarios} "
        f"| {percent(row.buyer_utility)} | {percent(row.seller_utility)} "
        f"| {row.nash_permille // 10} % | {percent(row.pareto_distance)} | {row.proposals} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
