"""Utility: monotone, whole, zero at the reservation, and never made up for elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.negotiation.issues import BEYOND, FULL, ISSUES, Preferences, Proposal, Weights
from coase.negotiation.pricing import Rates
from coase.protocol.errors import ConfigurationError
from coase.protocol.states import Role
from tests.negotiation.sides import Ends, ends, proposals

BUYER = Preferences(
    Role.BUYER,
    price_units=(100, 300),
    deliver_within_s=(10, 60),
    quality=(90, 50),
    verifications=("hash", "schema", "none"),
    weights=Weights(price=50, deliver=30, quality=15, verification=5),
)


def a_proposal(**changes: object) -> Proposal:
    plain = Proposal(price_units=300, deliver_within_s=60, quality=50, verification="none")
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_utility_is_zero_at_every_reservation_and_full_at_every_aspiration() -> None:
    assert BUYER.utility(a_proposal()) == 0
    best = a_proposal(price_units=100, deliver_within_s=10, quality=90, verification="hash")
    assert BUYER.utility(best) == FULL
    assert BUYER.opening() == best


def test_each_issue_adds_its_weight() -> None:
    assert BUYER.utility(a_proposal(price_units=200)) == 250_000
    assert BUYER.utility(a_proposal(deliver_within_s=35)) == 150_000
    assert BUYER.utility(a_proposal(quality=70)) == 75_000
    assert BUYER.utility(a_proposal(verification="schema")) == 25_000


@pytest.mark.parametrize(
    "past",
    [
        {"price_units": 301},
        {"deliver_within_s": 61},
        {"quality": 49},
        {"verification": "replay"},
        {"settlement": "none"},
        {"arbiter": "0x" + "a1" * 20},
    ],
)
def test_nothing_makes_up_for_one_issue_past_its_reservation(past: dict[str, object]) -> None:
    best = {"price_units": 0, "deliver_within_s": 1, "quality": 100, "verification": "hash"}
    assert BUYER.utility(a_proposal(**{**best, **past})) == BEYOND


@given(st.data())
def test_utility_is_monotone_in_every_issue(data: st.DataObject) -> None:
    side = data.draw(ends())
    preferences = side.preferences
    worse = data.draw(proposals())
    sign = 1 if side.role is Role.BUYER else -1
    name, better_by = data.draw(
        st.sampled_from((("price_units", -sign), ("deliver_within_s", -sign), ("quality", sign)))
    )
    step = data.draw(st.integers(0, 10**6))
    most = {"price_units": 10**30, "deliver_within_s": 7_200, "quality": 100}[name]
    value = min(max(getattr(worse, name) + better_by * step, 0), most)
    better = replace(worse, **{name: value})
    assert preferences.utility(better) >= preferences.utility(worse)
    assert preferences.soft_utility(better) >= preferences.soft_utility(worse)


@given(st.data())
def test_acceptable_means_within_every_reservation(data: st.DataObject) -> None:
    side = data.draw(ends())
    # Half of the draws start inside, or nearly everything would be refused for six reasons.
    drawn = data.draw(proposals())
    if data.draw(st.booleans()):
        drawn = side.preferences.proposal_at(0, toward=drawn, order=ISSUES)
    utility = side.preferences.utility(drawn)
    assert side.accepts(drawn) == (utility != BEYOND)
    assert utility == BEYOND or 0 <= utility <= FULL


@given(st.data())
def test_a_counter_proposal_is_worth_its_target_and_stays_inside(data: st.DataObject) -> None:
    side = data.draw(ends())
    theirs = data.draw(proposals())
    if data.draw(st.booleans()):  # Names that suit: then the target has to be met.
        theirs = replace(
            theirs,
            verification=side.verifications[-1],
            settlement=side.settlements[-1],
            arbiter=side.arbiters[-1],
        )
    target = data.draw(st.integers(0, FULL))
    order = data.draw(st.permutations(ISSUES))
    ours = side.preferences.proposal_at(target, toward=theirs, order=order)
    assert side.accepts(ours)
    allowed = (
        (theirs.verification, side.verifications),
        (theirs.settlement, side.settlements),
        (theirs.arbiter, side.arbiters),
    )
    if all(name in names for name, names in allowed):
        assert side.preferences.utility(ours) >= target


@given(st.data())
def test_a_counter_proposal_says_no_reservation_first(data: st.DataObject) -> None:
    side = data.draw(ends())
    theirs = data.draw(proposals())
    ours = side.preferences.proposal_at(
        data.draw(st.integers(0, FULL)), toward=theirs, order=ISSUES
    )
    said = (
        (ours.price_units, theirs.price_units, side.price),
        (ours.deliver_within_s, theirs.deliver_within_s, side.deliver),
        (ours.quality, theirs.quality, side.quality),
    )
    for own, heard, (aspiration, reservation) in said:
        assert own != reservation or own in (heard, aspiration)


def test_the_least_is_given_that_reaches_the_target() -> None:
    theirs = a_proposal(price_units=500, deliver_within_s=50)
    ours = BUYER.proposal_at(400_000, toward=theirs, order=("price", "deliver", "quality"))
    assert ours.deliver_within_s == 50, "what they offered and we can take stays as it is"
    dearer = replace(ours, price_units=ours.price_units + 1)
    assert BUYER.utility(ours) >= 400_000 > BUYER.utility(dearer)


@given(st.integers(0, FULL), st.integers(1, 10**9))
def test_a_target_between_two_units_is_rounded_in_our_own_favour(target: int, span: int) -> None:
    side = Preferences(Role.BUYER, price_units=(7, 7 + span), deliver_within_s=(60, 60))
    theirs = Proposal(price_units=10**10, deliver_within_s=60)
    assert side.utility(side.proposal_at(target, toward=theirs, order=("price",))) >= target


def test_a_sellers_metered_work_is_worth_its_worst_rate() -> None:
    rates = Rates(input_price_units=100, output_price_units=400)
    seller = Preferences(
        Role.SELLER,
        price_units=(1_000, 500),
        deliver_within_s=(60, 60),
        rates=rates,
        cap_units=1_000,
    )
    fair = Proposal(
        price_units=800, deliver_within_s=60, input_price_units=80, output_price_units=320
    )
    assert seller.price_of(fair) == 800
    skewed = replace(fair, input_price_units=10, output_price_units=4_000)
    assert seller.price_of(skewed) == 100
    assert not seller.acceptable(skewed)
    assert seller.price_of(replace(fair, input_price_units=0)) == 0
    opening = seller.opening()
    assert (opening.price_units, opening.rates) == (1_000, rates)
    ours = seller.proposal_at(500_000, toward=skewed, order=ISSUES)
    assert (ours.price_units, ours.input_price_units, ours.output_price_units) == (750, 75, 300)


def test_a_buyer_scales_the_sellers_rates_with_the_price() -> None:
    theirs = Proposal(
        price_units=400,
        deliver_within_s=60,
        quality=50,
        verification="hash",
        input_price_units=1_000,
        output_price_units=4_000,
    )
    ours = BUYER.proposal_at(500_000, toward=theirs, order=("price",))
    assert ours.input_price_units == -(-1_000 * ours.price_units // 400)
    assert ours.output_price_units == -(-4_000 * ours.price_units // 400)


@pytest.mark.parametrize(
    "wrong",
    [
        {"price_units": 0.5},
        {"price_units": True},
        {"price_units": -1},
        {"price_units": 2**128},
        {"deliver_within_s": 31 * 24 * 3600},
        {"quality": 101},
        {"verification": "trust me"},
        {"settlement": "cash"},
        {"input_price_units": 0.1},
    ],
)
def test_a_proposal_of_impossible_values_cannot_be_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        a_proposal(**wrong)


@pytest.mark.parametrize(
    ("price", "deliver", "quality"),
    [((300, 100), (10, 60), (90, 50)), ((1, 2), (60, 10), (90, 50)), ((1, 2), (1, 2), (50, 90))],
)
def test_an_aspiration_worse_than_the_reservation_is_refused(
    price: tuple[int, int], deliver: tuple[int, int], quality: tuple[int, int]
) -> None:
    with pytest.raises(ConfigurationError, match="worse than the reservation"):
        Preferences(Role.BUYER, price_units=price, deliver_within_s=deliver, quality=quality)


def test_an_issue_without_room_is_a_condition_and_carries_no_utility() -> None:
    side = Preferences(
        Role.BUYER, price_units=(10, 20), deliver_within_s=(30, 30), quality=(50, 50)
    )
    assert side.traded() == ("price",)
    cheap = Proposal(price_units=10, deliver_within_s=30, quality=50)
    assert side.utility(cheap) == FULL
    assert side.utility(replace(cheap, deliver_within_s=31)) == BEYOND
    nothing = Ends(
        Role.BUYER, (10, 10), (30, 30), (50, 50), ("schema",), ("escrow",), ("0x" + "0" * 40,),
        Weights(),
    ).preferences  # fmt: skip
    assert nothing.utility(cheap) == FULL
