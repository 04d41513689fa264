"""Random sides of a negotiation, and proposals that a hostile counterparty might make."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from coase.negotiation.issues import Preferences, Proposal, Weights
from coase.negotiation.strategy import (
    Conceding,
    FixedPrice,
    Reciprocating,
    Strategy,
    TimeDependent,
    Turn,
    View,
)
from coase.protocol.messages import SETTLEMENTS, VERIFICATIONS
from coase.protocol.states import Role

PRICE_MAX = 10**24  # A million whole tokens of eighteen decimals.
ARBITERS = ("0x" + "0" * 40, "0x" + "a1" * 20, "0x" + "b2" * 20)


@dataclass(frozen=True)
class Ends:
    """What a test knows of a side and nobody else may: (aspiration, reservation) of each issue."""

    role: Role
    price: tuple[int, int]
    deliver: tuple[int, int]
    quality: tuple[int, int]
    verifications: tuple[str, ...]
    settlements: tuple[str, ...]
    arbiters: tuple[str, ...]
    weights: Weights

    @property
    def preferences(self) -> Preferences:
        return Preferences(
            self.role,
            price_units=self.price,
            deliver_within_s=self.deliver,
            quality=self.quality,
            verifications=self.verifications,
            settlements=self.settlements,
            arbiters=self.arbiters,
            weights=self.weights,
        )

    def accepts(self, proposal: Proposal) -> bool:
        """Say the same as ``Preferences.acceptable``, written another way."""
        worst_price, worst_time, worst_grade = self.price[1], self.deliver[1], self.quality[1]
        if self.role is Role.BUYER:
            numbers = (
                proposal.price_units <= worst_price
                and proposal.deliver_within_s <= worst_time
                and proposal.quality >= worst_grade
            )
        else:
            numbers = (
                proposal.price_units >= worst_price
                and proposal.deliver_within_s >= worst_time
                and proposal.quality <= worst_grade
            )
        return (
            numbers
            and proposal.verification in self.verifications
            and proposal.settlement in self.settlements
            and proposal.arbiter in self.arbiters
        )


def _names(values: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


def weights() -> st.SearchStrategy[Weights]:
    weight = st.integers(0, 100)
    return st.builds(
        Weights,
        price=st.integers(1, 100),
        deliver=weight,
        quality=weight,
        verification=weight,
        settlement=weight,
        arbiter=weight,
    )


@st.composite
def ends(draw: st.DrawFn, role: Role | None = None) -> Ends:
    role = draw(st.sampled_from((Role.BUYER, Role.SELLER))) if role is None else role

    def pair(most: int, *, more_is_better: bool) -> tuple[int, int]:
        low, high = sorted((draw(st.integers(0, most)), draw(st.integers(0, most))))
        return (high, low) if more_is_better else (low, high)

    buys = role is Role.BUYER
    return Ends(
        role,
        pair(draw(st.sampled_from((100, 10**6, PRICE_MAX))), more_is_better=not buys),
        pair(3_600, more_is_better=not buys),
        pair(100, more_is_better=buys),
        draw(_names(VERIFICATIONS)),
        draw(_names(SETTLEMENTS)),
        draw(_names(ARBITERS)),
        draw(weights()),
    )


def proposals() -> st.SearchStrategy[Proposal]:
    rate = st.integers(0, 10**9)
    return st.builds(
        Proposal,
        price_units=st.one_of(st.integers(0, 100), st.integers(0, PRICE_MAX)),
        deliver_within_s=st.integers(0, 7_200),
        quality=st.integers(0, 100),
        verification=st.sampled_from(VERIFICATIONS),
        settlement=st.sampled_from(SETTLEMENTS),
        arbiter=st.sampled_from(ARBITERS),
        input_price_units=rate,
        output_price_units=rate,
    )


@st.composite
def conceding(draw: st.DrawFn, preferences: Preferences) -> Conceding:
    if draw(st.booleans()):
        return Reciprocating(preferences, goodwill=draw(st.integers(0, 150_000)))
    return TimeDependent(preferences, e_permille=draw(st.integers(10, 10_000)))


@st.composite
def any_strategy(draw: st.DrawFn, preferences: Preferences) -> Strategy:
    if draw(st.integers(0, 2)) == 0:
        return FixedPrice(preferences, price_value=draw(st.integers(0, 1_000_000)))
    return draw(conceding(preferences))


def other(role: Role) -> Role:
    return Role.SELLER if role is Role.BUYER else Role.BUYER


def view(role: Role, history: tuple[Turn, ...], *, now_ms: int = 0, seed: int = 0) -> View:
    return View.of_thread(role, history, started_ms=0, deadline_ms=10_000, now_ms=now_ms, seed=seed)


SIDES_PLAIN = {
    Role.BUYER: Preferences(Role.BUYER, price_units=(100, 300), deliver_within_s=(60, 60)),
    Role.SELLER: Preferences(Role.SELLER, price_units=(400, 200), deliver_within_s=(60, 60)),
}
"""Two sides that talk about the price alone, and would agree on 200 to 300."""


def at(price_units: int) -> Proposal:
    return Proposal(price_units=price_units, deliver_within_s=60)
