"""Vault and panel on an EVM and their twins in memory, call by call: they must never disagree."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stages
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from coase.escrow.backends.evm.abi import panels_abi
from coase.escrow.backends.evm.sending import ask_address
from coase.escrow.backends.memory_stake import MemoryVault
from coase.escrow.stake import (
    ACK_S,
    UNBOND_S,
    Allow,
    CloseSlice,
    Deposit,
    Release,
    StakeCall,
    Unbond,
    WithdrawStake,
)
from coase.protocol.effects import Call, Poke, Rule
from coase.protocol.errors import CallReverted
from coase.protocol.types import Phase
from tests.conformance.settlement_world import LIVE, ROLES, act_of, new_effect_id
from tests.conformance.stake_suite import MEMBERS, STAKE_UNITS, StakeStage, StakeWorld
from tests.conformance.test_settlement_side_by_side import Pair
from tests.conformance.test_stake import EvmStakeWorld, MemoryStakeWorld

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from coase.escrow.lifecycle import Reserve
    from coase.escrow.ports import Panel, Receipt

UNITS: Final = 1000
VARIANTS: Final[list[dict[str, Any]]] = [
    {},
    {"bond_units": 0},
    {"price_units": 7, "bond_units": 5, "default_to_seller_units": 5},
    {"stake_units": 1},
    {"stake_units": 401},
    {"stake_units": 200},
]
ENDS: Final = ("settle", "silence", "rule")


class StakesSideBySide(RuleBasedStateMachine):
    """Three deals with stakes, two of them under a panel, and the seller's stake, in two worlds."""

    slots = st.integers(0, 2)
    amounts = st.sampled_from([0, 1, 40, 200, 501])

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    @initialize(
        variants=st.tuples(*[st.sampled_from(VARIANTS)] * 3),
        steps=st.tuples(*[st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5])] * 3),
    )
    def start(self, variants: tuple[dict[str, Any], ...], steps: tuple[int, ...]) -> None:
        self.run(self._start, variants)
        for slot, times in enumerate(steps):
            for _ in range(times):
                self.run(self._advance, slot, "next")

    async def _start(self, variants: tuple[dict[str, Any], ...]) -> None:
        first = await StakeStage.begin(self.pair.left, units=UNITS)
        assert isinstance(first, StakeStage)
        right = self.pair.make_right(self.pair.left, first.start_s)
        second = StakeStage(right, right.settlement, first.start_s, number=first.number)
        self.stages = (first, second)
        for role in ROLES:
            await right.mint(second.who(role).address, UNITS)
        self.panels: list[Panel] = [await stage.panel() for stage in self.stages]
        assert self.panels[0].address == self.panels[1].address
        start_s = (await first.settlement.head()).time_s
        for stage in self.stages:
            stage.start_s = start_s
            await stage.bond()
        self.start_held = [await stage.registry.held() - 500 for stage in self.stages]
        now_s = (await first.settlement.head()).time_s
        arbiter = {"arbiter": self.panels[0].address}
        self.deals = [
            first.terms(
                **{"vault": first.registry.vault, "stake_units": STAKE_UNITS, "nonce": 10 + number}
                | {"lock_by_s": now_s + 100, "deliver_by_s": now_s + 200}
                | (arbiter if number < 2 else {})
                | variant
            )
            for number, variant in enumerate(variants)
        ]
        await self.agree()

    # ----------------------------------------------------------------------------------- calls

    @rule(slot=slots, moment=st.sampled_from(["next", "limit", "limit+1"]))
    def advance(self, slot: int, moment: str) -> None:
        """What the deal waits for, in time or just not."""
        self.run(self._advance, slot, moment)

    async def _advance(self, slot: int, moment: str) -> None:
        terms, stage = self.deals[slot], self.stages[0]
        phase = (await stage.view(terms)).phase
        if phase is Phase.NONE:
            await self.both_deal(stage.opening(terms), "buyer", await self.time(slot, "next"))
        elif phase is Phase.ANSWERED:
            await self._rule(slot, MEMBERS[:2], min(30, terms.price_units), 1)
        elif phase in LIVE:
            call, role = act_of(phase, terms)
            await self.both_deal(call, role, await self.time(slot, moment))

    @rule(slot=slots, end=st.sampled_from(ENDS), share=st.integers(0, 10), names=st.integers(0, 7))
    def end(self, slot: int, end: str, share: int, names: int) -> None:
        """Some end of a deal, if it is at a place where it can come to that."""
        self.run(self._end, slot, end, share, names)

    async def _end(self, slot: int, end: str, share: int, names: int) -> None:
        terms, stage = self.deals[slot], self.stages[0]
        units = terms.price_units * share // 10
        if end == "settle":
            call = stage.settling(terms, units, signed_by=("seller",))
            await self.both_deal(call, "buyer", await self.time(slot, "next"))
        elif end == "silence":
            await self.both_deal(Poke(terms), "stranger", await self.time(slot, "limit+1"))
        else:
            signers = tuple(name for bit, name in enumerate(MEMBERS) if names & 1 << bit)
            await self._rule(slot, signers, units, terms.stake_units * share // 9)

    async def _rule(self, slot: int, signers: tuple[str, ...], units: int, penalty: int) -> None:
        terms = self.deals[slot]
        ruling = Rule(terms, units, penalty, bytes(32))
        at_s = await self.time(slot, "next")
        if slot == 2:
            await self.both_deal(ruling, "arbiter", at_s)
            return

        async def act(number: int, stage: StakeStage) -> Receipt:
            await stage.world.set_time(at_s)
            return await stage.rule(self.panels[number], ruling, *signers)

        await self.both(act)

    @rule(
        slot=slots,
        role=st.sampled_from(ROLES),
        ack=st.sampled_from(["", "seller", "seller", "buyer"]),
        moment=st.sampled_from(["next", "next", "ack", "ack+1"]),
    )
    def close(self, slot: int, role: str, ack: str, moment: str) -> None:
        self.run(self._close, slot, role, ack, moment)

    async def _close(self, slot: int, role: str, ack: str, moment: str) -> None:
        stage = self.stages[0]
        held = [number for number, one in enumerate(self.deals) if await stage.slice_of(one)]
        working = [n for n in held if (await stage.view(self.deals[n])).phase is Phase.WORKING]
        # A deal that has its slice still, if there is one, and for the seller's acknowledgement one
        # to which it matters; an open one ends by silence first.
        wanted = (working if ack == "seller" else []) or held or [slot]
        slot = wanted[slot % len(wanted)]
        terms = self.deals[slot]
        if moment != "next" and (await stage.view(terms)).phase in LIVE:
            await self.both_deal(Poke(terms), "stranger", await self.time(slot, "limit+1"))
        call = self.stages[0].ack(terms, by=ack) if ack else CloseSlice(terms)
        await self.both_stake(call, role, await self.time(slot, moment))

    @rule(units=amounts, role=st.sampled_from(["seller", "seller", "stranger"]))
    def bond(self, units: int, role: str) -> None:
        """A stranger only tries to take: his first deposit would need a call more on a chain."""
        call = Deposit(units) if role == "seller" else Unbond(units)
        self.run(self._stake, call, role, 1)

    @rule(units=amounts)
    def unbond(self, units: int) -> None:
        self.run(self._stake, Unbond(units), "seller", 1)

    @rule(later_s=st.sampled_from([1, UNBOND_S - 2, UNBOND_S]))
    def release(self, later_s: int) -> None:
        self.run(self._stake, Release(), "seller", later_s)

    @rule(units=amounts)
    def allow(self, units: int) -> None:
        token = self.deals[0].asset
        self.run(self._stake, Allow(token, units), "seller", 1)

    @rule(role=st.sampled_from(ROLES))
    def withdraw(self, role: str) -> None:
        self.run(self._stake, WithdrawStake(self.stages[0].who(role).address), "stranger", 1)

    async def _stake(self, call: StakeCall, role: str, later_s: int) -> None:
        now_s = (await self.stages[0].settlement.head()).time_s
        await self.both_stake(call, role, now_s + later_s)

    @rule(role=st.sampled_from(ROLES), blocked=st.booleans())
    def block(self, role: str, blocked: bool) -> None:
        self.run(self._block, role, blocked)

    async def _block(self, role: str, blocked: bool) -> None:
        at_s = (await self.stages[0].settlement.head()).time_s + 1
        for stage in self.stages:
            await stage.world.set_time(at_s)
            await stage.world.block(stage.who(role).address, blocked=blocked)
            if (await stage.settlement.head()).time_s < at_s:
                await stage.world.seal()
        await self.agree()

    # ------------------------------------------------------------------------------- comparing

    def run(self, act: Callable[..., Awaitable[None]], *values: Any) -> None:
        self.pair.portal.call(act, *values)

    async def time(self, slot: int, moment: str) -> int:
        terms, stage = self.deals[slot], self.stages[0]
        next_s = (await stage.settlement.head()).time_s + 1
        base, _, more = moment.partition("+")
        shift = int(more or 0)
        if base == "ack":
            return max(next_s, terms.deliver_by_s + ACK_S + shift)
        if base == "limit" and (await stage.view(terms)).phase in LIVE:
            return max(next_s, await stage.limit_s(terms) + shift)
        return next_s

    async def both_deal(self, call: Call, role: str, at_s: int) -> None:
        effect_id = new_effect_id()

        async def act(_: int, stage: StakeStage) -> Receipt:
            return await stage.do(call, role, at_s=at_s, effect_id=effect_id)

        await self.both(act)

    async def both_stake(self, call: StakeCall, role: str, at_s: int) -> None:
        effect_id = new_effect_id()

        async def act(_: int, stage: StakeStage) -> Receipt:
            return await stage.call_as(effect_id, call, role, at_s=at_s)

        await self.both(act)

    async def both(self, act: Callable[[int, StakeStage], Awaitable[Receipt]]) -> None:
        told = []
        for number, stage in enumerate(self.stages):
            try:
                await act(number, stage)
            except CallReverted as error:
                told.append(error.error)
            else:
                told.append("")
        left, right = ("ReceiverBlocked" if error in BLOCKED else error for error in told)
        assert left == right
        await self.agree()

    async def agree(self) -> None:
        left, right = [
            await self._picture(stage, panel, held)
            for stage, panel, held in zip(self.stages, self.panels, self.start_held, strict=True)
        ]
        assert left == right

    async def _picture(self, stage: StakeStage, panel: Panel, start_held: int) -> dict[str, Any]:
        registry, settlement = stage.registry, stage.settlement
        job_ids = [stage.id_of(terms) for terms in self.deals]
        views = await settlement.jobs(job_ids)
        members = [stage.who(name).address for name in MEMBERS]
        people = [stage.who(role).address for role in ROLES]
        return {
            "time": (await settlement.head()).time_s,
            "deals": [replace(views[job_id], tx_hash="") for job_id in job_ids],
            "balances": [await settlement.balance(one) for one in (*people, *members)],
            "stakes": [await registry.stake(one) for one in people],
            "allowances": [await registry.allowance(one) for one in people],
            "slices": [await registry.slice_units(job_id) for job_id in job_ids],
            "owed": [await registry.owed(one) for one in people],
            "held": await registry.held() - start_held,
            "panel": (await panel.is_deployed(), [await panel.owed(one) for one in members]),
        }


# With which words a token refuses a receiver is its own affair.
BLOCKED: Final = ("ReceiverBlocked", "NoReason", "SafeERC20FailedOperation", "FailedCall")


@contextmanager
def worlds(
    make_left: Callable[[], StakeWorld], make_right: Callable[[StakeWorld, int], StakeWorld]
) -> Iterator[Pair]:
    """One loop and one left world for all examples: an EVM takes a while to start."""
    with start_blocking_portal("asyncio") as portal:

        async def begin() -> StakeWorld:
            world = make_left()
            if isinstance(world, EvmStakeWorld):
                await world.start()
                world.code = await ask_address(
                    world.port.chain, world.made.panels, "panelCode", panels_abi()
                )
            return world

        left = portal.call(begin)
        try:
            yield Pair(portal, left, make_right)  # type: ignore[arg-type]
        finally:
            if isinstance(left, EvmStakeWorld | MemoryStakeWorld):
                portal.call(left.close)


def twin(left: StakeWorld, start_s: int, kind: type[MemoryVault] = MemoryVault) -> StakeWorld:
    """Return a world in memory with the left one's addresses and time."""
    places: dict[str, str] = {}
    if isinstance(left, EvmStakeWorld):
        places = {"vault": left.made.vault, "panels": left.made.panels, "code": left.code}
    return MemoryStakeWorld(
        start_s=start_s,
        asset=left.settlement.asset,
        escrow=left.settlement.domain.contract,
        kind=kind,
        **places,
    )


def compare(pair: Pair, *, examples: int, steps: int, **options: Any) -> None:
    """Run so many examples of so many steps; raises at the first disagreement."""
    run_state_machine_as_test(
        lambda: StakesSideBySide(pair),  # type: ignore[arg-type]  # Any factory will do.
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_the_contracts_and_their_twins_agree() -> None:
    with worlds(EvmStakeWorld, twin) as pair:
        # Making a failing example smaller takes minutes here: that is the long test's work.
        compare(pair, examples=4, steps=15, phases=[Stages.reuse, Stages.generate])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_contracts_and_their_twins_agree_for_a_long_time() -> None:
    with worlds(EvmStakeWorld, twin) as pair:
        compare(pair, examples=300, steps=40)


class SlashesForEver(MemoryVault):
    """A planted fault: the acknowledgement counts as long as anybody likes."""

    def _close(self, call: CloseSlice, now_s: int) -> None:
        super()._close(call, min(now_s, call.terms.deliver_by_s) if call.ack_signature else now_s)


class ReservesTwice(MemoryVault):
    """A planted fault: one stake stands for several deals."""

    def reserve(self, wanted: Reserve) -> None:
        super().reserve(wanted)
        stake = self.stake(wanted.seller)
        more = replace(stake, free_units=stake.free_units + wanted.units)
        self.chain.write(self._stakes, wanted.seller, more)

    def check(self) -> None:
        """Keep silent: the comparison is to find it."""


@pytest.mark.parametrize("fault", [SlashesForEver, ReservesTwice])
def test_a_planted_fault_is_found(fault: type[MemoryVault]) -> None:
    """What compares them must itself be able to fail."""
    with worlds(MemoryStakeWorld, partial(twin, kind=fault)) as pair:
        with pytest.raises(AssertionError):
            compare(
                pair,
                examples=100,
                steps=20,
                derandomize=True,
                database=None,
                phases=[Stages.generate],
            )


def test_the_twin_agrees_with_itself() -> None:
    with worlds(MemoryStakeWorld, twin) as pair:
        compare(pair, examples=5, steps=20)
