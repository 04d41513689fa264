"""Desks that deal with each other: repetitions, races, restarts, and large bodies."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coase.agents.asks import AskState, BuyerStrategy, Decision, Verdict
from coase.agents.buyer import AGREE_WITHIN_MS, BuyerDesk
from coase.agents.purse import OpenPurse, exposure
from coase.agents.seller import OFFER_VALID_MS, SellerDesk, Ware
from coase.agents.steps import OnChain, Transmit
from coase.protocol.effects import Submit
from coase.protocol.errors import BudgetExhausted, ConfigurationError, LocalProtocolError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import (
    PIECE_SIZE_MAX_BYTES,
    SCHEMA_MAX_CHARS,
    Evidence,
    Ruling,
    terms_to_wire,
)
from coase.protocol.session import require_signer_of
from coase.protocol.states import State
from coase.protocol.terms import ack_digest
from tests.agents.desks import CAPABILITY, SCHEMA, Cheapest, Fixed, Market, head_of, kind_of
from tests.protocol.threads import TERMS


def test_a_deal_from_asking_to_settling() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask(counters=1)
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    assert ask.outcome.result is not None
    assert ask.outcome.result.result == market.result
    assert market.chain.balance(market.sellers[1].desk.me) == 10**9 + 800
    market.pass_ms(12_000)
    for seat in market.seats.values():
        assert not seat.desk.threads
        assert seat.desk.next_ms() is None
        assert not [letter for letter in seat.desk.dead if "nobody answered" in letter.reason]


def test_a_task_is_acknowledged_by_the_sellers_signature_on_its_input() -> None:
    market = Market()
    market.works = False
    ask = market.ask()
    market.until(lambda: "ack" in market.kinds(market.buyer))
    wire = next(wire for kind, _, wire in market.sent if kind == "ack")
    thread = market.buyer.desk.threads[ask.chosen]
    digest = ack_digest(market.chain.domain, thread.job_id, thread.agreed_terms.work.task)
    signature = bytes.fromhex(json.loads(head_of(wire)["body"])["signature"][2:])
    require_signer_of(digest, signature, thread.counterparty)


def test_who_was_not_taken_is_told_at_once() -> None:
    market = Market(prices=(1_000, 900))
    market.works = False
    market.ask()
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    assert market.kinds(market.sellers[0]).count("withdraw") == 1
    assert not market.sellers[0].desk.threads
    assert market.sellers[1].desk.threads


@pytest.mark.parametrize(
    "changes",
    [
        {"asset": "0x" + "34" * 20},
        {"schemas": "0x" + "00" * 32},
        {"capability": "echo-00000000"},
        {"chain_id": 2},
        {"escrow": "0x" + "45" * 20},
        {"settlements": ["x402"]},
        {"verifications": ["replay"]},
        {"reply_by_ms": 1},
    ],
)
def test_a_request_for_something_else_is_not_bid_for(changes: dict[str, object]) -> None:
    market = Market()
    market.ask()
    wire = next(wire for kind, _, wire in market.sent if kind == "request")
    codec = market.buyer.desk.codec
    seller = market.sellers[0].desk
    for changed, bids in (({}, 1), (changes, 0)):
        before = len(seller.threads)
        request_id = keccak256(repr(changed).encode())[:16].hex()
        asked = codec.encode(
            kind="request",
            message_id=request_id,
            to="*",
            deal=request_id,
            re="",
            sent_ms=market.now_ms,
            expires_ms=market.now_ms + 1_000,
            plain=json.dumps({**json.loads(head_of(wire)["body"]), **changed}).encode(),
            key="",
        )
        step = seller.hear(asked, now_ms=market.now_ms)
        assert len(seller.threads) == before + bids
        assert len([e for e in step.effects if isinstance(e, Transmit)]) == bids


# ---- repetitions ---------------------------------------------------------------------------


def test_a_repeated_accept_gets_the_same_agreed() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) == "agreed"
    market.ask()
    market.until(lambda: market.kinds().count("agreed") >= 3)
    agreed = [wire for kind, _, wire in market.sent if kind == "agreed"]
    assert len(set(agreed)) == 1
    accepts = [wire for kind, _, wire in market.sent if kind == "accept"]
    assert len({head_of(wire)["id"] for wire in accepts}) == 1
    assert len(market.sellers[0].desk.threads) == 1


def test_an_answer_that_may_still_wait_for_the_disk_is_not_repeated_before_it() -> None:
    market = Market()
    market.ask()
    market.until(lambda: "agreed" in market.kinds())
    accept = next(wire for kind, _, wire in market.sent if kind == "accept")
    step = market.sellers[0].desk.hear(accept, now_ms=market.now_ms)
    assert [kind_of(effect.wire) for effect in step.effects if isinstance(effect, Transmit)] == [
        "agreed"
    ]
    assert step.wait


def test_what_is_said_again_waits_for_the_disk_too() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) == "accept"
    market.ask()
    market.until(lambda: "accept" in market.kinds())
    step = market.buyer.desk.tick(now_ms=market.now_ms + 1_000)
    assert [e for e in step.effects if isinstance(e, Transmit)]
    assert step.wait


def test_ids_are_forgotten_when_no_clock_can_take_them_for_alive() -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: ask.outcome)
    desk = market.sellers[0].desk
    assert len(desk._heard) > 0
    market.now_ms += 300_000 + 60_000
    desk.tick(now_ms=market.now_ms + 1)
    assert len(desk._heard) == 0


def test_an_id_that_somebody_else_used_before_is_not_used_up() -> None:
    market = Market()
    market.ask()
    request = next(wire for kind, _, wire in market.sent if kind == "request")
    head = head_of(request)
    seller = market.sellers[0].desk
    thief = Market(prices=()).buyer.desk.codec
    thief.identity = Identity(keccak256(b"thief"))
    copied = thief.encode(
        kind="request",
        message_id=head["id"],
        to="*",
        deal=head["deal"],
        re="",
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_000,
        plain=head["body"].encode(),
        key="",
    )
    seller.hear(copied, now_ms=market.now_ms)
    assert len(seller.threads) == 1
    market.until(lambda: "accept" in market.kinds())
    assert "agreed" in market.kinds(market.buyer)


# ---- races -----------------------------------------------------------------------------------


def test_a_task_that_overtakes_the_sight_of_the_lock_is_not_lost() -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    seller, buyer = market.sellers[0], market.buyer
    market.now_ms += 1_000
    market.chain.seal(market.now_ms // 1_000)
    views = {job: market.chain.view(job) for job in buyer.desk.watched()}
    head = market.chain.head()
    look = buyer.desk.look(views, head=head, depth_s=head.time_s, now_ms=market.now_ms)
    market.perform(buyer, look)
    market.deliver()
    assert seller.desk.threads[ask.chosen].state is State.AGREED
    assert seller.desk.threads[ask.chosen].task is not None
    assert "nack" not in market.kinds()
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_a_hash_without_bytes_does_not_stop_a_buyer_that_looked_late() -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    thread = market.buyer.desk.threads[ask.chosen]
    market.chain.seal(market.now_ms // 1_000 + 1)
    market.chain.send("quick", Submit(thread.agreed_terms, b"\1" * 32), thread.counterparty)
    market.now_ms += 2_000
    market.block()
    assert market.buyer.desk.threads[ask.chosen].state is State.DELIVERED
    assert "task" in market.kinds()


def test_a_lock_that_goes_away_while_the_seller_works_makes_it_work_again() -> None:
    market = Market()
    market.works = False
    ask = market.ask()
    market.until(lambda: "task" in market.kinds())
    market.deliver()
    seller = market.sellers[0].desk
    thread = seller.threads[ask.chosen]
    seller._put(replace(thread, state=State.AGREED))
    done = {"result": "{}", "to_seller_units": 1_000, "usage": {}, "salt": b"\1" * 32}
    assert not seller.work_done(ask.chosen, **done, now_ms=market.now_ms).effects  # type: ignore[arg-type]
    seller._put(thread)
    market.works = True
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_when_the_first_choice_is_full_the_next_best_is_taken() -> None:
    market = Market(prices=(900, 1_000))
    ask = market.ask(bids_max=5)
    market.deliver()
    full = market.sellers[0].desk.seller
    assert isinstance(full, SellerDesk)
    full.wares[CAPABILITY] = Ware("echo", SCHEMA, SCHEMA, Fixed(900), capacity=0)
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.counterparty == market.sellers[1].desk.me
    assert ask.outcome.state is State.SETTLED
    nack = next(wire for kind, _, wire in market.sent if kind == "nack")
    assert json.loads(head_of(nack)["body"])["reason"] == "capacity"


def test_a_deal_that_is_over_says_nothing_more() -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    market.lost = lambda to, wire: to == market.sellers[0].desk.me
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.REFUNDED
    assert len(market.buyer.desk._outbox) == 0
    tasks = market.kinds().count("task")
    market.pass_ms(10_000)
    assert market.kinds().count("task") == tasks > 3


def test_nobody_waits_for_ever_for_an_agreement() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) in ("accept", "nack")
    ask = market.ask()
    market.until(lambda: ask.state is AskState.ENDED, within_ms=AGREE_WITHIN_MS + 5_000)
    assert ask.why == "no offer was acceptable"
    market.pass_ms(OFFER_VALID_MS)
    assert not market.sellers[0].desk.threads


# ---- restarts --------------------------------------------------------------------------------


def test_a_restart_at_any_record_comes_back_to_the_same_threads() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask(counters=1)
    market.until(lambda: "settle" in market.kinds())
    for seat in (market.buyer, market.sellers[1]):
        whole = market.restart(seat)
        for deal, thread in seat.desk.threads.items():
            assert whole.desk.threads[deal] == thread
        for cut in range(len(seat.records)):
            again = market.restart(whole, records=seat.records[:cut])
            assert all(thread.state for thread in again.desk.threads.values())
            whole = again
    assert ask.chosen


@pytest.mark.parametrize("kind", ["accept", "agreed", "task", "result", "settle"])
@pytest.mark.parametrize("side", ["buyer", "seller"])
def test_both_sides_go_on_after_a_restart_in_the_middle(kind: str, side: str) -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: kind in market.kinds())
    market.queue.clear()
    market.restart(market.buyer if side == "buyer" else market.sellers[0])
    settled = market.buying.asks[ask.request_id]
    market.until(lambda: settled.outcome)
    assert settled.outcome is not None
    assert settled.outcome.state is State.SETTLED
    assert market.chain.balance(market.sellers[0].desk.me) == 10**9 + 1_000


def test_after_a_restart_the_same_accept_gets_the_same_signature() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) == "agreed"
    market.ask()
    market.until(lambda: "agreed" in market.kinds())
    before = next(wire for kind, _, wire in market.sent if kind == "agreed")
    again = market.restart(market.sellers[0])
    accept = next(wire for kind, _, wire in market.sent if kind == "accept")
    step = again.desk.hear(accept, now_ms=market.now_ms)
    after = next(e.wire for e in step.effects if isinstance(e, Transmit))
    assert head_of(after)["id"] == head_of(before)["id"]
    assert not step.records


def test_a_restart_does_not_offer_twice_for_one_request() -> None:
    market = Market()
    market.ask()
    market.deliver()
    request = next(wire for kind, _, wire in market.sent if kind == "request")
    again = market.restart(market.sellers[0])
    assert not again.desk.hear(request, now_ms=market.now_ms).records


# ---- large bodies ----------------------------------------------------------------------------


@pytest.mark.parametrize("lose", [0, 3])
def test_a_mebibyte_goes_through_in_pieces_with_every_third_lost(lose: int) -> None:
    market = Market()
    count = 0

    def lost(to: str, wire: bytes) -> bool:
        nonlocal count
        count += 1
        return bool(lose and count % lose == 0 and kind_of(wire) in ("piece", "ack"))

    market.lost = lost
    market.result = '{"x":"' + "r" * 2**20 + '"}'
    ask = market.ask("t" * 2**20)
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    assert ask.outcome.result is not None
    assert ask.outcome.result.result == market.result
    if not lose:
        pieces = 2 * -(-(2**20 + 500) // (PIECE_SIZE_MAX_BYTES - 256))
        assert market.kinds().count("piece") == pieces


def test_pieces_that_a_crash_forgot_are_sent_again() -> None:
    market = Market()
    last: list[bytes] = []

    def lose_one(to: str, wire: bytes) -> bool:
        # The last piece of the task never comes, until the seller was born again.
        lost = kind_of(wire) == "piece" and len(last) < 3 and len(wire) < 40_000
        last.extend([wire] if lost else [])
        return lost

    market.lost = lose_one
    ask = market.ask("t" * 100_000)
    market.until(lambda: last)
    market.pass_ms(500)
    market.restart(market.sellers[0])
    market.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_a_task_that_no_pieces_can_carry_is_not_asked_for() -> None:
    market = Market()
    with pytest.raises(LocalProtocolError, match="a task has at most"):
        market.ask("x" * 46_000_000)
    assert not market.buying.asks


# ---- evidence --------------------------------------------------------------------------------


def evidence(market: Market, result: str) -> dict[str, object]:
    thread = next(t for t in market.buyer.desk.threads.values() if t.job_id)
    return {
        "terms": terms_to_wire(thread.agreed_terms),
        "task_salt": "0x" + "00" * 32,
        "task": "t",
        "result_salt": "0x" + "00" * 32,
        "result": result,
        "input_schema": "{}",
        "output_schema": "{}",
        "claim": "bad",
    }


class Court:
    """Takes what it is shown, but for the first few times."""

    def __init__(self, *, deaf: int = 0) -> None:
        self.shown: list[str] = []
        self.deaf = deaf

    def take(self, sender: str, evidence: Evidence) -> str:
        self.deaf -= 1
        if self.deaf >= 0:
            return ""
        self.shown.append(evidence.result)
        return "ca5e"

    def ruled(self, sender: str, ruling: Ruling) -> None:
        raise NotImplementedError

    def recall(self, sender: str, evidence: Evidence) -> None:
        self.shown.append(f"again {evidence.result}")


@pytest.mark.parametrize("size", [10, 150_000])
def test_evidence_that_is_not_taken_yet_is_said_again_until_it_is(size: int) -> None:
    market = Market(prices=(1_000, 900))
    market.works = False
    market.ask()
    market.until(lambda: "task" in market.kinds())
    arbiter = market.sellers[0].desk
    court = arbiter.court = Court(deaf=2)
    step = market.buyer.desk.tell(
        arbiter.me,
        "evidence",
        evidence(market, "r" * size),
        now_ms=market.now_ms,
        key=arbiter.codec.public_key(arbiter.inbox_secret),
        until_ms=market.now_ms + 60_000,
    )
    market.perform(market.buyer, step)
    market.pass_ms(40_000)
    assert court.shown == ["r" * size]
    assert court.deaf < 0
    waiting = market.buyer.desk._outbox._out.values()
    assert "evidence" not in {out.message.kind for out in waiting}


@pytest.mark.parametrize("size", [10, 150_000])
def test_evidence_reaches_an_arbiter_once_though_it_is_said_twice(size: int) -> None:
    market = Market(prices=(1_000, 900))
    market.works = False
    market.ask()
    market.until(lambda: "task" in market.kinds())
    arbiter = market.sellers[0].desk
    court = arbiter.court = Court()
    step = market.buyer.desk.tell(
        arbiter.me,
        "evidence",
        evidence(market, "r" * size),
        now_ms=market.now_ms,
        key=arbiter.codec.public_key(arbiter.inbox_secret),
        until_ms=market.now_ms + 20_000,
    )
    lost = iter([True] * 3)
    market.lost = lambda to, wire: kind_of(wire) == "ack" and next(lost, False)
    market.perform(market.buyer, step)
    market.pass_ms(10_000)
    assert court.shown == ["r" * size]
    waiting = market.buyer.desk._outbox._out.values()
    assert "evidence" not in {out.message.kind for out in waiting}
    assert not [d for d in market.buyer.desk.dead if d.kind == "evidence"]


def test_who_is_no_arbiter_says_so() -> None:
    market = Market()
    market.works = False
    market.ask()
    market.until(lambda: "task" in market.kinds())
    other = market.sellers[0].desk
    step = market.buyer.desk.tell(
        other.me,
        "evidence",
        evidence(market, "r"),
        now_ms=market.now_ms,
        key=other.codec.public_key(other.inbox_secret),
    )
    market.perform(market.buyer, step)
    market.deliver()
    nack = next(wire for kind, _, wire in market.sent if kind == "nack")
    assert json.loads(head_of(nack)["body"])["reason"] == "unsupported"


# ---- what the owner's code may do wrong --------------------------------------------------------


class Says(BuyerStrategy):
    """A strategy that decides what it is told to."""

    def __init__(self, *decisions: tuple[Verdict, int]) -> None:
        self.decisions = list(decisions)

    def decide(self, offers, *, closing: bool, opened_ms: int, now_ms: int):  # type: ignore[no-untyped-def]
        if not closing:
            return []
        now, self.decisions = self.decisions, [(Verdict.ACCEPT, 0)]
        return [
            Decision(offer.deal, verdict, units)
            for offer, (verdict, units) in zip(offers, now, strict=False)
        ]


def test_a_counter_offer_against_the_rules_is_told_and_harms_nothing() -> None:
    market = Market()
    ask = market.ask()
    ask.strategy = Says((Verdict.COUNTER, 0))
    market.until(lambda: ask.outcome)
    assert "bad_decision" in [notice.kind for notice in market.buyer.notices]
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_two_rejections_at_once_are_two_rejections() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask()
    ask.strategy = Says((Verdict.REJECT, 0), (Verdict.REJECT, 0))
    market.until(lambda: ask.state is AskState.ENDED)
    assert market.kinds().count("reject") == 2
    assert ask.why == "no offer was acceptable"


def test_a_thread_that_has_ended_is_not_opened_again() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask(bids_max=5)
    ask.strategy = Says((Verdict.REJECT, 0))
    market.until(lambda: "reject" in market.kinds())
    market.deliver()
    # A seller that forgot the thread hears the request once more, and offers once more.
    request = next(wire for kind, _, wire in market.sent if kind == "request")
    rejected = next(s for s in market.sellers if not s.desk.threads)
    again = market.restart(rejected, records=[])
    ask.strategy, ask.state = Cheapest(), AskState.OPEN
    before = market.buyer.desk.counts.get("refused_capacity", 0)
    market.perform(again, again.desk.hear(request, now_ms=market.now_ms - 1_500))
    assert again.desk.threads
    market.deliver()
    assert market.buyer.desk.counts["refused_capacity"] == before + 1


def test_only_one_offer_is_accepted_whatever_the_strategy_says() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask()
    ask.strategy = Says((Verdict.ACCEPT, 0), (Verdict.ACCEPT, 0))
    market.until(lambda: ask.outcome)
    accepts = {head_of(wire)["id"] for kind, _, wire in market.sent if kind == "accept"}
    assert len(accepts) == 1


class EmptyPurse(OpenPurse):
    """Refuses everything, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def reserve(
        self, deal: str, units: int, counterparty: str, *, now_ms: int, account: str = ""
    ) -> None:
        self.asked.append(units)
        raise BudgetExhausted(limit="day", asked_units=units, left_units=0)

    def release(self, deal: str, *, now_ms: int) -> None:
        raise AssertionError("nothing was reserved")


class Ledger(OpenPurse):
    """Remembers what is set aside."""

    def __init__(self) -> None:
        self.aside: dict[str, int] = {}
        self.most = 0

    def reserve(
        self, deal: str, units: int, counterparty: str, *, now_ms: int, account: str = ""
    ) -> None:
        self.aside[deal] = units
        self.most = max(self.most, sum(self.aside.values()))

    def release(self, deal: str, *, now_ms: int) -> None:
        self.aside.pop(deal, None)


def test_what_is_set_aside_is_the_price_and_comes_back_at_the_end_and_after_a_restart() -> None:
    market = Market(prices=(1_000, 900))
    market.buying.reserve = purse = Ledger()
    ask = market.ask()
    market.until(lambda: "task" in market.kinds())
    assert purse.aside == {ask.chosen: 900}
    market.restart(market.buyer, purse=(again := Ledger()))
    assert again.aside == purse.aside
    settled = market.buying.asks[ask.request_id]
    market.until(lambda: settled.outcome)
    assert (again.aside, again.most) == ({}, 900)


def test_what_was_set_aside_for_an_agreement_that_never_came_comes_back() -> None:
    market = Market()
    market.buying.reserve = purse = Ledger()
    market.lost = lambda to, wire: kind_of(wire) == "accept"
    ask = market.ask()
    market.until(lambda: ask.state is AskState.ENDED)
    assert (purse.aside, purse.most) == ({}, 1_000)


def test_what_a_deal_may_cost_is_its_price_and_its_bond() -> None:
    assert exposure(replace(TERMS, price_units=1_000, bond_units=100)) == 1_100


def test_an_exhausted_budget_ends_the_request_and_says_which_limit() -> None:
    market = Market()
    market.buying.reserve = purse = EmptyPurse()
    market.buying.reserve.release = lambda deal, *, now_ms: None  # type: ignore[method-assign]
    ask = market.ask()
    market.until(lambda: ask.state is AskState.ENDED)
    assert "the limit 'day' has 0 units left" in ask.why
    assert "accept" not in market.kinds()
    reject = next(wire for kind, _, wire in market.sent if kind == "reject")
    assert b"limit" not in reject
    assert purse.asked == [1_000]


def test_a_quote_that_makes_no_terms_leaves_no_thread_behind() -> None:
    market = Market(prices=(0,))
    market.ask()
    market.deliver()
    seller = market.sellers[0]
    assert not seller.desk.threads
    assert not seller.records
    assert seller.desk.counts["late_move"] == 1


def test_a_ware_whose_schema_cannot_be_described_is_not_sold() -> None:
    market = Market()
    seller = market.sellers[0].desk.seller
    assert isinstance(seller, SellerDesk)
    large = {"type": "object", "title": "x" * SCHEMA_MAX_CHARS}
    with pytest.raises(ConfigurationError, match="a schema of 'big'"):
        seller.sell(Ware("big", large, SCHEMA, Fixed(1)))


def test_requests_that_ended_are_forgotten_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coase.agents.buyer.ASKS_MAX", 3)
    market = Market(prices=())
    asks = [market.ask(bids_max=1) for _ in range(10)]
    market.until(lambda: all(ask.state is AskState.ENDED for ask in asks))
    assert len(market.buying.asks) == 10
    last = market.ask(bids_max=1)
    assert len(market.buying.asks) == 4
    market.until(lambda: last.state is AskState.ENDED)
    assert isinstance(market.buying, BuyerDesk)
    assert market.buyer.desk.next_ms() is None


def test_a_call_that_went_through_is_not_made_again_while_the_chain_shows_it() -> None:
    market = Market()
    market.works = False
    ask = market.ask()
    market.until(lambda: "task" in market.kinds())
    desk = market.buyer.desk
    step = desk.call_ended(f"{ask.chosen}:open@{desk.me}", "", retry_ms=500, now_ms=market.now_ms)
    assert not step.effects
    market.pass_ms(2_000)
    assert not [e for e in desk.tick(now_ms=market.now_ms).effects if isinstance(e, OnChain)]
    due = desk.next_ms()
    assert due is None or due > market.now_ms  # And it wakes nobody up.
