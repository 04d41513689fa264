"""The contract on an EVM and its twin in memory, call by call: they must never disagree.

Both are given the same chain id, token and escrow address, so that ids, signatures and calls are
the same bytes. After every call they are asked for everything that a party could see.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stages
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coase.escrow.backends.memory import MemoryChain, Transaction
from coase.escrow.lifecycle import NO_JOB
from coase.protocol.effects import (
    Answer,
    Call,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Invalidate,
    Open,
    Poke,
    Rule,
    Settle,
    Submit,
    Withdraw,
)
from coase.protocol.errors import CallReverted
from coase.protocol.types import ZERO_ADDRESS, Phase
from tests.conformance.settlement_world import (
    DELIVERABLE,
    EVIDENCE,
    LIVE,
    ROLES,
    Stage,
    World,
    act_of,
    new_effect_id,
)
from tests.conformance.test_settlement_evm import EvmWorld
from tests.conformance.test_settlement_memory import MemoryWorld

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

UNITS: Final = 1000
NOBODY: Final = {"arbiter": ZERO_ADDRESS, "bond_units": 0, "answer_s": 0, "rule_s": 0}
VARIANTS: Final[list[dict[str, Any]]] = [
    {},
    {"bond_units": 0},
    NOBODY,
    {"price_units": 7, "bond_units": 3, "default_to_seller_units": 5},
    {"price_units": 1, "bond_units": 1, "default_to_seller_units": 0},
    {"price_units": 600, "bond_units": 600, "default_to_seller_units": 600},
    {"price_units": UNITS + 1},
]


def units_of(share: str, price: int) -> int:
    """Return a part of ``price``, or a little more than all of it."""
    parts = {"none": 0, "one": 1, "half": price // 2, "all but one": price - 1, "all": price}
    return parts.get(share, price + 1)


@dataclass
class Pair:
    """Two worlds and the loop that both live in."""

    portal: BlockingPortal
    left: World
    make_right: Callable[[World, int], World]


class SideBySide(RuleBasedStateMachine):
    """Three deals between the same four parties, in both worlds."""

    slots = st.integers(0, 2)
    roles = st.sampled_from(ROLES)
    kinds = st.sampled_from(
        [*(Open, Submit, Settle, Decline, Dispute, Answer, Rule, Cancel, Invalidate, Withdraw)]
    )
    shares = st.sampled_from(["none", "one", "half", "all but one", "all", "too much"])
    signers = st.sampled_from([(), ("buyer",), ("seller",), ("buyer", "seller")])

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    @initialize(
        variants=st.tuples(*[st.sampled_from(VARIANTS)] * 3),
        steps=st.tuples(*[st.integers(0, 5)] * 3),
        one_thread=st.booleans(),
    )
    def start(
        self, variants: tuple[dict[str, Any], ...], steps: tuple[int, ...], one_thread: bool
    ) -> None:
        """Three deals, each some steps on its way."""
        self.run(self._start, variants, one_thread)
        for slot, count in enumerate(steps):
            for _ in range(count):
                self.run(self._next_act, slot, "next")
                if self.refused:
                    break

    async def _start(self, variants: tuple[dict[str, Any], ...], one_thread: bool) -> None:
        first = await Stage.begin(self.pair.left, units=UNITS)
        right = self.pair.make_right(self.pair.left, first.start_s)
        second = Stage(right, right.settlement, first.start_s, number=first.number)
        for role in ROLES:
            await right.mint(second.who(role).address, UNITS)
        self.stages = (first, second)
        self.start_blocks = [(await s.settlement.head()).number + 1 for s in self.stages]
        self.start_held = [await stage.settlement.held() for stage in self.stages]
        self.deals = [
            first.terms(**variant, nonce=1 if one_thread and number < 2 else 10 + number)
            for number, variant in enumerate(variants)
        ]
        self.blocks = 0
        self.refused = ""
        await self.agree()

    # ----------------------------------------------------------------------------------- calls

    @rule(slot=slots, moment=st.sampled_from(["next", "next", "limit-1", "limit", "limit+1"]))
    def the_next_act(self, slot: int, moment: str) -> None:
        """What the table of states waits for, by whom it waits for."""
        self.run(self._next_act, slot, moment)

    async def _next_act(self, slot: int, moment: str) -> None:
        terms = self.deals[slot]
        phase = (await self.stages[0].view(terms)).phase
        if phase is Phase.NONE:
            await self.both(self.stages[0].opening(terms), "buyer", slot, moment)
        elif phase in LIVE:
            call, role = act_of(phase, terms)
            share = min(30, terms.price_units)
            call = replace(call, to_seller_units=share) if isinstance(call, Rule) else call
            await self.both(call, role, slot, moment)

    @rule(
        slot=slots,
        role=roles,
        moment=st.sampled_from(["next", "limit", "limit+1", "expiry-1", "expiry"]),
        refund=st.booleans(),
    )
    def silence(self, slot: int, role: str, moment: str, refund: bool) -> None:
        """Anybody's call on a deal that is open, if there is one."""
        self.run(self._silence, slot, role, moment, refund)

    async def _silence(self, slot: int, role: str, moment: str, refund: bool) -> None:
        slot = await self.live(slot)
        terms = self.deals[slot]
        call = ClaimRefund(self.stages[0].id_of(terms)) if refund else Poke(terms)
        await self.both(call, role, slot, moment)

    @rule(slot=slots, role=st.sampled_from(ROLES[:2]), share=shares, signed_by=signers)
    def settle(self, slot: int, role: str, share: str, signed_by: tuple[str, ...]) -> None:
        self.run(self._settle, slot, role, share, signed_by)

    async def _settle(self, slot: int, role: str, share: str, signed_by: tuple[str, ...]) -> None:
        slot = await self.live(slot)
        terms = self.deals[slot]
        units = units_of(share, terms.price_units)
        call = self.stages[0].settling(terms, units, signed_by=signed_by)
        await self.both(call, role, slot, "next")

    async def live(self, slot: int) -> int:
        """Return an open deal, if there is one."""
        stage = self.stages[0]
        phases = [(await stage.view(terms)).phase for terms in self.deals]
        live = [number for number, phase in enumerate(phases) if phase in LIVE] or [slot]
        return live[slot % len(live)]

    @rule(kind=kinds, slot=slots, role=roles, share=shares, signed_by=signers)
    def any_call(
        self, kind: type, slot: int, role: str, share: str, signed_by: tuple[str, ...]
    ) -> None:
        terms, stage = self.deals[slot], self.stages[0]
        units = units_of(share, terms.price_units)
        calls: dict[type, Call] = {
            Open: stage.opening(terms) if "seller" in signed_by else Open(terms, b""),
            Submit: Submit(terms, DELIVERABLE),
            Settle: stage.settling(terms, units, signed_by=signed_by),
            Decline: Decline(terms),
            Dispute: Dispute(terms, EVIDENCE),
            Answer: Answer(terms, EVIDENCE),
            Rule: Rule(terms, units, len(signed_by) // 2, EVIDENCE),
            Poke: Poke(terms),
            ClaimRefund: ClaimRefund(stage.id_of(terms)),
            Cancel: Cancel(terms),
            Invalidate: Invalidate(0, 1 << terms.nonce),
            Withdraw: Withdraw(stage.who(role).address),
        }
        self.run(self.both, calls[kind], role, slot, "next")

    @precondition(lambda self: self.blocks and self.can("can_reorg"))
    @rule(later_s=st.sampled_from([0, 1, 50, 250]))
    def fork(self, later_s: int) -> None:
        """The newest block never was; its call comes in another, perhaps too late."""
        self.run(self._fork, later_s)

    async def _fork(self, later_s: int) -> None:
        # One block only: if several calls come back at once, their order is the chain's own affair,
        # and if one is dropped, a sender's nonce brings it back with his next.
        for stage in self.stages:
            await stage.world.reorg(1, drop=False)
        await self.agree()
        at_s = (await self.stages[0].settlement.head()).time_s + 1 + later_s
        for stage in self.stages:
            await stage.world.set_time(at_s)
            await stage.world.seal()
            assert await stage.world.pending() == 0
        await self.agree()

    @precondition(lambda self: self.can("can_block"))
    @rule(role=roles, blocked=st.booleans())
    def block(self, role: str, blocked: bool) -> None:
        self.run(self._block, role, blocked)

    async def _block(self, role: str, blocked: bool) -> None:
        # On a chain it is a call on the token: it takes a block of both, and no fork undoes it.
        at_s = (await self.stages[0].settlement.head()).time_s + 1
        for stage in self.stages:
            await stage.world.set_time(at_s)
            await stage.world.block(stage.who(role).address, blocked=blocked)
            if (await stage.settlement.head()).time_s < at_s:
                await stage.world.seal()
        self.blocks = 0
        await self.agree()

    # ------------------------------------------------------------------------------- comparing

    def run(self, act: Callable[..., Awaitable[None]], *values: Any) -> None:
        self.pair.portal.call(act, *values)

    def can(self, what: str) -> bool:
        return all(getattr(stage.world, what) for stage in self.stages)

    async def time_of(self, slot: int, moment: str) -> int:
        """Return the time of the next block, at an edge of the deal if it has one ahead."""
        terms, stage = self.deals[slot], self.stages[0]
        next_s = (await stage.settlement.head()).time_s + 1
        base, sign, offset = moment.partition("-" if "-" in moment else "+")
        shift = int(sign + (offset or "0"))
        if base == "expiry":
            return max(next_s, terms.expires_at_s + shift)
        if base == "limit":
            phase = (await stage.view(terms)).phase
            if phase is Phase.NONE:
                return max(next_s, terms.lock_by_s + shift)
            if phase in LIVE:
                return max(next_s, await stage.limit_s(terms) + shift)
        return next_s

    async def both(self, call: Call, role: str, slot: int, moment: str) -> None:
        """Send the same bytes at the same time to both, and compare what came of it."""
        at_s, effect_id = await self.time_of(slot, moment), new_effect_id()
        left, right = [await self._do(stage, call, role, at_s, effect_id) for stage in self.stages]
        assert left == right, (left, right, call, role, at_s)
        self.refused = left
        self.blocks += not left
        await self.agree()

    @staticmethod
    async def _do(stage: Stage, call: Call, role: str, at_s: int, effect_id: str) -> str:
        try:
            receipt = await stage.do(call, role, at_s=at_s, effect_id=effect_id)
        except CallReverted as error:
            # With which words a token refuses a receiver is its own affair.
            blocked = isinstance(call, Withdraw) and error.error != "NothingOwed"
            return "blocked" if blocked else error.error
        assert receipt.time_s == at_s
        return ""

    async def agree(self) -> None:
        left, right = [
            await self._picture(stage, held)
            for stage, held in zip(self.stages, self.start_held, strict=True)
        ]
        assert left == right

    async def _picture(self, stage: Stage, start_held: int) -> dict[str, Any]:
        settlement = stage.settlement
        job_ids = [stage.id_of(terms) for terms in self.deals]
        views = await settlement.jobs(job_ids)
        balances = await stage.balances()
        held = await settlement.held() - start_held
        assert sum(balances.values()) + held == UNITS * len(ROLES)
        return {
            "time": (await settlement.head()).time_s,
            "deals": [replace(views[job_id], tx_hash="") for job_id in job_ids],
            "balances": balances,
            "owed": [await settlement.owed(stage.who(role).address) for role in ROLES],
            "held": held,
        }

    def teardown(self) -> None:
        """In the end both logs tell the same story."""
        if not hasattr(self, "start_held"):
            return
        self.run(self._tell_the_same_story)

    async def _tell_the_same_story(self) -> None:
        left, right = [
            await self._story(stage, start)
            for stage, start in zip(self.stages, self.start_blocks, strict=True)
        ]
        assert left == right

    async def _story(self, stage: Stage, start: int) -> list[Any]:
        events, _ = await stage.settlement.events(start)
        own = {stage.id_of(terms) for terms in self.deals}
        return [
            replace(event, block=0, log_index=0, tx_hash="")
            for event in events
            if event.job_id in own
        ]


@contextmanager
def worlds(
    make_left: Callable[[], World], make_right: Callable[[World, int], World]
) -> Iterator[Pair]:
    """One loop and one left world for all examples: an EVM takes a while to start."""
    with start_blocking_portal("asyncio") as portal:

        async def begin() -> World:
            world = make_left()
            if isinstance(world, EvmWorld):
                await world.start()
            return world

        left = portal.call(begin)
        try:
            yield Pair(portal, left, make_right)
        finally:
            if isinstance(left, EvmWorld | MemoryWorld):
                portal.call(left.close)


def twin(left: World, start_s: int, kind: type[MemoryChain] = MemoryChain) -> World:
    """Return a world in memory with the left one's addresses and time."""
    settlement = left.settlement
    escrow = settlement.domain.contract
    return MemoryWorld(start_s=start_s, asset=settlement.asset, escrow=escrow, kind=kind)


def compare(pair: Pair, *, examples: int, steps: int, **options: Any) -> None:
    """Run so many examples of so many steps; raises at the first disagreement."""
    run_state_machine_as_test(
        lambda: SideBySide(pair),  # type: ignore[arg-type]  # Any factory will do.
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_the_contract_and_its_twin_agree() -> None:
    with worlds(EvmWorld, twin) as pair:
        # Making a failing example smaller takes minutes here: that is the long test's work.
        compare(pair, examples=12, steps=25, phases=[Stages.reuse, Stages.generate])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_contract_and_its_twin_agree_for_a_long_time() -> None:
    with worlds(EvmWorld, twin) as pair:
        compare(pair, examples=500, steps=50)


class PokesTooEarly(MemoryChain):
    """A planted fault: silence counts at the limit already."""

    def _execute(self, transaction: Transaction, now_s: int) -> None:
        early = isinstance(transaction.call, Poke)
        super()._execute(transaction, now_s + early)


class RobsAtExpiry(MemoryChain):
    """A planted fault: the refund at expiry forgets that there was a delivery."""

    def _execute(self, transaction: Transaction, now_s: int) -> None:
        super()._execute(transaction, now_s)
        call = transaction.call
        if isinstance(call, ClaimRefund):
            job = self.job(call.job_id)
            if job.phase is Phase.DELIVERED:
                robbed = replace(job, phase=Phase.WORKING, clock_s=NO_JOB.clock_s)
                number, _, tx_hash = self._history[call.job_id][-1]
                self._history[call.job_id][-1] = (number, robbed, tx_hash)


class ForgetsTheNonce(MemoryChain):
    """A planted fault: two terms of one thread may both be opened."""

    def nonce_used(self, seller: str, nonce: int) -> bool:
        return False


@pytest.mark.parametrize("fault", [PokesTooEarly, RobsAtExpiry, ForgetsTheNonce])
def test_a_planted_fault_is_found(fault: type[MemoryChain]) -> None:
    """What compares them must itself be able to fail."""
    with worlds(MemoryWorld, partial(twin, kind=fault)) as pair:
        with pytest.raises(AssertionError):
            # The first example that differs is enough: nobody reads a smaller one.
            compare(
                pair,
                examples=200,
                steps=30,
                derandomize=True,
                database=None,
                phases=[Stages.generate],
            )


def test_the_twin_agrees_with_itself() -> None:
    with worlds(MemoryWorld, twin) as pair:
        compare(pair, examples=30, steps=30)
