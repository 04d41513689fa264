"""A round: the best offers are bargained with, one is accepted at a time, the rest is freed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.negotiation.award import (
    AcceptOffer,
    CounterOffer,
    Decision,
    Fail,
    Mark,
    Plan,
    Ranking,
    RejectOffer,
    Round,
    Wait,
)
from coase.negotiation.issues import Preferences, Proposal
from coase.negotiation.policy import Budget, CounterpartyBlocked, Policy, PriceLimit, SpendLimit
from coase.negotiation.pricing import Usage
from coase.negotiation.scores import Outcome, Scorebook
from coase.negotiation.strategy import FixedPrice, Strategy, TimeDependent
from coase.protocol.errors import ConfigurationError, LocalProtocolError, Refused
from coase.protocol.states import Role
from tests.negotiation.sides import at, proposals

CAP = "inference-0123abcd"
NEVER = 10**9
SIDE = Preferences(Role.BUYER, price_units=(100, 300), deliver_within_s=(60, 60))
TAKES_ALL = FixedPrice(SIDE, price_value=0)  # Anything up to 298.
BARGAINS = TimeDependent(SIDE, e_permille=1_000)


def seller(index: int) -> str:
    return f"0x{index:040x}"


def a_round(
    strategy: Strategy = TAKES_ALL,
    *,
    plan: Plan | None = None,
    policy: Policy | None = None,
    scores: Scorebook | None = None,
    ranking: Ranking | None = None,
) -> Round:
    return Round(
        strategy=strategy,
        policy=policy or Policy([PriceLimit(Role.BUYER, 1_000)]),
        ranking=ranking or Ranking(salt=b"salt"),
        plan=plan or Plan(),
        capability=CAP,
        scores=scores or Scorebook(),
        opened_ms=0,
        reply_by_ms=1_000,
        deadline_ms=30_000,
    )


def hear(past: Round, *prices: int, now_ms: int = 0, valid_until_ms: int = NEVER) -> Round:
    for price in prices:
        index = len(past.entries)
        past = past.offered(
            f"t{index}", seller(index), at(price), valid_until_ms=valid_until_ms, now_ms=now_ms
        )
    return past


def of(kind: type, decisions: list[Decision]) -> list[Decision]:
    return [decision for decision in decisions if isinstance(decision, kind)]


def test_the_cheapest_is_accepted_and_the_rest_is_freed_only_when_it_agreed() -> None:
    past = hear(a_round(), 200, 150, 250)
    past, decisions = past.step(10)
    assert decisions == [AcceptOffer("t1", at(150), 5_010), Wait(5_010)]
    assert past.reserved_units == 150
    assert past.step(4_000) == (past, [Wait(5_010)])
    past, decisions = past.agreed("t1")
    assert decisions == [
        RejectOffer("t0", "another offer was taken"),
        RejectOffer("t2", "another offer was taken"),
    ]
    assert past.over
    assert past.reserved_units == 0
    assert past.step(10**6) == (past, [])
    assert past.agreed("t1") == (past, []), "the same bytes may come twice"


def test_silence_keeps_the_reservation_then_lowers_the_score_and_the_next_best_is_asked() -> None:
    past, _ = hear(a_round(), 200, 150).step(0)
    waiting, decisions = past.step(4_999)
    assert (waiting.reserved_units, decisions) == (150, [Wait(5_000)])
    assert past.agreed("t1")[0].over, "nobody else has an accept, so late is not too late"
    past, decisions = past.step(5_000)
    assert decisions == [
        Mark(seller(1), Outcome.SILENT),
        AcceptOffer("t0", at(200), 10_000),
        Wait(10_000),
    ]
    assert past.reserved_units == 200
    assert past.scores.failure_permille(seller(1), CAP, now_ms=5_000) > 500
    with pytest.raises(LocalProtocolError, match="no accept"):
        past.agreed("t1")
    past, _ = past.agreed("t0")
    assert past.over


def test_a_no_to_an_accept_frees_the_reservation_at_once() -> None:
    past, _ = hear(a_round(), 200, 150).step(0)
    past, decisions = past.refused("t1", now_ms=100)
    assert decisions == [Mark(seller(1), Outcome.DECLINED)]
    assert past.reserved_units == 0
    past, decisions = past.step(100)
    assert of(AcceptOffer, decisions) == [AcceptOffer("t0", at(200), 5_100)]
    assert past.refused("t1", now_ms=200) == (past, [])


def test_an_accept_that_could_not_be_said_blames_nobody_and_frees_the_reservation() -> None:
    past, _ = hear(a_round(), 200, 150).step(0)
    past = past.dropped("t1")
    assert past.reserved_units == 0
    assert past.scores.rows() == ()
    assert past.dropped("t1") == past
    _, decisions = past.step(0)
    assert of(AcceptOffer, decisions) == [AcceptOffer("t0", at(200), 5_000)]


def test_a_rejection_names_the_limit_that_stood_in_the_way() -> None:
    policy = Policy([SpendLimit(Budget({"day": 140}))])
    _, decisions = hear(a_round(policy=policy), 150).step(0)
    [rejection] = of(RejectOffer, decisions)
    assert isinstance(rejection, RejectOffer)
    assert rejection.limit == "SpendLimit"
    assert "day" not in rejection.reason


def test_the_rounds_of_the_plan_are_the_counter_offers_that_are_made() -> None:
    for rounds in (0, 1, 3):
        past = hear(a_round(BARGAINS, plan=Plan(rounds=rounds)), 305)
        past, decisions = past.step(0)
        made = 0
        while of(CounterOffer, decisions):
            made += 1
            past = past.offered("t0", seller(0), at(305), valid_until_ms=NEVER, now_ms=0)
            past, decisions = past.step(0)
        assert of(RejectOffer, decisions) == [RejectOffer("t0", "not acceptable", "rounds")]
        assert made == rounds


@given(st.permutations([0, 1, 2]), st.permutations([0, 1, 2]), st.lists(st.integers(0, 900)))
def test_by_rounds_neither_order_nor_delay_changes_a_move(
    first: list[int], then: list[int], delays: list[int]
) -> None:
    said = [play(first, then, delays), play([0, 1, 2], [2, 0, 1], [])]
    assert said[0] == said[1]
    assert [price for kind, _, price in said[0] if kind == "accept"] == [215]


def play(first: list[int], then: list[int], delays: list[int]) -> list[tuple[str, str, int]]:
    """Return what a buyer says to three sellers that come down by 10 at each counter-offer."""
    past = a_round(BARGAINS, plan=Plan(by_rounds=True, rounds=4, patience_ms=0))
    asked = {0: 260, 1: 240, 2: 235}
    waits = iter(delays)
    now_ms = 0
    for index in first:
        past = past.offered(
            f"t{index}", seller(index), at(asked[index]), valid_until_ms=NEVER, now_ms=now_ms
        )
    said: list[tuple[str, str, int]] = []
    while not past.accepted:
        past, decisions = past.step(now_ms)
        counters = [d for d in decisions if isinstance(d, CounterOffer)]
        said += sorted(("counter", d.thread, d.proposal.price_units) for d in counters)
        said += [
            ("accept", d.thread, d.proposal.price_units)
            for d in decisions
            if isinstance(d, AcceptOffer)
        ]
        waiting = {d.thread for d in counters}
        answering = [index for index in then if f"t{index}" in waiting]
        for index in answering:
            now_ms += next(waits, 0)
            asked[index] -= 10
            thread = f"t{index}"
            offer = at(asked[index])
            past = past.offered(thread, seller(index), offer, valid_until_ms=NEVER, now_ms=now_ms)
            if index != answering[-1]:
                past, early = past.step(now_ms)
                assert all(isinstance(d, Wait) for d in early), "not before all have answered"
    return said


def test_an_unresponsive_cheapest_seller_is_not_hammered() -> None:
    """One project asked the same silent cheapest provider for minutes."""
    scores, accepts = Scorebook(), []
    for start_ms in range(0, 120_000, 6_000):
        past = replace(
            a_round(scores=scores),
            opened_ms=start_ms,
            reply_by_ms=start_ms + 1_000,
            deadline_ms=start_ms + 30_000,
        )
        past = hear(past, 1, 200, now_ms=start_ms)
        past, decisions = past.step(start_ms)
        for decision in decisions:
            if isinstance(decision, AcceptOffer):
                accepts.append(decision.thread)
        if past.accepted == "t0":
            past, _ = past.step(past.agree_by_ms)
        scores = past.scores
    assert accepts.count("t0") <= 5, "rests of 5, 10, 20, 40 and 80 s"
    assert accepts.count("t1") >= 15


def test_only_a_resting_seller_is_waited_for_and_asked_again() -> None:
    scores = Scorebook().record(seller(0), CAP, Outcome.SILENT, now_ms=0)
    past, decisions = replace(hear(a_round(scores=scores), 150), reply_by_ms=0).step(1)
    assert decisions == [Wait(5_000)]
    past, decisions = past.step(5_000)
    assert of(AcceptOffer, decisions)


def test_offers_are_waited_for_until_enough_are_there_or_the_time_is_up() -> None:
    plan = Plan(bids_min=2)
    past = hear(a_round(plan=plan), 200)
    assert past.step(0) == (past, [Wait(1_000)])
    assert of(AcceptOffer, hear(past, 150).step(0)[1])
    assert of(AcceptOffer, past.step(1_000)[1])


def test_an_offer_that_lapses_while_others_are_awaited_is_gone() -> None:
    past = hear(a_round(plan=Plan(bids_min=2)), 150, valid_until_ms=500)
    assert past.step(0) == (past, [Wait(500)])
    past, _ = past.step(500)
    past, decisions = hear(past, 200, now_ms=600).step(600)
    assert of(AcceptOffer, decisions) == [AcceptOffer("t1", at(200), 5_600)]


def test_it_bargains_with_the_best_few_at_once() -> None:
    past = hear(a_round(BARGAINS, plan=Plan(bargain_with=2)), 900, 500, 700, 600)
    past, decisions = past.step(0)
    assert [type(decision) for decision in decisions] == [CounterOffer, CounterOffer, Wait]
    assert [d.thread for d in decisions if isinstance(d, CounterOffer)] == ["t1", "t3"]
    assert all(d.proposal == at(100) for d in decisions if isinstance(d, CounterOffer))
    assert past.step(1) == (past, [Wait(10_000)]), "nothing is said twice"
    # One of the two says no: the next best takes its place.
    past, _ = past.refused("t1", now_ms=2)
    past, decisions = past.step(2)
    assert [d.thread for d in decisions if isinstance(d, CounterOffer)] == ["t2"]


def test_a_seller_that_does_not_answer_a_counter_offer_is_dropped() -> None:
    past, _ = hear(a_round(BARGAINS), 900).step(0)
    past, decisions = past.step(10_000)
    assert decisions == [
        RejectOffer("t0", "no answer in time"),
        Fail("none of 1 offers was acceptable, stood long enough and was confirmed"),
    ]


def test_bargaining_ends_in_an_accept_when_the_seller_comes_down() -> None:
    past, decisions = hear(a_round(BARGAINS), 400).step(0)
    price, now_ms = 400, 0
    while of(CounterOffer, decisions):
        now_ms += 100
        price -= 40
        past = past.offered("t0", seller(0), at(price), valid_until_ms=NEVER, now_ms=now_ms)
        past, decisions = past.step(now_ms)
    assert of(AcceptOffer, decisions) == [AcceptOffer("t0", at(160), now_ms + 5_000)]


def test_a_good_offer_waits_a_little_for_a_better_ranked_thread() -> None:
    ranking = Ranking(grade_units=10, salt=b"salt")
    # t0 is dearer to the strategy but ranks first for its grade; t1 could be taken at once.
    past = a_round(BARGAINS, ranking=ranking)
    past = past.offered(
        "t0", seller(0), replace(at(310), quality=99), valid_until_ms=NEVER, now_ms=0
    )
    past = past.offered("t1", seller(1), at(100), valid_until_ms=NEVER, now_ms=0)
    past, decisions = past.step(0)
    assert [type(decision) for decision in decisions] == [CounterOffer, Wait]
    assert decisions[-1] == Wait(500)
    assert past.step(499)[1] == [Wait(500)]
    assert of(AcceptOffer, past.step(500)[1]) == [AcceptOffer("t1", at(100), 5_500)]
    # If the better one comes down in time, it is taken.
    down = replace(at(100), quality=99)
    better = past.offered("t0", seller(0), down, valid_until_ms=NEVER, now_ms=300)
    assert of(AcceptOffer, better.step(300)[1]) == [AcceptOffer("t0", down, 5_300)]


def test_a_good_offer_that_soon_lapses_is_not_gambled_with() -> None:
    past = a_round(BARGAINS, ranking=Ranking(grade_units=10))
    past = past.offered(
        "t0", seller(0), replace(at(310), quality=99), valid_until_ms=NEVER, now_ms=0
    )
    past = past.offered("t1", seller(1), at(100), valid_until_ms=1_200, now_ms=0)
    past, decisions = past.step(0)
    assert decisions[-1] == Wait(200)
    assert of(AcceptOffer, past.step(200)[1])


def test_what_the_policy_forbids_is_rejected_and_the_reason_stays_here() -> None:
    policy = Policy([SpendLimit(Budget({"day": 180})), CounterpartyBlocked({(seller(1), CAP)})])
    _past, decisions = hear(a_round(policy=policy), 200, 150, 170).step(0)
    assert decisions == [
        RejectOffer(
            "t1",
            "not acceptable",
            "the counterparty is blocked for this capability",
            "CounterpartyBlocked",
        ),
        RejectOffer(
            "t0", "not acceptable", "the limit 'day' does not cover the price", "SpendLimit"
        ),
        AcceptOffer("t2", at(170), 5_000),
        Wait(5_000),
    ]


def test_the_round_fails_with_its_likely_cause() -> None:
    nobody, decisions = a_round().step(1_000)
    assert decisions == [
        Fail("nobody made an offer: no seller of this capability heard the request in time")
    ]
    assert nobody.over
    past, decisions = hear(a_round(BARGAINS), 900, 800).step(0)
    past, decisions = replace(past, deadline_ms=5_000).step(5_000)
    assert decisions == [
        RejectOffer("t0", "not this time"),
        RejectOffer("t1", "not this time"),
        Fail("the time for the whole request ran out"),
    ]


def test_more_offers_may_come_after_the_first_were_refused() -> None:
    past, decisions = hear(
        a_round(TAKES_ALL, policy=Policy([PriceLimit(Role.BUYER, 10)])), 200
    ).step(0)
    assert [type(decision) for decision in decisions] == [RejectOffer, Wait]
    assert decisions[-1] == Wait(1_000)
    past, decisions = hear(past, 5, now_ms=10).step(10)
    assert of(AcceptOffer, decisions)


def test_who_may_still_make_an_offer() -> None:
    past = hear(a_round(plan=Plan(bids_max=2, bargain_with=1)), 200)
    with pytest.raises(Refused, match="one thread for each seller"):
        past.offered("t9", seller(0), at(1), valid_until_ms=NEVER, now_ms=0)
    with pytest.raises(Refused, match="another seller"):
        past.offered("t0", seller(5), at(1), valid_until_ms=NEVER, now_ms=0)
    with pytest.raises(Refused, match="no more offers"):
        past.offered("t1", seller(1), at(1), valid_until_ms=NEVER, now_ms=1_000)
    full = hear(past, 250)
    with pytest.raises(Refused, match="capacity"):
        hear(full, 1)
    over, _ = replace(past, deadline_ms=10).step(10)
    with pytest.raises(Refused, match="is over"):
        hear(over, 1)
    assert full.offered("t0", seller(0), at(200), valid_until_ms=NEVER, now_ms=0) == full


def test_no_offer_slips_into_a_thread_that_is_rejected_or_accepted() -> None:
    past, _ = hear(a_round(), 200, 150).step(0)
    with pytest.raises(Refused, match="accepted"):
        past.offered("t1", seller(1), at(290), valid_until_ms=NEVER, now_ms=1)
    past, _ = past.refused("t0", now_ms=1)
    with pytest.raises(Refused, match="out"):
        past.offered("t0", seller(0), at(1), valid_until_ms=NEVER, now_ms=2)


def test_failures_and_time_make_an_offer_dearer() -> None:
    slow = Proposal(price_units=100, deliver_within_s=60)
    fast = Proposal(price_units=120, deliver_within_s=10)
    offers = {"slow": (seller(1), slow), "fast": (seller(2), fast)}

    def first(ranking: Ranking, scores: Scorebook) -> str:
        return ranking.rank(offers, scores, CAP, now_ms=0)[0].thread

    assert first(Ranking(), Scorebook()) == "slow"
    assert first(Ranking(second_units=1), Scorebook()) == "fast"
    failed = Scorebook().record(seller(1), CAP, Outcome.UNDELIVERED, now_ms=0)
    assert first(Ranking(), failed) == "fast"
    dear_failure = Ranking(failure_units=10_000)
    known = Scorebook()
    for _ in range(9):
        known = known.record(seller(2), CAP, Outcome.DELIVERED, now_ms=0)
    assert first(dear_failure, known) == "fast"


def test_metered_offers_are_ranked_by_what_the_work_is_expected_to_use() -> None:
    cheap_output = Proposal(
        price_units=1_000,
        deliver_within_s=60,
        input_price_units=900_000,
        output_price_units=100_000,
    )
    cheap_input = Proposal(
        price_units=1_000,
        deliver_within_s=60,
        input_price_units=100_000,
        output_price_units=900_000,
    )
    fixed = Proposal(price_units=400, deliver_within_s=60)
    offers = {"out": (seller(1), cheap_output), "in": (seller(2), cheap_input)}
    offers["fixed"] = (seller(3), fixed)

    def order(usage: Usage | None) -> list[str]:
        ranked = Ranking(usage=usage).rank(offers, Scorebook(), CAP, now_ms=0)
        return [row.thread for row in ranked]

    assert order(Usage(input_tokens=100, output_tokens=900)) == ["out", "fixed", "in"]
    assert order(Usage(input_tokens=900, output_tokens=100)) == ["in", "fixed", "out"]
    assert order(None)[0] == "fixed"


@given(st.data())
def test_the_ranking_does_not_depend_on_the_order_of_arrival(data: st.DataObject) -> None:
    drawn = data.draw(st.lists(proposals(), min_size=2, max_size=8))
    # Equal offers are the hard case: only the hash can tell them apart.
    drawn += [drawn[0]] * data.draw(st.integers(0, 3))
    offers = {f"t{i}": (seller(i), proposal) for i, proposal in enumerate(drawn)}
    shuffled = dict(data.draw(st.permutations(list(offers.items()))))
    ranking = Ranking(
        second_units=data.draw(st.integers(0, 100)), salt=data.draw(st.binary(max_size=8))
    )
    scores = Scorebook()
    for index in data.draw(st.lists(st.integers(0, 8))):
        scores = scores.record(seller(index), CAP, Outcome.SILENT, now_ms=0)
    ranked = ranking.rank(offers, scores, CAP, now_ms=0)
    assert ranked == ranking.rank(shuffled, scores, CAP, now_ms=0)
    assert [row.cost_units for row in ranked] == sorted(row.cost_units for row in ranked)


def test_ties_go_by_a_salted_hash_that_nobody_can_aim_at() -> None:
    offers = {f"t{i}": (seller(i), at(100)) for i in range(4)}
    winners = {
        Ranking(salt=bytes((salt,))).rank(offers, Scorebook(), CAP, now_ms=0)[0].thread
        for salt in range(64)
    }
    assert winners == set(offers)


def test_impossible_plans_are_refused() -> None:
    for wrong in (
        {"bids_min": 0},
        {"bids_min": 17},
        {"bids_max": 10_000},
        {"bargain_with": 0},
        {"bargain_with": 17},
        {"agree_within_ms": 0},
        {"patience_ms": -1},
        {"rounds": -1},
        {"rounds": 16},
    ):
        with pytest.raises(ConfigurationError):
            Plan(**wrong)  # type: ignore[arg-type] # One of them is a bool, and not meant.


class Market:
    """Drives a round with random sellers and checks after every step what must always hold."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.now_ms = 0
        self.accepting = ""
        self.rejected: set[str] = set()
        self.ended = ""
        strategy = data.draw(st.sampled_from((TAKES_ALL, BARGAINS)))
        plan = Plan(
            bids_min=data.draw(st.integers(1, 4)),
            bids_max=6,
            rounds=data.draw(st.integers(0, 15)),
            by_rounds=data.draw(st.booleans()),
        )
        policy = Policy([SpendLimit(Budget({"day": 250}))])
        self.past = a_round(strategy, plan=plan, policy=policy)

    def run(self) -> None:
        for _ in range(40):
            self.event()
            self.step()
            if self.past.over:
                return
        # Nobody says anything more: silence alone must bring the round to its end.
        for _ in range(100):
            if self.past.over:
                return
            self.step(patient=True)
        raise AssertionError("the round does not end")

    def event(self) -> None:
        kinds = ("offer", "offer", "agree", "refuse", "drop", "wait")
        kind = self.data.draw(st.sampled_from(kinds))
        thread = f"t{self.data.draw(st.integers(0, 7))}"
        if kind == "offer":
            price = self.data.draw(st.integers(1, 600))
            valid_until_ms = self.now_ms + self.data.draw(st.integers(0, 20_000))
            try:
                self.past = self.past.offered(
                    thread,
                    seller(int(thread[1:])),
                    at(price),
                    valid_until_ms=valid_until_ms,
                    now_ms=self.now_ms,
                )
            except Refused:
                return
            assert thread not in self.rejected
        elif kind == "agree":
            try:
                self.past, decisions = self.past.agreed(thread)
            except LocalProtocolError:
                assert thread != self.accepting
                return
            assert thread == self.accepting
            self.note(decisions)
        elif kind == "refuse":
            self.past, decisions = self.past.refused(thread, now_ms=self.now_ms)
            if thread == self.accepting:
                assert of(Mark, decisions)
                self.accepting = ""
        elif kind == "drop":
            scores = self.past.scores
            self.past = self.past.dropped(thread)
            assert self.past.scores is scores
            if thread == self.accepting:
                self.accepting = ""
                assert self.past.reserved_units == 0
        self.now_ms += self.data.draw(st.integers(0, 800))

    def step(self, *, patient: bool = False) -> None:
        before = self.past
        self.past, decisions = before.step(self.now_ms)
        assert before.step(self.now_ms) == (self.past, decisions), "a round is a value"
        self.note(decisions)
        again, more = self.past.step(self.now_ms)
        assert again == self.past
        assert all(isinstance(decision, Wait) for decision in more)
        if self.past.over:
            assert not of(Wait, decisions)
        else:
            wait = decisions[-1]
            assert isinstance(wait, Wait)
            assert self.now_ms < wait.until_ms <= 30_000
            if patient or self.data.draw(st.booleans()):
                self.now_ms = wait.until_ms

    def note(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Mark) and decision.outcome is Outcome.SILENT:
                assert self.now_ms >= self.past.opened_ms
                self.accepting = ""
            elif isinstance(decision, AcceptOffer):
                assert not self.accepting, "two accepts at once"
                assert decision.thread not in self.rejected
                assert decision.proposal.price_units <= 250
                assert self.past.reserved_units == decision.proposal.price_units
                entry = self.past.entries[decision.thread]
                assert self.now_ms < entry.last_offer.valid_until_ms
                assert entry.last_offer.proposal == decision.proposal
                self.accepting = decision.thread
            elif isinstance(decision, CounterOffer):
                assert decision.thread not in self.rejected
                assert decision.proposal.price_units <= 250
            elif isinstance(decision, RejectOffer):
                assert decision.thread not in self.rejected
                self.rejected.add(decision.thread)
        if not self.accepting:
            assert self.past.reserved_units == 0


@given(st.data())
def test_whatever_sellers_do_a_round_ends_and_never_accepts_two(data: st.DataObject) -> None:
    Market(data).run()
