"""Strategies: deterministic, never past a reservation, and they find the deal that is there."""

from __future__ import annotations

import _pydecimal
from dataclasses import replace
from fractions import Fraction
from math import isqrt

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coase.negotiation.issues import BEYOND, FULL, Preferences, Proposal, Weights
from coase.negotiation.strategy import (
    Accept,
    Counter,
    FixedPrice,
    Reciprocating,
    Strategy,
    TimeDependent,
    Turn,
    View,
    Walk,
    concession,
)
from coase.negotiation.tournament import play
from coase.protocol.errors import ConfigurationError, LocalProtocolError
from coase.protocol.messages import ROUNDS_MAX
from coase.protocol.states import Role
from tests.negotiation.sides import (
    SIDES_PLAIN,
    Ends,
    any_strategy,
    at,
    conceding,
    ends,
    other,
    proposals,
    view,
    weights,
)


def test_the_curve_is_exact_where_it_can_be_known() -> None:
    for progress in (0, 1, 7, 499_999, 500_000, 999_999, FULL):
        assert concession(progress, 1_000) == progress
        assert abs(Fraction(concession(progress, 500)) - Fraction(progress**2, FULL)) <= 1
        assert abs(concession(progress, 2_000) - isqrt(progress * FULL)) <= 1
    for progress in range(1, FULL, 97_003):
        # Cubed and multiplied out, t^(10/3) is whole numbers only.
        near = concession(progress, 300)
        assert max(near - 1, 0) ** 3 * FULL**7 < progress**10 < (near + 1) ** 3 * FULL**7


def test_the_curve_has_the_same_digits_on_every_machine() -> None:
    assert [concession(progress, 300) for progress in (1, 123_456, 654_321, 999_999)] == [
        0, 937, 243_203, 999_997,
    ]  # fmt: skip
    assert concession(250_000, 3_000) == 629_961
    assert concession(1, 100_000) == 870_964


@settings(max_examples=20)
@given(st.integers(1, FULL - 1), st.integers(10, 100_000))
def test_another_implementation_of_the_arithmetic_gives_the_same_digits(
    progress: int, e_permille: int
) -> None:
    """The standard library has decimals twice, in C and in Python, written independently."""
    other_context = _pydecimal.Context(prec=28, rounding=_pydecimal.ROUND_HALF_EVEN)
    other_decimal = _pydecimal.Decimal
    exponent = other_context.divide(other_decimal(1_000), other_decimal(e_permille))
    log = other_context.ln(other_context.divide(other_decimal(progress), other_decimal(FULL)))
    power = other_context.exp(other_context.multiply(log, exponent))
    scaled = other_context.multiply(power, other_decimal(FULL))
    assert concession(progress, e_permille) == int(other_context.to_integral_value(scaled))


@given(st.integers(0, FULL), st.integers(0, FULL), st.integers(10, 100_000))
def test_the_curve_never_turns_back(early: int, late: int, e_permille: int) -> None:
    assume(early <= late)
    assert 0 <= concession(early, e_permille) <= concession(late, e_permille) <= FULL


@given(st.integers(1, FULL - 1))
def test_boulware_gives_later_than_a_conceder(progress: int) -> None:
    boulware, line, conceder = (concession(progress, e) for e in (200, 1_000, 5_000))
    assert boulware <= line <= conceder


def _history(data: st.DataObject, role: Role, longest: int) -> tuple[Turn, ...]:
    turns = []
    by = Role.SELLER
    for at_ms in range(data.draw(st.integers(1, longest))):
        turns.append(Turn(by, data.draw(proposals()), at_ms))
        by = other(by)
    if turns[-1].by is role:
        turns.append(Turn(other(role), data.draw(proposals()), len(turns)))
    return tuple(turns)


@given(st.data())
def test_no_strategy_ever_goes_below_its_reservation(data: st.DataObject) -> None:
    side = data.draw(ends())
    strategy = data.draw(any_strategy(side.preferences))
    assert side.accepts(strategy.opening(view(side.role, ())))
    history = _history(data, side.role, 8)
    seen = view(
        side.role,
        history,
        now_ms=data.draw(st.integers(0, 20_000)),
        seed=data.draw(st.integers(0, 2**32)),
    )
    move = strategy.reply(seen)
    if isinstance(move, Accept):
        assert move.proposal == history[-1].proposal
    if not isinstance(move, Walk):
        assert side.accepts(move.proposal)
    assert strategy.reply(seen) == move, "the same view gives the same move"


@settings(max_examples=50)
@given(st.data())
def test_a_concession_is_never_taken_back_as_time_and_rounds_pass(data: st.DataObject) -> None:
    side = data.draw(ends())
    strategy = data.draw(conceding(side.preferences))
    history: tuple[Turn, ...] = ()
    before = FULL
    now_ms = 0
    for _ in range(6):
        now_ms += data.draw(st.integers(0, 3_000))
        history += (Turn(other(side.role), data.draw(proposals()), now_ms),)
        target = strategy.target(view(side.role, history, now_ms=now_ms))
        assert 0 <= target <= before
        before = target
        history += (Turn(side.role, data.draw(proposals()), now_ms),)


@st.composite
def _facing(draw: st.DrawFn, *, overlap: bool) -> tuple[Ends, Ends]:
    """Return a buyer and a seller whose zones overlap by more than what is left unspoken.

    Without ``overlap`` there is one issue, chosen by chance, on which nothing suits both.
    """

    def zones(most: int, *, apart: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (aspiration, reservation) of who wants less and of who wants more."""
        low = draw(st.integers(0, most))
        room = draw(st.integers(1, most))
        before, after = draw(st.integers(0, room * 4)), draw(st.integers(0, room * 4))
        # One percent of a span, at least one, is never spoken: the zone is wider than that.
        shared = (before + after + room) // 10 + 2
        if apart:
            return (low, low + room), (low + room + 1 + shared + after, low + room + 1)
        top = low + before + shared
        return (low, top), (top + after, low + before)

    apart = None if overlap else draw(st.sampled_from(("price", "deliver", "quality")))
    buyer_price, seller_price = zones(10 ** draw(st.integers(1, 20)), apart=apart == "price")
    buyer_time, seller_time = zones(1_000, apart=apart == "deliver")
    seller_grade, buyer_grade = zones(8, apart=apart == "quality")
    names = ("schema", "hash")
    return (
        Ends(
            Role.BUYER, buyer_price, buyer_time, buyer_grade,
            draw(st.permutations(names).map(tuple)), ("escrow",), ("0x" + "0" * 40,),
            draw(weights()),
        ),
        Ends(
            Role.SELLER, seller_price, seller_time, seller_grade,
            draw(st.permutations(names).map(tuple)), ("escrow",), ("0x" + "0" * 40,),
            draw(weights()),
        ),
    )  # fmt: skip


@given(st.data())
def test_overlapping_zones_agree_before_the_deadline(data: st.DataObject) -> None:
    buyer, seller = data.draw(_facing(overlap=True))
    played = play(
        data.draw(conceding(buyer.preferences)),
        data.draw(conceding(seller.preferences)),
        seed=data.draw(st.integers(0, 1_000)),
    )
    assert played.agreed is not None
    assert buyer.accepts(played.agreed)
    assert seller.accepts(played.agreed)
    assert played.proposals <= 2 * ROUNDS_MAX


@given(st.data())
def test_it_also_agrees_when_the_time_runs_out_before_the_rounds(data: st.DataObject) -> None:
    buyer, seller = data.draw(_facing(overlap=True))
    played = play(
        data.draw(conceding(buyer.preferences)),
        data.draw(conceding(seller.preferences)),
        step_ms=100,
        span_ms=data.draw(st.integers(2_000, 3_000)),
    )
    assert played.agreed is not None
    assert played.history[-1].at_ms < 3_000


@given(st.data())
def test_disjoint_zones_never_agree(data: st.DataObject) -> None:
    buyer, seller = data.draw(_facing(overlap=False))
    played = play(
        data.draw(any_strategy(buyer.preferences)), data.draw(any_strategy(seller.preferences))
    )
    assert played.agreed is None
    assert played.proposals <= 2 * ROUNDS_MAX


@given(st.data())
def test_a_thread_always_ends_whoever_is_on_the_other_side(data: st.DataObject) -> None:
    buyer = data.draw(any_strategy(data.draw(ends(Role.BUYER)).preferences))
    seller = data.draw(any_strategy(data.draw(ends(Role.SELLER)).preferences))
    assert play(buyer, seller).proposals <= 2 * ROUNDS_MAX


def test_a_fixed_price_is_repeated_until_it_is_met() -> None:
    seller = FixedPrice(SIDES_PLAIN[Role.SELLER])
    opening = seller.opening(view(Role.SELLER, ()))
    assert opening == at(400)
    history = (Turn(Role.SELLER, opening, 0), Turn(Role.BUYER, at(399), 1))
    assert seller.reply(view(Role.SELLER, history)) == Counter(at(400))
    met = (Turn(Role.SELLER, opening, 0), Turn(Role.BUYER, at(401), 1))
    assert seller.reply(view(Role.SELLER, met)) == Accept(at(401))


def test_ac_next_takes_what_is_as_good_as_the_next_own_proposal() -> None:
    buyer = TimeDependent(SIDES_PLAIN[Role.BUYER], e_permille=1_000)
    # At half of four fifths of the time the target is one half: 200 of 100 to 300.
    for price, expected in ((200, Accept(at(200))), (201, Counter(at(200)))):
        history = (Turn(Role.SELLER, at(price), 0),)
        assert buyer.reply(view(Role.BUYER, history, now_ms=4_000)) == expected


def test_what_i_proposed_is_still_good_when_they_say_it_back() -> None:
    stubborn = TimeDependent(SIDES_PLAIN[Role.BUYER], floor=900_000)
    history = (
        Turn(Role.SELLER, at(400), 0),
        Turn(Role.BUYER, at(280), 1),  # Less than the floor allows now: clamped by a policy, say.
        Turn(Role.SELLER, at(280), 2),
    )
    assert stubborn.reply(view(Role.BUYER, history)) == Accept(at(280))


def test_tit_for_tat_gives_what_it_got_and_no_more_than_a_step() -> None:
    buyer = Reciprocating(SIDES_PLAIN[Role.BUYER], goodwill=0, step_max=200_000)
    still = (
        Turn(Role.SELLER, at(400), 0),
        Turn(Role.BUYER, at(100), 1),
        Turn(Role.SELLER, at(400), 2),
    )
    assert buyer.target(view(Role.BUYER, still)) == FULL
    came = (*still[:2], Turn(Role.SELLER, at(380), 2))  # A tenth of my span of 200.
    assert buyer.target(view(Role.BUYER, came)) == FULL - 100_000
    leapt = (*still[:2], Turn(Role.SELLER, at(301), 2))
    assert buyer.target(view(Role.BUYER, leapt)) == FULL - 200_000


@pytest.mark.parametrize("role", [Role.BUYER, Role.SELLER])
def test_the_deadline_and_the_last_round_end_a_thread(role: Role) -> None:
    strategy = TimeDependent(SIDES_PLAIN[role])
    bad = at(10_000) if role is Role.BUYER else at(1)
    last = Turn(other(role), bad, 0)
    assert strategy.reply(view(role, (last,), now_ms=10_000)) == Walk("deadline")
    assert strategy.reply(replace(view(role, (last,)), rounds_left=0)) == Walk("rounds")


def test_a_buyer_keeps_its_last_round_for_the_sellers_yes() -> None:
    assert view(Role.BUYER, ()).rounds_left == ROUNDS_MAX - 1
    assert view(Role.SELLER, ()).rounds_left == ROUNDS_MAX
    fair = (Turn(Role.BUYER, at(400), 0),)
    spent = replace(view(Role.SELLER, fair), rounds_left=0)
    # A seller says yes with an offer, and cannot without a round; a buyer's accept needs none.
    assert TimeDependent(SIDES_PLAIN[Role.SELLER]).reply(spent) == Walk("rounds")
    cheap = (Turn(Role.SELLER, at(100), 0),)
    assert TimeDependent(SIDES_PLAIN[Role.BUYER]).reply(
        replace(view(Role.BUYER, cheap), rounds_left=0)
    ) == Accept(at(100))


@pytest.mark.parametrize("make", [FixedPrice, TimeDependent, Reciprocating])
def test_a_view_of_the_wrong_side_is_our_own_mistake(make: type[Strategy]) -> None:
    strategy = make(SIDES_PLAIN[Role.BUYER])
    with pytest.raises(LocalProtocolError, match="other side"):
        strategy.opening(view(Role.SELLER, ()))
    with pytest.raises(LocalProtocolError, match="no proposal"):
        strategy.reply(view(Role.BUYER, ()))


def test_settings_out_of_range_are_refused() -> None:
    side = SIDES_PLAIN[Role.BUYER]
    for e_permille in (9, 100_001):
        with pytest.raises(ConfigurationError):
            TimeDependent(side, e_permille=e_permille)
    with pytest.raises(ConfigurationError):
        TimeDependent(side, floor=FULL + 1)
    with pytest.raises(ConfigurationError):
        Reciprocating(side, goodwill=2, step_max=1)
    with pytest.raises(ConfigurationError):
        FixedPrice(side, price_value=-1)


def test_names_that_nobody_listed_are_tried_one_after_the_other() -> None:
    """The counterparty names none of my settlements: I name each of mine in turn."""
    side = Preferences(
        Role.BUYER,
        price_units=(100, 300),
        deliver_within_s=(60, 60),
        settlements=("escrow", "channel"),
        weights=Weights(settlement=0),
    )
    theirs = replace(at(300), settlement="x402")
    history: tuple[Turn, ...] = ()
    named = []
    for at_ms in range(4):
        history += (Turn(Role.SELLER, theirs, at_ms),)
        move = TimeDependent(side).reply(view(Role.BUYER, history))
        assert isinstance(move, Counter)
        assert side.utility(move.proposal) != BEYOND
        named.append(move.proposal.settlement)
        history += (Turn(Role.BUYER, move.proposal, at_ms),)
    assert named == ["escrow", "channel", "escrow", "channel"]


def test_ties_are_broken_by_the_seed_and_by_nothing_else() -> None:
    even = Weights(price=1, deliver=1, quality=1, verification=0, settlement=0)
    side = Preferences(
        Role.BUYER,
        price_units=(100, 300),
        deliver_within_s=(10, 210),
        quality=(100, 0),
        weights=even,
    )
    theirs = Turn(Role.SELLER, Proposal(price_units=300, deliver_within_s=210, quality=0), 0)

    def reply(seed: int) -> object:
        seen = View.of_thread(
            Role.BUYER, (theirs,), started_ms=0, deadline_ms=10_000, now_ms=4_000, seed=seed
        )
        return TimeDependent(side, e_permille=1_000).reply(seen)

    assert reply(0) == reply(3)
    assert len({str(reply(seed)) for seed in range(3)}) == 3


def test_more_is_asked_where_they_gave_most_before() -> None:
    side = Preferences(
        Role.BUYER,
        price_units=(100, 300),
        deliver_within_s=(10, 210),
        weights=Weights(price=52, deliver=48, quality=0),
    )
    strategy = TimeDependent(side, e_permille=1_000)
    mine = Turn(Role.BUYER, Proposal(price_units=100, deliver_within_s=10), 1)

    def reply(first: Proposal, last: Proposal) -> Proposal:
        history = (Turn(Role.SELLER, first, 0), mine, Turn(Role.SELLER, last, 2))
        move = strategy.reply(view(Role.BUYER, history, now_ms=4_000))
        assert isinstance(move, Counter)
        return move.proposal

    now = Proposal(price_units=299, deliver_within_s=150)
    unmoved = reply(now, now)
    assert (unmoved.price_units, unmoved.deliver_within_s) < (200, 151)
    assert unmoved.deliver_within_s == 150, "the price counts most for us, so it is asked for first"
    moved = reply(replace(now, deliver_within_s=210), now)
    assert moved.price_units > 280, "time seems cheap to them, so time is asked for first"
    assert moved.deliver_within_s == 10
