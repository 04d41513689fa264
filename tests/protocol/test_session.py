"""A thread from both ends: what moves it, what must not, and what its holder owes the world."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from coase.protocol.errors import BadSignature, LocalProtocolError, Refused, RemoteProtocolError
from coase.protocol.messages import LOCK_BY_MAX_S, ROUNDS_MAX, WINDOW_MAX_S, terms_to_wire
from coase.protocol.session import (
    Duty,
    Margins,
    Thread,
    check_terms,
    deadline_ms,
    duties,
    evidence_hash,
    fail,
    judge,
    limit_s,
    require_signer_of,
    say,
    see,
    tick,
)
from coase.protocol.states import DEAL, TERMINAL, THREAD, Role, State
from coase.protocol.types import UNITS_MAX, ZERO_ADDRESS, How, JobView, Phase
from tests.protocol.threads import (
    ANSWERED,
    BUYER,
    CLOSED,
    DELIVERED,
    DISPUTED,
    DOMAIN,
    MOVES,
    NOW_MS,
    NOW_S,
    SELLER,
    STRANGER,
    TERMS,
    WORKING,
    Pair,
    at,
)

MARGINS = Margins(chain_s=5, settle_patience_ms=4_000)
ROWS = {**THREAD, **DEAL["escrow"]}


# ---- every cell --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "role"), [cell for cell in product(State, Role) if cell[1] in ("buyer", "seller")]
)
def test_every_move_in_every_state_from_both_ends(state: State, role: Role) -> None:
    other = Role.SELLER if role is Role.BUYER else Role.BUYER
    for kind in MOVES:
        pair = at(state)
        if kind == "settle" and state in DEAL_STATES:
            pair.speak(Role.SELLER, "result")
        before = dict(pair.threads)
        message = pair.message(role, kind)
        after = ROWS.get((state, role, kind))
        if after is None:
            with pytest.raises(LocalProtocolError, match=f"{role} may not"):
                say(before[role], message, now_ms=pair.now_ms)
            with pytest.raises(RemoteProtocolError, match=f"{role} may not"):
                pair.hear(other, message)
        else:
            said = say(before[role], message, now_ms=pair.now_ms)
            heard = pair.hear(other, message)
            assert said.state is heard.state is after
            assert said.history[-1] == heard.history[-1]
            assert said.history[:-1] == before[role].history
        assert pair.threads == before  # The old threads are as they were, whatever came of it.


DEAL_STATES = {state for state, _, _ in DEAL["escrow"]}


def test_only_the_two_sides_have_a_say() -> None:
    pair = at(State.OFFERED)
    message = replace(pair.message(Role.BUYER, "accept"), sender=STRANGER.address)
    with pytest.raises(RemoteProtocolError, match="not a side"):
        pair.hear(Role.SELLER, message)


# ---- terms -----------------------------------------------------------------------------------

BAD_TERMS: list[tuple[str, dict[str, object]]] = [
    ("buyer", {"buyer": STRANGER.address}),
    ("seller", {"seller": STRANGER.address}),
    ("asset", {"asset": "0x" + "34" * 20}),
    ("price_units", {"price_units": 0, "bond_units": 0, "default_to_seller_units": 0}),
    ("price_units", {"price_units": UNITS_MAX + 1}),
    ("bond_units", {"bond_units": 1_001}),
    ("default_to_seller_units", {"default_to_seller_units": 1_001}),
    ("arbiter", {"arbiter": STRANGER.address}),
    ("bond_units", {"arbiter": ZERO_ADDRESS}),
    ("vault", {"vault": STRANGER.address}),
    ("stake_units", {"stake_units": 1}),
    ("lock_by_s", {"lock_by_s": NOW_S - 61}),
    ("lock_by_s", {"lock_by_s": NOW_S + LOCK_BY_MAX_S + 1, "deliver_by_s": NOW_S + 10_000}),
    ("deliver_by_s", {"deliver_by_s": NOW_S + 30}),
    ("deliver_by_s", {"deliver_by_s": NOW_S + WINDOW_MAX_S + 1}),
    ("dispute_s, answer_s, rule_s", {"dispute_s": WINDOW_MAX_S + 1}),
    ("dispute_s, answer_s, rule_s", {"answer_s": WINDOW_MAX_S + 1}),
    ("dispute_s, answer_s, rule_s", {"rule_s": WINDOW_MAX_S + 1}),
    ("dispute_s", {"dispute_s": 0}),
    ("answer_s, rule_s", {"answer_s": 0}),
    ("answer_s, rule_s", {"rule_s": 0}),
    ("work.capability", {"work": replace(TERMS.work, capability="echo-00000000")}),
    ("work.schemas", {"work": replace(TERMS.work, schemas=b"\1" * 32)}),
    ("work.task", {"work": replace(TERMS.work, task=b"\1" * 32)}),
    ("work.settlement", {"work": replace(TERMS.work, settlement="channel")}),
    ("work.verification", {"work": replace(TERMS.work, verification="replay")}),
    ("work.quality", {"work": replace(TERMS.work, quality=9)}),
]


@pytest.mark.parametrize(("name", "changes"), BAD_TERMS)
def test_terms_that_do_not_fit_are_refused_by_name(name: str, changes: dict[str, object]) -> None:
    pair = Pair()
    bad = replace(TERMS, **changes)  # type: ignore[arg-type]
    for role in (Role.BUYER, Role.SELLER):
        with pytest.raises(RemoteProtocolError, match=f"terms.{name} "):
            check_terms(bad, pair.threads[role], now_ms=NOW_MS)
    with pytest.raises(RemoteProtocolError, match=f"terms.{name} "):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "offer", terms=terms_to_wire(bad)))


def test_an_arbiter_is_none_of_the_sides_and_not_the_escrow() -> None:
    for arbiter in (BUYER.address, SELLER.address, DOMAIN.contract):
        pair = Pair()
        thread = pair.threads[Role.BUYER]
        request = thread.request.model_copy(update={"arbiters": [arbiter]})
        with pytest.raises(RemoteProtocolError, match=r"terms\.arbiter"):
            check_terms(
                replace(TERMS, arbiter=arbiter), replace(thread, request=request), now_ms=NOW_MS
            )


def test_terms_without_an_arbiter_need_neither_bond_nor_windows() -> None:
    plain = replace(TERMS, arbiter=ZERO_ADDRESS, bond_units=0, answer_s=0, rule_s=0)
    check_terms(plain, Pair().threads[Role.BUYER], now_ms=NOW_MS)


def test_a_thread_has_one_nonce() -> None:
    pair = at(State.COUNTERED)
    other = terms_to_wire(replace(TERMS, nonce=8))
    with pytest.raises(RemoteProtocolError, match="nonce"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "offer", terms=other))


# ---- negotiation -------------------------------------------------------------------------------


def test_a_proposal_answers_the_last_one() -> None:
    pair = at(State.COUNTERED)
    for answers in ("", "ab" * 16):
        with pytest.raises(RemoteProtocolError, match="does not answer"):
            pair.hear(Role.BUYER, pair.message(Role.SELLER, "offer", answers=answers))


@pytest.mark.parametrize("valid_until_ms", [0, NOW_MS, NOW_MS + LOCK_BY_MAX_S * 1000 + 1])
def test_a_proposal_is_valid_for_a_while_and_not_for_ever(valid_until_ms: int) -> None:
    pair = Pair()
    with pytest.raises(RemoteProtocolError, match="valid_until_ms"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "offer", valid_until_ms=valid_until_ms))


def test_bargaining_ends_after_sixteen_proposals_of_each_side() -> None:
    pair = Pair()
    for _ in range(ROUNDS_MAX):
        pair.speak(Role.SELLER, "offer")
        pair.speak(Role.BUYER, "counter")
    with pytest.raises(RemoteProtocolError, match=f"more than {ROUNDS_MAX}"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "offer"))


def test_an_accept_names_the_last_offer_and_its_terms_in_time() -> None:
    pair = at(State.OFFERED)
    for changes in ({"offer": "ab" * 16}, {"terms_digest": "0x" + "00" * 32}):
        with pytest.raises(RemoteProtocolError, match="other terms than were last offered"):
            pair.hear(Role.SELLER, pair.message(Role.BUYER, "accept", **changes))
    late = pair.message(Role.BUYER, "accept")
    pair.now_ms = pair.threads[Role.SELLER].valid_until_ms
    with pytest.raises(Refused, match="the offer expired 0 ms ago") as refused:
        pair.hear(Role.SELLER, late)
    assert refused.value.reason == "expired"


def test_an_accept_that_comes_after_its_own_time_binds_nobody() -> None:
    pair = at(State.OFFERED)
    message = pair.message(Role.BUYER, "accept", agree_by_ms=NOW_MS + 100)
    pair.now_ms += 100
    with pytest.raises(Refused, match="time to agree"):
        pair.hear(Role.SELLER, message)


def test_an_old_offer_cannot_be_accepted_after_a_newer_one() -> None:
    pair = at(State.OFFERED)
    old = pair.message(Role.BUYER, "accept")
    pair.speak(Role.BUYER, "counter")
    pair.speak(Role.SELLER, "offer")
    with pytest.raises(RemoteProtocolError, match="last offered"):
        pair.hear(Role.SELLER, old)


def test_agreed_is_the_sellers_signature_on_just_these_terms() -> None:
    pair = at(State.ACCEPTED)
    digest = pair.threads[Role.BUYER].job_id
    stranger = "0x" + STRANGER.sign(digest).hex()
    with pytest.raises(BadSignature):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "agreed", signature=stranger))
    with pytest.raises(RemoteProtocolError, match="other terms"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "agreed", terms_digest="0x" + "00" * 32))
    with pytest.raises(RemoteProtocolError, match="another accept"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "agreed", re="ab" * 16))
    agreed = pair.hear(Role.BUYER, pair.message(Role.SELLER, "agreed"))
    require_signer_of(digest, agreed.seller_signature, SELLER.address)


# ---- work ------------------------------------------------------------------------------------


def test_a_task_is_the_one_that_was_committed_to() -> None:
    pair = at(State.LOCKED)
    for changes in ({"task": "another"}, {"salt": "0x" + "06" * 32}):
        with pytest.raises(RemoteProtocolError, match="commit"):
            pair.hear(Role.SELLER, pair.message(Role.BUYER, "task", **changes))


def test_a_task_is_said_once_and_names_one_channel() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.BUYER, "task")
    pair.hear(Role.SELLER, pair.message(Role.BUYER, "task"))  # The same again is nothing new.
    for changes in ({"channel_salt": "0x" + "07" * 32}, {"withdraw_delay_s": 901}):
        with pytest.raises(RemoteProtocolError, match="second task"):
            pair.hear(Role.SELLER, pair.message(Role.BUYER, "task", **changes))


def test_a_task_may_come_before_its_seller_has_seen_the_lock() -> None:
    pair = at(State.AGREED)
    pair.speak(Role.BUYER, "task")
    seller = pair.threads[Role.SELLER]
    assert [d.name for d in owed(seller)] == []
    assert [d.name for d in owed(see(seller, WORKING, chain_s=NOW_S, now_ms=NOW_MS))] == ["work"]


def test_a_result_costs_at_most_the_price_and_is_signed() -> None:
    pair = at(State.LOCKED)
    with pytest.raises(RemoteProtocolError, match="costs more"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "result", to_seller_units="1001"))
    with pytest.raises(BadSignature):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "result", to_seller_units="901"))
    with pytest.raises(BadSignature):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "result", result="another"))


def test_the_first_result_stands() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.SELLER, "result")
    again = pair.hear(Role.BUYER, pair.message(Role.SELLER, "result"))
    assert again.result == pair.threads[Role.BUYER].result
    with pytest.raises(RemoteProtocolError, match="second result"):
        pair.hear(Role.BUYER, pair.message(Role.SELLER, "result", usage={"tokens": 4}))


def test_settle_names_the_result_and_its_amount_and_is_signed() -> None:
    pair = at(State.LOCKED)
    with pytest.raises(RemoteProtocolError, match="before there was a result"):
        pair.hear(Role.SELLER, pair.message(Role.BUYER, "settle"))
    pair.speak(Role.SELLER, "result")
    for changes, words in (
        ({"deliverable": "0x" + "00" * 32}, "another deliverable"),
        ({"to_seller_units": "899"}, "another amount"),
    ):
        with pytest.raises(RemoteProtocolError, match=words):
            pair.hear(Role.SELLER, pair.message(Role.BUYER, "settle", **changes))
    other = pair.body("result")["signature"]
    with pytest.raises(BadSignature):
        pair.hear(Role.SELLER, pair.message(Role.BUYER, "settle", signature=other))


def test_our_own_wrong_words_are_our_own_fault() -> None:
    pair = at(State.OFFERED)
    wrong = pair.message(Role.BUYER, "accept", offer="ab" * 16)
    with pytest.raises(LocalProtocolError, match="refused to say accept"):
        say(pair.threads[Role.BUYER], wrong, now_ms=NOW_MS)


# ---- chain and clock ---------------------------------------------------------------------------

VIEWS = {
    State.LOCKED: WORKING,
    State.DELIVERED: DELIVERED,
    State.DISPUTED: DISPUTED,
    State.ANSWERED: ANSWERED,
    State.SETTLED: CLOSED,
    State.REFUNDED: replace(CLOSED, to_seller_units=0, to_buyer_units=1_000),
    State.LAPSED: JobView(Phase.CANCELLED),
}


@pytest.mark.parametrize(
    ("before", "after"), list(product((s for s in State if s in DEAL_STATES), VIEWS))
)
def test_the_chain_is_read_as_a_level(before: State, after: State) -> None:
    pair = at(before)
    pair.show(VIEWS[after])
    assert pair.state is after


def test_a_view_that_is_the_same_changes_nothing() -> None:
    pair = at(State.LOCKED)
    before = dict(pair.threads)
    pair.show(WORKING)
    assert pair.threads == before
    assert all(pair.threads[role] is before[role] for role in before)


def test_a_lock_that_was_reorganised_away_may_come_back_or_lapse() -> None:
    pair = at(State.LOCKED)
    pair.show(JobView())
    assert pair.state is State.AGREED
    assert pair.threads[Role.BUYER].view == JobView()
    back = see(pair.threads[Role.BUYER], WORKING, chain_s=NOW_S, now_ms=NOW_MS)
    assert back.state is State.LOCKED
    states = []
    for chain_s in (TERMS.lock_by_s, TERMS.lock_by_s + 1):
        pair.show(JobView(), chain_s=chain_s)
        states.append(pair.state)
    assert states == [State.AGREED, State.LAPSED]
    assert "did not lock in time" in pair.threads[Role.SELLER].why


@pytest.mark.parametrize("how", [how for how in How if how is not How.OPEN])
def test_how_it_was_closed_is_told_in_words(how: How) -> None:
    pair = at(State.ANSWERED)
    pair.show(replace(CLOSED, how=how))
    thread = pair.threads[Role.SELLER]
    assert thread.why == how.name.lower().replace("_", " ")
    assert thread.history[-1].move == how.name.lower()
    assert thread.history[-1].tx_hash == CLOSED.tx_hash


def test_the_chain_says_nothing_to_those_who_are_not_bound() -> None:
    for state in set(State) - DEAL_STATES:
        pair = at(state)
        before = dict(pair.threads)
        pair.show(WORKING, chain_s=NOW_S + 10**6)
        assert pair.threads == before


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ("requested", "reply_by"),
        ("offered", "valid_until"),
        ("countered", "valid_until"),
        ("accepted", "agree_by"),
    ],
)
def test_silence_on_the_wire_lapses_at_its_time_and_not_before(state: str, name: str) -> None:
    pair = at(State(state))
    due = deadline_ms(pair.threads[Role.BUYER])
    assert due is not None
    before = dict(pair.threads)
    pair.wait(due - 1)
    assert pair.threads == before
    pair.wait(due)
    assert pair.state is State.LAPSED
    assert pair.threads[Role.SELLER].why == f"{name} passed in silence"
    assert deadline_ms(pair.threads[Role.SELLER]) is None


def test_silence_in_a_deal_is_for_the_chain_to_judge() -> None:
    for state in DEAL_STATES | set(TERMINAL):
        pair = at(state)
        assert deadline_ms(pair.threads[Role.BUYER]) is None
        assert tick(pair.threads[Role.BUYER], now_ms=NOW_MS * 2) is pair.threads[Role.BUYER]


# ---- duties ------------------------------------------------------------------------------------


def owed(thread: Thread, *, now_ms: int = NOW_MS, chain_s: int = NOW_S) -> list[Duty]:
    return duties(thread, now_ms=now_ms, chain_s=chain_s, margins=MARGINS)


def names(thread: Thread, *, now_ms: int = NOW_MS, chain_s: int = NOW_S) -> list[str]:
    return [duty.name for duty in owed(thread, now_ms=now_ms, chain_s=chain_s)]


def test_nobody_owes_anything_before_the_agreement_and_after_the_end() -> None:
    for state in set(State) - DEAL_STATES:
        for thread in at(state).threads.values():
            assert names(thread, chain_s=NOW_S + 10**6) == []


def test_the_buyer_locks_in_time_or_not_at_all() -> None:
    thread = at(State.AGREED).threads[Role.BUYER]
    assert names(thread, chain_s=TERMS.lock_by_s - MARGINS.chain_s) == ["open"]
    assert names(thread, chain_s=TERMS.lock_by_s - MARGINS.chain_s + 1) == []
    assert names(thread, chain_s=TERMS.lock_by_s + 1) == []
    assert names(at(State.AGREED).threads[Role.SELLER]) == []


def test_the_plain_way_of_a_deal() -> None:
    pair = at(State.LOCKED)
    assert names(pair.threads[Role.BUYER]) == ["say:task"]
    assert names(pair.threads[Role.SELLER]) == []
    pair.speak(Role.BUYER, "task")
    assert names(pair.threads[Role.BUYER]) == []
    assert names(pair.threads[Role.SELLER]) == ["work"]
    pair.speak(Role.SELLER, "result")
    assert names(pair.threads[Role.BUYER]) == ["check"]
    assert names(pair.threads[Role.SELLER]) == []
    pair.threads[Role.BUYER] = judge(pair.threads[Role.BUYER], "good")
    assert names(pair.threads[Role.BUYER]) == ["say:settle"]
    pair.speak(Role.BUYER, "settle")
    assert names(pair.threads[Role.BUYER]) == []
    assert names(pair.threads[Role.SELLER]) == ["settle"]


def test_the_seller_submits_when_its_patience_or_its_time_ends() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.BUYER, "task")
    pair.speak(Role.SELLER, "result")
    seller = pair.threads[Role.SELLER]
    patient_ms = NOW_MS + MARGINS.settle_patience_ms
    late_s = TERMS.deliver_by_s - MARGINS.chain_s + 1
    assert names(seller, now_ms=patient_ms - 1) == []
    assert names(seller, now_ms=patient_ms) == ["submit"]
    assert names(seller, chain_s=late_s - 1) == []
    assert names(seller, chain_s=late_s) == ["submit"]
    assert names(seller, chain_s=TERMS.deliver_by_s + 1) == ["poke:locked"]


def test_consent_is_no_payment_until_it_is_in_a_block() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.SELLER, "result")
    pair.speak(Role.BUYER, "settle")
    seller = pair.threads[Role.SELLER]
    late_s = TERMS.deliver_by_s - MARGINS.chain_s + 1
    assert names(seller, chain_s=late_s - 1) == ["settle"]
    assert names(seller, chain_s=late_s) == ["settle", "submit"]
    # The refund is open to anybody now, but not to be helped along by whom it robs.
    assert names(seller, chain_s=TERMS.deliver_by_s + 1) == ["settle"]
    assert names(pair.threads[Role.BUYER], chain_s=TERMS.deliver_by_s + 1) == ["poke:locked"]
    assert names(seller, chain_s=TERMS.expires_at_s) == ["poke:locked"]


@pytest.mark.parametrize("state", [State.DELIVERED, State.DISPUTED, State.ANSWERED])
def test_consent_ends_a_deal_in_every_state(state: State) -> None:
    pair = at(state)
    pair.speak(Role.SELLER, "result")
    pair.speak(Role.BUYER, "settle")
    limit = limit_s(pair.threads[Role.SELLER])
    assert limit is not None
    for chain_s in (NOW_S, limit, limit + 1):
        assert names(pair.threads[Role.SELLER], chain_s=chain_s) == ["settle"]


def test_who_cannot_deliver_declines() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.BUYER, "task")
    assert names(fail(pair.threads[Role.SELLER], "no model")) == ["decline"]


@pytest.mark.parametrize(
    ("verdict", "heard", "same", "chain_s", "disputes"),
    [
        ("wrong", True, True, NOW_S + 20, True),
        ("good", True, True, NOW_S + 20, False),
        ("", True, True, NOW_S + 20, False),
        ("good", True, False, NOW_S + 20, True),
        ("", False, False, NOW_S + 20, False),
        ("", False, False, NOW_S + 40, False),
        ("", False, False, NOW_S + 41, True),
        ("wrong", True, True, NOW_S + 60 - 5, True),
        ("wrong", True, True, NOW_S + 60 - 4, False),
    ],
)
def test_the_buyer_disputes_what_is_bad_or_missing_in_time(
    verdict: str, heard: bool, same: bool, chain_s: int, disputes: bool
) -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.BUYER, "task")
    if heard:
        pair.speak(Role.SELLER, "result")
    pair.show(DELIVERED if same else replace(DELIVERED, deliverable=b"\1" * 32))
    buyer = judge(pair.threads[Role.BUYER], verdict)
    assert ("dispute" in names(buyer, chain_s=chain_s)) is disputes


def test_without_an_arbiter_there_is_nobody_to_dispute_before() -> None:
    pair = at(State.DELIVERED)
    thread = pair.threads[Role.BUYER]
    plain = replace(TERMS, arbiter=ZERO_ADDRESS, bond_units=0, answer_s=0, rule_s=0)
    buyer = judge(replace(thread, terms=plain, task_id="ab" * 16), "wrong")
    assert names(buyer, chain_s=NOW_S + 21) == []


def test_the_seller_answers_for_what_it_made_and_both_show_evidence() -> None:
    pair = at(State.LOCKED)
    pair.speak(Role.BUYER, "task")
    silent = at(State.DISPUTED).threads[Role.SELLER]
    assert names(silent) == []
    pair.speak(Role.SELLER, "result")
    pair.show(DISPUTED)
    seller, buyer = pair.threads[Role.SELLER], judge(pair.threads[Role.BUYER], "wrong")
    last_s = DISPUTED.clock_s + TERMS.answer_s - MARGINS.chain_s
    assert names(seller, chain_s=last_s) == ["answer", "say:evidence"]
    assert names(seller, chain_s=last_s + 1) == []
    assert names(buyer) == ["say:evidence"]
    assert evidence_hash(seller) == evidence_hash(buyer)
    pair.show(ANSWERED)
    assert names(pair.threads[Role.SELLER]) == ["say:evidence"]


def test_a_result_that_comes_after_the_dispute_can_still_be_good() -> None:
    pair = at(State.DISPUTED)
    pair.speak(Role.BUYER, "task")
    pair.speak(Role.SELLER, "result")
    buyer = pair.threads[Role.BUYER]
    assert "check" in names(buyer)
    assert "say:settle" in names(judge(buyer, "good"))
    assert "say:settle" not in names(judge(buyer, "wrong"))


@pytest.mark.parametrize("state", [State.LOCKED, State.DELIVERED, State.DISPUTED, State.ANSWERED])
def test_after_the_limit_both_sides_bring_the_outcome_of_silence_about(state: State) -> None:
    pair = at(state)
    for thread in pair.threads.values():
        limit = limit_s(thread)
        assert limit is not None
        assert names(thread, chain_s=limit + 1) == [f"poke:{state}"]
        assert f"poke:{state}" not in names(thread, chain_s=limit)


def test_duties_follow_from_the_thread_alone() -> None:
    for state in State:
        for thread in at(state).threads.values():
            for chain_s in (NOW_S, NOW_S + 100, NOW_S + 1_000):
                assert owed(thread, chain_s=chain_s) == owed(thread, chain_s=chain_s)


def test_what_is_asked_for_too_early_says_so() -> None:
    thread = Pair().threads[Role.BUYER]
    with pytest.raises(LocalProtocolError, match="no terms"):
        _ = thread.agreed_terms
    with pytest.raises(LocalProtocolError, match="no result"):
        _ = thread.deliverable
    assert limit_s(thread) is None
