"""Hard limits: whatever a strategy does, nothing leaves that breaks one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.negotiation.policy import (
    AllowedSettlement,
    AllowedVerification,
    ArbiterList,
    Budget,
    CounterpartyBlocked,
    DeadlineLimit,
    Forbidden,
    Limit,
    Policy,
    PolicyExhausted,
    PriceLimit,
    QualityFloor,
    RateFloor,
    RoundsMax,
    SpendLimit,
    Verdict,
    decide,
)
from coase.negotiation.pricing import Rates
from coase.negotiation.strategy import (
    Accept,
    Counter,
    Move,
    Strategy,
    TimeDependent,
    Turn,
    View,
    Walk,
)
from coase.protocol.errors import ConfigurationError
from coase.protocol.messages import SETTLEMENTS, VERIFICATIONS
from coase.protocol.states import Role
from tests.negotiation.sides import ARBITERS, SIDES_PLAIN, at, other, proposals, view

if TYPE_CHECKING:
    from coase.negotiation.issues import Proposal

ME, THEM = "0x" + "11" * 20, "0x" + "22" * 20
CAPABILITY = "inference-0123abcd"


def facing(role: Role, *turns: Turn, now_ms: int = 0) -> View:
    return replace(view(role, turns, now_ms=now_ms), capability=CAPABILITY, counterparty=THEM)


@dataclass(frozen=True)
class Limits:
    """One random set of hard limits, and a plain statement of what may leave."""

    role: Role
    price: int
    seconds: int
    quality: int
    settlements: frozenset[str]
    verifications: frozenset[str]
    arbiters: frozenset[str]
    rounds: int
    left: tuple[int, int]
    floor: Rates
    blocked: bool
    clamp: bool

    def chain(self, order: list[int]) -> Policy:
        limits: list[Limit] = [
            PriceLimit(self.role, self.price, clamp=self.clamp),
            DeadlineLimit(self.seconds),
            QualityFloor(self.quality),
            AllowedSettlement(self.settlements),
            AllowedVerification(self.verifications),
            ArbiterList(self.arbiters),
            RoundsMax(self.rounds),
            CounterpartyBlocked({(THEM, CAPABILITY)} if self.blocked else set()),
        ]
        if self.role is Role.BUYER:
            limits.append(SpendLimit(Budget({"deal": self.left[0], "day": self.left[1]})))
        else:
            limits.append(RateFloor(self.floor))
        return Policy([limits[index] for index in order])

    def allow(self, move: Move, seen: View) -> bool:
        if isinstance(move, Walk):
            return True
        said = move.proposal
        if self.role is Role.BUYER:
            ends = (
                said.price_units <= min(self.price, *self.left)
                and said.deliver_within_s <= self.seconds
                and said.quality >= self.quality
            )
        else:
            rates = zip(said.rates.all(), self.floor.all(), strict=True)
            ends = (
                said.price_units >= self.price
                and said.deliver_within_s >= self.seconds
                and said.quality <= self.quality
                and all(rate >= floor for rate, floor in rates)
            )
        if isinstance(move, Accept):
            last = seen.last_of_theirs
            stands = last is not None and seen.now_ms < last.valid_until_ms
            if last is None or last.proposal != said or not stands:
                return False
        elif len(seen.mine) >= self.rounds:
            return False
        return (
            ends
            and said.settlement in self.settlements
            and said.verification in self.verifications
            and said.arbiter in self.arbiters
            and not self.blocked
        )


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    def mostly(values: tuple[str, ...]) -> frozenset[str]:
        # Mostly everything: with one value each, no move would pass and nothing be tested.
        return draw(st.one_of(st.just(frozenset(values)), st.frozensets(st.sampled_from(values))))

    role = draw(st.sampled_from((Role.BUYER, Role.SELLER)))
    big = st.integers(0, 10**24)
    loose = 7_200 if role is Role.BUYER else 0
    grade = 0 if role is Role.BUYER else 100
    return Limits(
        role,
        draw(big),
        draw(st.one_of(st.just(loose), st.integers(0, 7_200))),
        draw(st.one_of(st.just(grade), st.integers(0, 100))),
        mostly(SETTLEMENTS),
        mostly(VERIFICATIONS),
        mostly(ARBITERS),
        draw(st.integers(0, 5)),
        (draw(big), draw(big)),
        Rates(
            input_price_units=draw(st.integers(0, 10**9)),
            output_price_units=draw(st.integers(0, 10**9)),
        ),
        draw(st.integers(0, 9)) == 0,
        draw(st.booleans()),
    )


class Hostile(Strategy):
    """Says whatever it was told to say."""

    def __init__(self, move: Move) -> None:
        self.move = move

    def opening(self, view: View) -> Proposal:
        assert isinstance(self.move, Counter)
        return self.move.proposal

    def reply(self, view: View) -> Move:
        return self.move


@given(st.data())
def test_nothing_leaves_that_breaks_a_limit(data: st.DataObject) -> None:
    limit = data.draw(limits())
    theirs = data.draw(proposals())
    turns = [
        Turn(limit.role, data.draw(proposals()), 0) for _ in range(data.draw(st.integers(0, 3)))
    ]
    turns.append(Turn(other(limit.role), theirs, 1, data.draw(st.integers(1, 20_000))))
    seen = facing(limit.role, *turns, now_ms=data.draw(st.integers(0, 9_999)))
    said = data.draw(st.one_of(st.just(theirs), proposals()))
    moves: list[Move] = [Accept(said), Counter(said), Walk("why not")]
    move = data.draw(st.sampled_from(moves))
    policy = limit.chain(data.draw(st.permutations(range(9))))
    out = decide(Hostile(move), policy, seen)
    if limit.allow(move, seen):
        assert out == move, "what keeps every limit leaves as it is"
    elif not isinstance(out, Forbidden):
        assert isinstance(out, Counter), "only a counter-offer is ever clamped"
        assert limit.clamp or limit.role is Role.SELLER
        assert limit.allow(out, seen)


@given(st.data())
def test_the_order_of_the_limits_does_not_decide_whether_a_move_leaves(
    data: st.DataObject,
) -> None:
    limit = data.draw(limits())
    seen = facing(limit.role, Turn(other(limit.role), data.draw(proposals()), 0))
    move = Counter(data.draw(proposals()))
    orders = [data.draw(st.permutations(range(9))) for _ in range(2)]
    out = [limit.chain(order).check(move, seen) for order in orders]
    assert isinstance(out[0], Forbidden) == isinstance(out[1], Forbidden)


def test_an_empty_chain_refuses() -> None:
    theirs = Turn(Role.SELLER, at(100), 0)
    seen = facing(Role.BUYER, theirs)
    for move in (Accept(at(100)), Counter(at(1))):
        assert isinstance(Policy([]).check(move, seen), Forbidden)
    assert Policy([]).check(Walk("done"), seen) == Walk("done")


def test_a_chain_that_nobody_in_it_decides_is_an_error_and_not_a_yes() -> None:
    seen = facing(Role.BUYER, Turn(Role.SELLER, at(100), 0))
    nobody_minds = Policy([DeadlineLimit(3_600), RoundsMax(), CounterpartyBlocked(set())])
    with pytest.raises(PolicyExhausted, match="no limit of the money"):
        nobody_minds.check(Accept(at(100)), seen)
    seller_has_no_floor = Policy([SpendLimit(Budget({"day": 10**9}))])
    with pytest.raises(PolicyExhausted):
        seller_has_no_floor.check(Counter(at(1)), facing(Role.SELLER))


class Chasing(Limit):
    """Raises every price by one: no clamp ever satisfies it."""

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        return Counter(replace(proposal, price_units=proposal.price_units + 1))


def test_clamps_that_chase_each_other_are_an_error() -> None:
    seen = facing(Role.BUYER)
    with pytest.raises(PolicyExhausted, match="to and fro"):
        Policy([PriceLimit(Role.BUYER, 10), Chasing()]).check(Counter(at(5)), seen)


def test_a_limit_cannot_change_what_is_accepted() -> None:
    seen = facing(Role.BUYER, Turn(Role.SELLER, at(100), 0))
    out = Policy([PriceLimit(Role.BUYER, 1_000), Chasing()]).check(Accept(at(100)), seen)
    assert isinstance(out, Forbidden)


def test_only_the_last_proposal_that_still_stands_can_be_accepted() -> None:
    """An agreement on a rejected proposal was possible in another project."""
    policy = Policy([PriceLimit(Role.BUYER, 1_000)])
    first, last = Turn(Role.SELLER, at(100), 0), Turn(Role.SELLER, at(200), 2, 50)
    seen = facing(Role.BUYER, first, Turn(Role.BUYER, at(50), 1), last)
    assert policy.check(Accept(at(200)), seen) == Accept(at(200))
    for never in (at(100), at(50), at(199)):
        assert isinstance(policy.check(Accept(never), seen), Forbidden)
    late = policy.check(Accept(at(200)), replace(seen, now_ms=50))
    assert late == Forbidden("Policy", "the proposal lapsed before it was accepted")


def test_a_price_past_the_limit_is_clamped_or_stopped() -> None:
    dear = replace(at(1_000), input_price_units=500)
    seen = facing(Role.BUYER, Turn(Role.SELLER, dear, 0))
    clamped = Policy([PriceLimit(Role.BUYER, 400)]).check(Counter(dear), seen)
    assert clamped == Counter(replace(at(400), input_price_units=200))
    stopped = Policy([PriceLimit(Role.BUYER, 400, clamp=False)]).check(Counter(dear), seen)
    assert stopped == Forbidden("PriceLimit", "the price is past the limit")
    assert Policy([PriceLimit(Role.BUYER, 400)]).check(Accept(dear), seen) == stopped
    floor = Policy([PriceLimit(Role.SELLER, 400)])
    assert floor.check(Counter(at(399)), facing(Role.SELLER)) == Counter(at(400))
    assert floor.check(Counter(at(0)), facing(Role.SELLER)) == Counter(at(400))


def test_a_limit_of_the_other_side_stops_everything() -> None:
    out = Policy([PriceLimit(Role.SELLER, 1)]).check(Counter(at(10)), facing(Role.BUYER))
    assert isinstance(out, Forbidden)


def test_the_budget_stops_and_never_clamps_and_names_the_limit() -> None:
    policy = Policy([SpendLimit(Budget({"deal": 500, "hour": 90}))])
    seen = facing(Role.BUYER, Turn(Role.SELLER, at(91), 0))
    assert policy.check(Counter(at(90)), seen) == Counter(at(90))
    for move in (Counter(at(91)), Accept(at(91))):
        out = policy.check(move, seen)
        assert out == Forbidden("SpendLimit", "the limit 'hour' does not cover the price")
        assert "90" not in str(out)
    assert isinstance(Policy([SpendLimit(Budget({}))]).check(Counter(at(0)), seen), Forbidden)


def test_a_block_is_for_one_capability_and_not_for_a_whole_agent() -> None:
    policy = Policy([PriceLimit(Role.BUYER, 100), CounterpartyBlocked({(THEM, CAPABILITY)})])
    seen = facing(Role.BUYER)
    assert isinstance(policy.check(Counter(at(1)), seen), Forbidden)
    elsewhere = replace(seen, capability="summarise-0123abcd")
    assert policy.check(Counter(at(1)), elsewhere) == Counter(at(1))
    somebody = replace(seen, counterparty=ME)
    assert policy.check(Counter(at(1)), somebody) == Counter(at(1))


def test_rates_below_their_floor_are_raised_or_refused() -> None:
    floor = Rates(input_price_units=100, output_price_units=300)
    policy = Policy([PriceLimit(Role.SELLER, 10), RateFloor(floor)])
    skewed = replace(at(50), input_price_units=10, output_price_units=900)
    seen = facing(Role.SELLER, Turn(Role.BUYER, skewed, 0))
    assert policy.check(Accept(skewed), seen) == Forbidden(
        "RateFloor", "a metered price is below its floor"
    )
    assert policy.check(Counter(skewed), seen) == Counter(replace(skewed, input_price_units=100))


@pytest.mark.parametrize(
    ("role", "limit", "just_within", "just_past"),
    [
        (Role.BUYER, DeadlineLimit(60), {"deliver_within_s": 60}, {"deliver_within_s": 61}),
        (Role.SELLER, DeadlineLimit(60), {"deliver_within_s": 60}, {"deliver_within_s": 59}),
        (Role.BUYER, QualityFloor(50), {"quality": 50}, {"quality": 49}),
        (Role.SELLER, QualityFloor(50), {"quality": 50}, {"quality": 51}),
        (Role.BUYER, AllowedSettlement({"none"}), {"settlement": "none"}, {}),
        (Role.BUYER, AllowedVerification({"hash"}), {"verification": "hash"}, {}),
        (Role.SELLER, ArbiterList({ARBITERS[1]}), {"arbiter": ARBITERS[1]}, {}),
    ],
)
def test_each_limit_has_its_edge(
    role: Role, limit: Limit, just_within: dict[str, object], just_past: dict[str, object]
) -> None:
    policy = Policy([PriceLimit(role, 100), limit])
    within = replace(at(100), **just_within)  # type: ignore[arg-type]
    past = replace(at(100), **just_past)  # type: ignore[arg-type]
    for kind in (Accept, Counter):
        assert policy.check(kind(within), facing(role, Turn(other(role), within, 0))) == kind(
            within
        )
        out = policy.check(kind(past), facing(role, Turn(other(role), past, 0)))
        assert isinstance(out, Forbidden)
        assert out.limit == type(limit).__name__


def test_rounds_end_with_the_last_one() -> None:
    policy = Policy([PriceLimit(Role.BUYER, 100), RoundsMax(2)])
    mine, theirs = Turn(Role.BUYER, at(10), 0), Turn(Role.SELLER, at(90), 0)
    assert policy.check(Counter(at(20)), facing(Role.BUYER, theirs, mine, theirs)) == Counter(
        at(20)
    )
    spent = facing(Role.BUYER, theirs, mine, theirs, mine, theirs)
    assert policy.check(Counter(at(20)), spent) == Forbidden(
        "RoundsMax", "2 proposals have been made"
    )
    assert policy.check(Accept(at(90)), spent) == Accept(at(90))


def test_what_is_no_move_does_not_leave() -> None:
    policy = Policy([PriceLimit(Role.BUYER, 100)])
    for nonsense in (None, at(1), "accept", Forbidden("x", "y")):
        assert isinstance(policy.check(nonsense, facing(Role.BUYER)), Forbidden)  # type: ignore[arg-type]


def test_an_honest_strategy_passes_through_its_policy() -> None:
    buyer = TimeDependent(SIDES_PLAIN[Role.BUYER], e_permille=1_000)
    policy = Policy([PriceLimit(Role.BUYER, 300)])
    assert decide(buyer, policy, facing(Role.BUYER)) == Counter(at(100))
    seen = facing(Role.BUYER, Turn(Role.SELLER, at(250), 0), now_ms=4_000)
    assert decide(buyer, policy, seen) == Counter(at(200))


@pytest.mark.parametrize("units", [-1, 0.5, True])
def test_a_price_limit_is_a_whole_number(units: int) -> None:
    with pytest.raises(ConfigurationError):
        PriceLimit(Role.BUYER, units)
    with pytest.raises(ConfigurationError):
        PriceLimit(Role.CLOCK, 1)
