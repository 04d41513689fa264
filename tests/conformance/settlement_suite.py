"""What every settlement backend must do, as one class that each backend's test subclasses.

A backend brings a ``World``: its settlement on a chain whose blocks and whose time are the test's.
The subclass overrides the fixture ``world``; everything else comes from here::

    class TestMemorySettlement(SettlementSuite):
        @pytest.fixture
        async def world(self) -> AsyncIterator[World]:
            yield MemoryWorld()
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from coase.escrow.ports import ChainEvent, FundingKind, chain_terms
from coase.protocol.effects import (
    Answer,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Invalidate,
    Open,
    Poke,
    Rule,
    Submit,
    Withdraw,
)
from coase.protocol.errors import CallReverted, LocalProtocolError
from coase.protocol.types import ZERO_ADDRESS, ZERO_BYTES32, How, JobView, Phase
from tests.conformance.settlement_world import (
    DELIVERABLE,
    EVIDENCE,
    LIVE,
    Stage,
    World,
    act_of,
    new_effect_id,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DAY_S: Final = 24 * 3600

SILENCES: Final = {
    Phase.WORKING: (How.UNDELIVERED, {}),
    Phase.DELIVERED: (How.SILENT_BUYER, {"buyer": -100, "seller": 100}),
    Phase.DISPUTED: (How.SILENT_SELLER, {}),
    Phase.ANSWERED: (How.SILENT_ARBITER, {"buyer": -40, "seller": 40}),
}

# What open refuses, in the order in which it looks.
BROKEN_TERMS: Final[dict[str, tuple[dict[str, Any], str]]] = {
    "another token": ({"asset": "0x" + "77" * 20}, "WrongAsset"),
    "price of zero": ({"price_units": 0, "bond_units": 0}, "BadPrice"),
    "price too large": ({"price_units": 2**128}, "BadPrice"),
    "no seller": ({"seller": ZERO_ADDRESS}, "BadParties"),
    "default above the price": ({"default_to_seller_units": 101}, "SplitAbovePrice"),
    "bond above the price": ({"bond_units": 101}, "BadBond"),
    "bond without arbiter": ({"arbiter": ZERO_ADDRESS}, "BadBond"),
    "a stake": ({"stake_units": 1}, "BadStake"),
    "a vault": ({"vault": "0x" + "66" * 20}, "BadStake"),
    "no dispute window": ({"dispute_s": 0}, "BadWindows"),
    "dispute window too long": ({"dispute_s": 30 * DAY_S + 1}, "BadWindows"),
    "answer window too long": ({"answer_s": 30 * DAY_S + 1}, "BadWindows"),
    "ruling window too long": ({"rule_s": 30 * DAY_S + 1}, "BadWindows"),
    "no answer window": ({"answer_s": 0}, "BadWindows"),
    "no ruling window": ({"rule_s": 0}, "BadWindows"),
}


@pytest.mark.anyio
class SettlementSuite:
    """Subclass it and override ``world``."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[World]:
        raise NotImplementedError("the backend's test brings its world")
        yield  # noqa: PT022

    @pytest.fixture
    async def stage(self, world: World) -> AsyncIterator[Stage]:
        """Every story ends with an escrow that holds no more than it did before."""
        stage = await Stage.begin(world)
        held = await stage.settlement.held()
        yield stage
        left_units = sum(terms.price_units for terms in stage.left_open)
        assert await stage.settlement.held() == held + left_units

    # -------------------------------------------------------------------------------- consent

    @pytest.mark.parametrize("kind", list(FundingKind))
    async def test_a_price_is_locked_by_each_kind_of_funding(
        self, world: World, stage: Stage, kind: FundingKind
    ) -> None:
        settlement = await world.another(funding=kind)
        terms = stage.terms()
        receipt = await stage.do(stage.opening(terms), "buyer", settlement=settlement)
        view = await stage.view(terms)
        assert (view.phase, view.clock_s) == (Phase.WORKING, terms.deliver_by_s)
        assert view.tx_hash in ("", receipt.tx_hash)
        assert await stage.gains() == {"buyer": -100}
        await stage.do(Decline(terms), "seller")

    @pytest.mark.parametrize("kind", list(FundingKind))
    async def test_bonds_are_taken_by_each_kind_of_funding(
        self, world: World, stage: Stage, kind: FundingKind
    ) -> None:
        settlement = await world.another(funding=kind)
        terms = await stage.reach(Phase.DELIVERED)
        await stage.do(Dispute(terms, EVIDENCE), "buyer", settlement=settlement)
        assert await stage.gains() == {"buyer": -110}
        await stage.do(Answer(terms, EVIDENCE), "seller", settlement=settlement)
        assert await stage.gains() == {"buyer": -110, "seller": -10}
        await stage.do(Rule(terms, 100, 0, EVIDENCE), "arbiter")
        assert await stage.gains() == {"buyer": -110, "seller": 100, "arbiter": 10}

    async def test_a_deal_that_was_never_opened_is_none(self, stage: Stage) -> None:
        assert await stage.view(stage.terms()) == JobView()
        assert await stage.settlement.jobs([]) == {}

    async def test_without_the_money_nothing_opens(self, stage: Stage) -> None:
        terms = stage.terms(price_units=1001)
        await stage.refused("ERC20InsufficientBalance", stage.opening(terms), "buyer")
        assert (await stage.view(terms)).phase is Phase.NONE
        # Not even the nonce is burnt.
        again = stage.terms(nonce=terms.nonce)
        await stage.do(stage.opening(again), "buyer")
        stage.left_open.append(again)

    async def test_open_needs_the_sellers_signature_on_these_very_terms(self, stage: Stage) -> None:
        terms = stage.terms()
        other = stage.opening(stage.terms()).seller_signature
        strangers = stage.who("stranger").sign(stage.id_of(terms))
        for signature in (other, strangers, b"", stage.opening(terms).seller_signature[:-1]):
            await stage.refused("BadSignature", Open(terms, signature), "buyer")
        # Nor can anybody else lock the buyer's money: he did not sign.
        await stage.refused("BadSignature", stage.opening(terms), "stranger")
        assert await stage.gains() == {}

    @pytest.mark.parametrize("flaw", list(BROKEN_TERMS))
    async def test_open_refuses_broken_terms(self, stage: Stage, flaw: str) -> None:
        changes, error = BROKEN_TERMS[flaw]
        terms = stage.terms(**changes)
        await stage.refused(error, stage.opening(terms), "buyer")
        assert (await stage.view(terms)).phase is Phase.NONE

    async def test_open_refuses_parties_that_are_not_three(self, stage: Stage) -> None:
        escrow = stage.settlement.domain.contract
        buyer, seller = stage.who("buyer").address, stage.who("seller").address
        for changes in (
            {"seller": buyer},
            {"arbiter": buyer},
            {"arbiter": seller},
            {"arbiter": escrow},
            {"seller": escrow},
        ):
            await stage.refused("BadParties", stage.opening(stage.terms(**changes)), "buyer")

    async def test_open_refuses_times_that_cannot_be_kept(self, stage: Stage) -> None:
        now_s = (await stage.settlement.head()).time_s + 1
        same = stage.terms(lock_by_s=now_s + 9, deliver_by_s=now_s + 9)
        await stage.refused("BadTimes", stage.opening(same), "buyer", at_s=now_s)
        far = stage.terms(deliver_by_s=now_s + 30 * DAY_S + 1)
        await stage.refused("BadTimes", stage.opening(far), "buyer", at_s=now_s)
        farthest = stage.terms(deliver_by_s=now_s + 30 * DAY_S, dispute_s=30 * DAY_S)
        await stage.do(stage.opening(farthest), "buyer", at_s=now_s)
        stage.left_open.append(farthest)

    async def test_one_thread_opens_once(self, stage: Stage) -> None:
        first = stage.terms()
        counter = stage.terms(nonce=first.nonce, price_units=90)
        await stage.do(stage.opening(first), "buyer")
        await stage.refused("NonceUsed", stage.opening(counter), "buyer")
        await stage.refused("JobExists", stage.opening(first), "buyer")
        stage.left_open.append(first)

    async def test_cancelled_terms_never_open(self, stage: Stage) -> None:
        for role in ("buyer", "seller"):
            terms = stage.terms()
            await stage.refused("NotAllowed", Cancel(terms), "stranger")
            await stage.do(Cancel(terms), role)
            assert (await stage.view(terms)).phase is Phase.CANCELLED
            await stage.refused("JobExists", stage.opening(terms), "buyer")
            await stage.refused("JobExists", Cancel(terms), role)
            # The tombstone is under that id only.
            again = stage.terms(nonce=terms.nonce, price_units=99)
            await stage.do(stage.opening(again), "buyer")
            await stage.refused("JobExists", Cancel(again), role)
            stage.left_open.append(again)

    async def test_invalidated_nonces_never_open(self, stage: Stage) -> None:
        burnt, other = stage.terms(nonce=256 + 3), stage.terms(nonce=256 + 4)
        await stage.do(Invalidate(1, 1 << 3), "seller")
        await stage.refused("NonceUsed", stage.opening(burnt), "buyer")
        # Only the sender's own.
        await stage.do(Invalidate(1, 1 << 4), "stranger")
        await stage.do(stage.opening(other), "buyer")
        stage.left_open.append(other)

    # ---------------------------------------------------------------------- the ways to the end

    async def test_the_buyer_settles_at_the_full_price_without_asking(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.DELIVERED)
        assert (await stage.view(terms)).deliverable == DELIVERABLE
        await stage.do(stage.settling(terms, 100), "buyer")
        view = await stage.view(terms)
        assert (view.phase, view.how) == (Phase.CLOSED, How.SETTLED)
        assert (view.to_seller_units, view.to_buyer_units) == (100, 0)
        assert await stage.gains() == {"buyer": -100, "seller": 100}

    async def test_the_seller_settles_with_the_buyers_signature(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.DELIVERED)
        await stage.refused("BadSignature", stage.settling(terms, 60), "seller")
        await stage.do(stage.settling(terms, 60, signed_by=("buyer",)), "seller")
        assert await stage.gains() == {"buyer": -60, "seller": 60}

    async def test_a_stranger_carries_both_signatures(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.WORKING)
        call = stage.settling(terms, 60, signed_by=("buyer",))
        await stage.refused("BadSignature", call, "stranger")
        both = stage.settling(terms, 60, signed_by=("buyer", "seller"))
        await stage.refused("BadSignature", replace(both, to_seller_units=61), "stranger")
        await stage.do(both, "stranger")
        assert [event.kind for event in await stage.events(terms)] == [
            "opened",
            "submitted",
            "settled",
        ]
        assert (await stage.view(terms)).deliverable == DELIVERABLE
        assert await stage.gains() == {"buyer": -60, "seller": 60}

    async def test_below_the_price_the_seller_must_consent(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.DELIVERED)
        await stage.refused("BadSignature", stage.settling(terms, 99), "buyer")
        await stage.refused("SplitAbovePrice", stage.settling(terms, 101), "buyer")
        await stage.do(stage.settling(terms, 0, signed_by=("seller",)), "buyer")
        view = await stage.view(terms)
        assert (view.how, view.to_seller_units, view.to_buyer_units) == (How.SETTLED, 0, 100)

    @pytest.mark.parametrize("phase", LIVE)
    async def test_both_may_settle_in_every_phase_and_bonds_go_home(
        self, stage: Stage, phase: Phase
    ) -> None:
        terms = await stage.reach(phase)
        await stage.do(stage.settling(terms, 70, signed_by=("seller",)), "buyer")
        assert await stage.gains() == {"buyer": -70, "seller": 70}
        await stage.refused("WrongPhase", stage.settling(terms, 100), "buyer")
        await stage.refused("WrongPhase", Poke(terms), "stranger")

    async def test_the_seller_may_decline(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.WORKING)
        await stage.refused("NotAllowed", Decline(terms), "buyer")
        await stage.do(Decline(terms), "seller")
        view = await stage.view(terms)
        assert (view.how, view.to_buyer_units) == (How.DECLINED, 100)
        assert await stage.gains() == {}

    @pytest.mark.parametrize(
        ("price", "bond", "to_seller", "gains"),
        [
            (100, 10, 100, {"buyer": -110, "seller": 100, "arbiter": 10}),
            (100, 10, 0, {"seller": -10, "arbiter": 10}),
            (100, 10, 30, {"buyer": -33, "seller": 23, "arbiter": 10}),
            # 3 * 5 // 7 = 2 back to the buyer, the dust with the seller's part.
            (7, 3, 2, {"buyer": -3, "arbiter": 3}),
            (1, 1, 1, {"buyer": -2, "seller": 1, "arbiter": 1}),
            (1, 1, 0, {"seller": -1, "arbiter": 1}),
        ],
    )
    async def test_a_ruling_shares_price_and_bonds(
        self, stage: Stage, price: int, bond: int, to_seller: int, gains: dict[str, int]
    ) -> None:
        terms = await stage.reach(
            Phase.ANSWERED, price_units=price, bond_units=bond, default_to_seller_units=0
        )
        call = Rule(terms, to_seller, 0, EVIDENCE)
        for role in ("buyer", "seller", "stranger"):
            await stage.refused("BadSignature", call, role)
        await stage.refused("SplitAbovePrice", replace(call, to_seller_units=price + 1), "arbiter")
        await stage.refused("PenaltyAboveStake", replace(call, penalty_units=1), "arbiter")
        await stage.do(call, "arbiter")
        view = await stage.view(terms)
        assert (view.phase, view.how) == (Phase.CLOSED, How.RULED)
        assert (view.to_seller_units, view.to_buyer_units) == (to_seller, price - to_seller)
        assert await stage.gains() == gains
        assert [event.kind for event in await stage.events(terms)][-2:] == ["ruled", "settled"]

    async def test_a_dispute_without_bond_goes_straight_to_the_arbiter(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.DELIVERED, bond_units=0)
        await stage.do(Dispute(terms, EVIDENCE), "buyer")
        assert (await stage.view(terms)).phase is Phase.ANSWERED
        await stage.refused("WrongPhase", Answer(terms, EVIDENCE), "seller")
        await stage.do(Rule(terms, 25, 0, EVIDENCE), "arbiter")
        assert await stage.gains() == {"buyer": -25, "seller": 25}

    async def test_without_arbiter_there_is_no_dispute(self, stage: Stage) -> None:
        terms = stage.without_arbiter()
        await stage.do(stage.opening(terms), "buyer")
        receipt = await stage.do(Submit(terms, DELIVERABLE), "seller")
        await stage.refused("NoArbiter", Dispute(terms, EVIDENCE), "buyer")
        await stage.do(Poke(terms), "stranger", at_s=receipt.time_s + terms.dispute_s + 1)
        assert await stage.gains() == {"buyer": -100, "seller": 100}

    async def test_only_the_party_whose_turn_it_is_may_act(self, stage: Stage) -> None:
        terms = await stage.reach(Phase.WORKING)
        for role in ("buyer", "arbiter", "stranger"):
            await stage.refused("NotAllowed", Submit(terms, DELIVERABLE), role)
        await stage.do(Submit(terms, DELIVERABLE), "seller")
        await stage.refused("WrongStatus", Submit(terms, DELIVERABLE), "seller")
        await stage.refused("WrongPhase", Decline(terms), "seller")
        for role in ("seller", "arbiter", "stranger"):
            await stage.refused("BadSignature", Dispute(terms, EVIDENCE), role)
        await stage.do(Dispute(terms, EVIDENCE), "buyer")
        for role in ("buyer", "arbiter", "stranger"):
            await stage.refused("BadSignature", Answer(terms, EVIDENCE), role)
        await stage.do(stage.settling(terms, 100, signed_by=("seller",)), "buyer")

    # ----------------------------------------------------------------------- time and silence

    @pytest.mark.parametrize("phase", LIVE)
    async def test_an_act_is_allowed_up_to_its_limit(self, stage: Stage, phase: Phase) -> None:
        terms = await stage.reach(phase)
        limit_s = await stage.limit_s(terms)
        await stage.refused("TooEarly", Poke(terms), "stranger", at_s=limit_s - 1)
        await stage.refused("TooEarly", Poke(terms), "stranger", at_s=limit_s)
        call, role = act_of(phase, terms)
        receipt = await stage.do(call, role, at_s=limit_s)
        assert receipt.time_s == limit_s
        if phase is not Phase.ANSWERED:
            await stage.do(stage.settling(terms, 100, signed_by=("seller",)), "buyer")

    @pytest.mark.parametrize("phase", LIVE)
    async def test_after_the_limit_silence_speaks_and_anybody_may_say_so(
        self, stage: Stage, phase: Phase
    ) -> None:
        terms = await stage.reach(phase)
        limit_s = await stage.limit_s(terms)
        call, role = act_of(phase, terms)
        await stage.refused("TooLate", call, role, at_s=limit_s + 1)
        if phase is Phase.WORKING:
            await stage.refused("TooLate", Decline(terms), "seller", at_s=limit_s + 1)
        await stage.do(Poke(terms), "stranger", at_s=limit_s + 1)
        how, gains = SILENCES[phase]
        view = await stage.view(terms)
        assert (view.phase, view.how) == (Phase.CLOSED, how)
        assert view.to_seller_units + view.to_buyer_units == 100
        assert await stage.gains() == gains
        await stage.refused("WrongPhase", Poke(terms), "buyer")

    async def test_the_price_is_locked_by_lock_by_or_not_at_all(self, stage: Stage) -> None:
        for late_s, error in ((-1, ""), (0, ""), (1, "TooLate")):
            now_s = (await stage.settlement.head()).time_s
            terms = stage.terms(lock_by_s=now_s + 10, deliver_by_s=now_s + 100)
            call, at_s = stage.opening(terms), now_s + 10 + late_s
            if error:
                await stage.refused(error, call, "buyer", at_s=at_s)
            else:
                assert (await stage.do(call, "buyer", at_s=at_s)).time_s == at_s
                stage.left_open.append(terms)

    @pytest.mark.parametrize("phase", LIVE)
    async def test_claim_refund_moves_nothing_and_poke_still_pays_as_before(
        self, stage: Stage, phase: Phase
    ) -> None:
        terms = await stage.reach(phase)
        refund = ClaimRefund(stage.id_of(terms))
        before = await stage.balances()
        expiry_s = terms.expires_at_s
        await stage.refused("TooEarly", refund, "stranger", at_s=expiry_s - 1)
        await stage.do(refund, "stranger", at_s=expiry_s)
        assert (await stage.view(terms)).phase is phase
        assert await stage.balances() == before
        await stage.refused("WrongStatus", refund, "stranger")
        await stage.refused("WrongStatus", stage.settling(terms, 100), "buyer")
        await stage.do(Poke(terms), "buyer")
        how, gains = SILENCES[phase]
        assert (await stage.view(terms)).how is how
        assert await stage.gains() == gains

    async def test_claim_refund_needs_an_open_deal(self, stage: Stage) -> None:
        never = stage.terms()
        await stage.refused("WrongStatus", ClaimRefund(stage.id_of(never)), "buyer")
        terms = await stage.reach(Phase.WORKING)
        await stage.do(Decline(terms), "seller")
        call = ClaimRefund(stage.id_of(terms))
        await stage.refused("WrongStatus", call, "buyer", at_s=terms.expires_at_s)

    async def test_calls_on_a_deal_that_is_not_open_are_refused(self, stage: Stage) -> None:
        terms = stage.terms()
        await stage.refused("WrongStatus", Submit(terms, DELIVERABLE), "seller")
        for call, role in (
            (Poke(terms), "stranger"),
            (Decline(terms), "seller"),
            (stage.settling(terms, 100), "buyer"),
            (Dispute(terms, EVIDENCE), "buyer"),
            (Answer(terms, EVIDENCE), "seller"),
            (Rule(terms, 0, 0, EVIDENCE), "arbiter"),
        ):
            await stage.refused("WrongPhase", call, role)

    # --------------------------------------------------------------- repeating, reading, forks

    async def test_the_same_effect_twice_is_one_call(self, world: World, stage: Stage) -> None:
        terms = stage.terms()
        effect_id = new_effect_id()
        first = await stage.do(stage.opening(terms), "buyer", effect_id=effect_id)
        again = await stage.do(stage.opening(terms), "buyer", effect_id=effect_id)
        assert again == first
        # Another process on the same state finds it as well.
        restarted = await world.another()
        found = await stage.do(
            stage.opening(terms), "buyer", effect_id=effect_id, settlement=restarted
        )
        assert found == first
        assert await stage.gains() == {"buyer": -100}
        stage.left_open.append(terms)

    async def test_an_effect_id_is_never_used_for_two_calls(self, stage: Stage) -> None:
        terms, other = stage.terms(), stage.terms()
        effect_id = new_effect_id()
        first = await stage.do(stage.opening(terms), "buyer", effect_id=effect_id)
        # A backend may find the first or say what is wrong; it never sends the second.
        try:
            receipt = await stage.do(stage.opening(other), "buyer", effect_id=effect_id)
        except LocalProtocolError:
            receipt = first
        assert receipt == first
        assert (await stage.view(other)).phase is Phase.NONE
        stage.left_open.append(terms)

    async def test_a_refused_effect_may_be_repeated_when_its_time_has_come(
        self, stage: Stage
    ) -> None:
        terms = await stage.reach(Phase.WORKING)
        effect_id = new_effect_id()
        with pytest.raises(CallReverted, match="TooEarly"):
            await stage.do(Poke(terms), "buyer", effect_id=effect_id)
        late_s = terms.deliver_by_s + 1
        await stage.do(Poke(terms), "buyer", effect_id=effect_id, at_s=late_s)
        assert (await stage.view(terms)).how is How.UNDELIVERED

    async def test_views_lag_by_the_confirmations(self, world: World, stage: Stage) -> None:
        careful = await world.another(confirmations=2)
        terms = stage.terms()
        job_id = stage.id_of(terms)
        start = (await stage.settlement.head()).number
        await stage.do(stage.opening(terms), "buyer")
        for depth in range(3):
            seen = (await careful.jobs([job_id]))[job_id].phase
            events = [e for e in (await careful.events(start))[0] if e.job_id == job_id]
            assert seen is (Phase.WORKING if depth == 2 else Phase.NONE)
            assert len(events) == (1 if depth == 2 else 0)
            assert (await stage.view(terms)).phase is Phase.WORKING
            await world.set_time((await stage.settlement.head()).time_s + 1)
            await world.seal()
        stage.left_open.append(terms)

    async def test_events_come_once_each_and_in_order(self, stage: Stage) -> None:
        start = (await stage.settlement.head()).number + 1
        terms = await stage.reach(Phase.ANSWERED)
        await stage.do(Rule(terms, 30, 0, EVIDENCE), "arbiter")
        other = await stage.reach(Phase.WORKING)
        everything, end = await stage.settlement.events(start)
        assert end == (await stage.settlement.head()).number + 1
        assert await stage.settlement.events(end) == ([], end)
        own = [event for event in everything if event.job_id == stage.id_of(terms)]
        assert [event.kind for event in own] == [
            "opened",
            "submitted",
            "disputed",
            "answered",
            "ruled",
            "settled",
        ]
        assert own[0].terms == chain_terms(terms)
        assert all(event.terms is None for event in own[1:])
        assert [event.evidence for event in own[2:5]] == [EVIDENCE] * 3
        assert own[4].to_seller_units == 30
        assert (own[5].to_seller_units, own[5].to_buyer_units) == (30, 70)
        places = [(event.block, event.log_index) for event in everything]
        assert places == sorted(places)
        # Page by page it is the same.
        paged: list[ChainEvent] = []
        for block in range(start, end):
            page, _ = await stage.settlement.events(block)
            paged += [event for event in page if event.block == block]
        assert paged == everything
        stage.left_open.append(other)

    async def test_what_a_fork_put_in_the_place_of_an_event_is_told(
        self, world: World, stage: Stage
    ) -> None:
        if not world.can_reorg:
            pytest.skip("this backend's chain cannot be made to fork")
        terms = await stage.reach(Phase.WORKING)
        _, following = await stage.settlement.events(0)
        receipt = await stage.do(Submit(terms, DELIVERABLE), "seller")
        told, following = await stage.settlement.events(following)
        assert [event.time_s for event in told] == [receipt.time_s]
        await world.reorg(1, drop=False)
        await world.set_time(receipt.time_s + 5)
        await world.seal()
        # The same number, but another block: a reader that went on from there would never know.
        told, following = await stage.settlement.events(following)
        assert [event.kind for event in told if event.job_id == stage.id_of(terms)][-1:] == [
            "submitted"
        ]
        assert told[-1].time_s == receipt.time_s + 5
        assert await stage.settlement.events(following) == ([], following)
        assert (await stage.view(terms)).clock_s == receipt.time_s + 5
        await stage.do(stage.settling(terms, 100), "buyer")

    async def test_a_receipt_tells_the_block(self, stage: Stage) -> None:
        now_s = (await stage.settlement.head()).time_s
        receipt = await stage.do(Invalidate(9, 1), "seller", at_s=now_s + 7)
        head = await stage.settlement.head()
        assert (
            (receipt.block, receipt.time_s)
            == (head.number, now_s + 7)
            == (
                head.number,
                head.time_s,
            )
        )

    @pytest.mark.parametrize("drop", [False, True])
    async def test_an_opening_that_was_reorged_out_is_sent_again(
        self, world: World, stage: Stage, drop: bool
    ) -> None:
        if not world.can_reorg:
            pytest.skip("this backend's chain cannot be made to fork")
        terms = stage.terms()
        effect_id = new_effect_id()
        await stage.do(stage.opening(terms), "buyer", effect_id=effect_id)
        await world.reorg(1, drop=drop)
        assert (await stage.view(terms)).phase is Phase.NONE
        assert await stage.events(terms) == []
        assert await stage.gains() == {}
        await stage.do(stage.opening(terms), "buyer", effect_id=effect_id)
        assert (await stage.view(terms)).phase is Phase.WORKING
        assert len(await stage.events(terms)) == 1
        assert await stage.gains() == {"buyer": -100}
        stage.left_open.append(terms)

    async def test_what_a_party_cannot_be_paid_is_owed_and_holds_nobody_up(
        self, world: World, stage: Stage
    ) -> None:
        if not world.can_block:
            pytest.skip("this backend's token pays everybody")
        terms = await stage.reach(Phase.DELIVERED)
        seller = stage.who("seller").address
        await stage.refused("NothingOwed", Withdraw(seller), "stranger")
        await world.block(seller, blocked=True)
        await stage.do(stage.settling(terms, 60, signed_by=("seller",)), "buyer")
        assert await stage.settlement.owed(seller) == 60
        assert await stage.gains() == {"buyer": -60}
        with pytest.raises(CallReverted):
            await stage.do(Withdraw(seller), "stranger")
        assert await stage.settlement.owed(seller) == 60
        await world.block(seller, blocked=False)
        await stage.do(Withdraw(seller), "stranger")
        assert await stage.settlement.owed(seller) == 0
        assert await stage.gains() == {"buyer": -60, "seller": 60}
        await stage.refused("NothingOwed", Withdraw(seller), "stranger")

    async def test_nothing_is_owed_to_those_who_were_paid(self, stage: Stage) -> None:
        assert await stage.settlement.owed(stage.who("buyer").address) == 0
        await stage.refused("NothingOwed", Withdraw(stage.who("buyer").address), "buyer")

    async def test_a_delivered_hash_is_kept_and_an_undelivered_one_is_zero(
        self, stage: Stage
    ) -> None:
        terms = await stage.reach(Phase.WORKING)
        assert (await stage.view(terms)).deliverable == ZERO_BYTES32
        receipt = await stage.do(Submit(terms, DELIVERABLE), "seller")
        view = await stage.view(terms)
        assert (view.deliverable, view.clock_s) == (DELIVERABLE, receipt.time_s)
        await stage.do(stage.settling(terms, 100), "buyer")
        assert (await stage.view(terms)).deliverable == DELIVERABLE

    async def test_closing_twice_is_safe(self, world: World) -> None:
        settlement = await world.another()
        await settlement.close()
        await settlement.close()
